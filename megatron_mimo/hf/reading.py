"""Checkpoint -> this rank's parameters: first everything is compared, then read tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_mimo.hf.files import Checkpoint, Stored
from megatron_mimo.hf.table import Rule, Table

# Rows that are compared at once.
_ROWS = 4096


@dataclass(frozen=True)
class Place:
    """Where this rank stands among those that share a layer.

    Args:
        rank, size: in the tensor-parallel group.
        expert_rank, expert_size: in the expert-tensor-parallel group.
        share, shares: which of the equal, contiguous shares of a layer's experts it has, of how many.
    """

    rank: int = 0
    size: int = 1
    expert_rank: int = 0
    expert_size: int = 1
    share: int = 0
    shares: int = 1

    def of(self, rule: Rule) -> tuple[int, int]:
        """Rank and size for a rule's parameter."""
        return (self.expert_rank, self.expert_size) if rule.expert else (self.rank, self.size)


def differences(stored: Mapping[str, Stored], table: Table) -> list[str]:
    """One line for each tensor that is missing, surplus or of another shape than `table` has."""
    expected, told = table.expected, []
    for name, shape in expected.items():
        if name not in stored:
            told.append(f"missing: {name} {list(shape)}")
        elif stored[name].shape != shape:
            told.append(f"shape: {name} is {list(stored[name].shape)}, expected {list(shape)}")
    for name, entry in stored.items():
        if name in expected or _ignored(name, table):
            continue
        if name in table.optional:
            told += _same(entry, stored.get(table.optional[name]), table.optional[name])
        else:
            told.append(f"surplus: {name} {list(entry.shape)}")
    return told


def _ignored(name: str, table: Table) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in table.ignored)


def _same(one: Stored, other: Stored | None, name: str) -> list[str]:
    """Nothing where a redundant tensor says what the other one does."""
    if other is None:
        return []  # which is told as missing
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return [
            f"shape: {one.name} is {one.dtype} {list(one.shape)}, tied to {name}, {other.dtype} {list(other.shape)}"
        ]
    for start in range(0, one.shape[0], _ROWS):
        stop = min(start + _ROWS, one.shape[0])
        if not torch.equal(one.read(0, start, stop), other.read(0, start, stop)):
            return [f"values: {one.name} differs from {name}, to which the configuration ties it"]
    return []


def check(checkpoint: Checkpoint, table: Table, problems: Sequence[str] = ()) -> None:
    """Refuses a checkpoint that a model's table does not fit.

    Args:
        checkpoint: whose tensors are compared.
        table: of the whole model, in the checkpoint's names.
        problems: found before, such as fields of the configuration.

    Raises:
        ValueError: naming everything that differs.
    """
    refuse(f"{checkpoint.directory}", [*problems, *differences(checkpoint.tensors, table)])


def refuse(where: str, told: Sequence[str]) -> None:
    """Raises where there is anything to tell.

    Raises:
        ValueError: with all of it.
    """
    if told:
        lines = "\n  ".join(told)
        raise ValueError(
            f"{where}: expected a model that the library's tables cover, found {len(told)} differences. "
            f"docs/weights.md says how a family is added.\n  {lines}"
        )


def unfilled(parameters: Mapping[str, nn.Parameter], table: Table, place: Place) -> list[str]:
    """One line for each parameter that `table` has no rule for, or fills with another shape."""
    rules, told = {rule.ours: rule for rule in table.rules}, []
    for name, parameter in parameters.items():
        if name not in rules:
            told.append(f"model: {name} {list(parameter.shape)} has no tensor")
        elif not _fits(rules[name], parameter, place):
            theirs = {theirs: list(shape) for theirs, shape in rules[name].theirs.items()}
            told.append(f"model: {name} is {list(parameter.shape)}, which {theirs} do not fill")
    return told


def _fits(rule: Rule, parameter: nn.Parameter, place: Place) -> bool:
    shape = next(iter(rule.theirs.values()))
    if rule.cut == "whole":
        return torch.Size(shape).numel() == parameter.numel()
    _, size = place.of(rule)
    if rule.padded:
        return parameter.shape[0] * size >= shape[0] and parameter.shape[1:] == shape[1:]
    dim = 1 if rule.cut == "columns" else 0
    total = sum(one[dim] for one in rule.theirs.values())
    return parameter.shape[dim] * size == total and (
        (*parameter.shape[:dim], *parameter.shape[dim + 1 :]) == (*shape[:dim], *shape[dim + 1 :])
    )


@torch.no_grad()
def fill(parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Stored], table: Table, place: Place) -> None:
    """Puts this rank's part of a checkpoint into `parameters`; rows of padding become zero.

    Args:
        parameters: by the table's names.
        stored: the tensors, by the table's names.
        table: whose rules have every parameter's name.
        place: of this rank.
    """
    rules = {rule.ours: rule for rule in table.rules}
    for name, parameter in parameters.items():
        rule = rules[name]
        if rule.padded:
            parameter.zero_()
        for piece in rule.pieces(*place.of(rule), parameter.shape[0]):
            part = stored[piece.name].read(piece.dim, piece.start, piece.stop)
            if piece.dim is None:
                parameter.copy_(part.reshape(parameter.shape))
            else:
                parameter.narrow(piece.dim, piece.at, part.shape[piece.dim]).copy_(part)
