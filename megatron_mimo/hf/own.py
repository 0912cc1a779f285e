"""Parts that no class of transformers can hold: their tables are read off the modules themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mimo.hf.blueprint import Chunk, Origin
from megatron_mimo.hf.reading import Place
from megatron_mimo.hf.table import Rule, Shape, Table

FILE = "megatron_mimo.safetensors"
# Halves of a gated layer, which are cut apart.
_GATE, _VALUE = "/gate", "/value"


def tensors_of(models: Sequence[Chunk], origin: Origin | None) -> dict[str, Tensor]:
    """This rank's parameters and saved buffers that no part of `origin` covers, by their names in the model."""
    covered = tuple(_prefix(part.path) for part in origin.parts) if origin is not None else ()
    found: dict[str, Tensor] = {}
    for model in models:
        found |= {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor) and not name.startswith(covered) and not name.endswith("_extra_state")
        }
    return found


def _prefix(path: str) -> str:
    if path == "language_model":
        return "language_model."
    return f"modality_submodules.{path.replace('/', '.')}."


def table_of(models: Sequence[Chunk], tensors: Mapping[str, Tensor], place: Place) -> Table:
    """Rules for this rank's `tensors`, told from how Megatron marks what it cut.

    Raises:
        ValueError: experts that ranks share out, whose names say nothing of which they are.
    """
    experts = [name for name, tensor in tensors.items() if not getattr(tensor, "allreduce", True)]
    if place.shares > 1 and experts:
        raise ValueError(
            f"expert_model_parallel_size {place.shares}: expected no experts in parts that no table covers, found "
            f"{experts[:3]}, {len(experts)} in all. Save and load such a model at expert_model_parallel_size 1."
        )
    gated = {name for model in models for name in _gated(model)}
    return Table([_rule(name, tensor, name in gated, place) for name, tensor in tensors.items()], {}, {})


def table_of_all(table: Table) -> Table:
    """The rules of every rank, in one order. Collective over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return table
    of_all: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, list(table.rules))
    rules = {rule.ours: rule for of_one in of_all for rule in of_one}
    return Table([rules[name] for name in sorted(rules)], {}, {})


def _gated(model: Chunk) -> Iterator[str]:
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if path.endswith("linear_fc1") and config is not None and config.gated_linear_unit:
            yield from (f"{path}.{kind}" for kind in ("weight", "bias"))


def _rule(name: str, tensor: Tensor, gated: bool, place: Place) -> Rule:
    shape: list[int] = list(tensor.shape)
    cut = getattr(tensor, "tensor_model_parallel", False) and place.size > 1
    if not cut and not gated:
        return Rule(name, {name: tuple(shape)})
    dim = getattr(tensor, "partition_dim", 0)
    if gated and dim == 0:
        shape[0] = shape[0] * (place.size if cut else 1) // 2
        halves: dict[str, Shape] = {name + _GATE: tuple(shape), name + _VALUE: tuple(shape)}
        return Rule(name, halves, "stacked")
    shape[dim] *= place.size
    return Rule(name, {name: tuple(shape)}, "columns" if dim == 1 else "rows")


def as_parameters(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """`tensors` where parameters are asked for; reading and writing treat both alike."""
    return {name: tensor if isinstance(tensor, nn.Parameter) else _buffer(tensor) for name, tensor in tensors.items()}


def _buffer(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)  # of the same memory
