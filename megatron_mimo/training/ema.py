"""An exponential moving average (EMA) of the weights that train, cut over ranks as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_mimo.model import MimoModel
from megatron_mimo.training.settings import check_decay

#: What the names of averages begin with in a checkpoint; a weight's own name follows.
PREFIX = "ema."


class Ema:
    """Float32 averages of this rank's weights: `average = d * average + (1 - d) * weight` after each optimizer step.

    `d = min(decay, (1 + n) / (10 + n))` in the n-th step from 0, so that the first weights are soon forgotten. Averages
    begin as the weights before the first step. Weights that do not train have none. Nothing here is collective.

    Args:
        models: this rank's chunks, bare.
        decay: the highest share of the average that a step keeps.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, models: Sequence[MimoModel], decay: float) -> None:
        check_decay("Ema: decay", decay)
        self._models, self.decay = list(models), float(decay)
        self.updates = 0
        self._averages: list[dict[str, Tensor]] | None = None

    @property
    def averages(self) -> list[dict[str, Tensor]]:
        """Of each chunk: name of a parameter that trains -> its average, float32, of this rank's shape."""
        if self._averages is None:
            self._averages = [
                {name: weight.detach().float().clone() for name, weight in _trained(model)} for model in self._models
            ]
        return self._averages

    @property
    def groups(self) -> ProcessGroupCollection:
        """Of the models' layout."""
        return self._models[0].pg_collection

    def start(self) -> None:
        """Begins as the weights are now, where it has not begun."""
        assert self.averages is not None

    def restart(self) -> None:
        """Begins anew, from the weights as they are at the next `start`, or when they are next looked at."""
        self._averages, self.updates = None, 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a step in; every rank has whole weights of its cut."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for model, averages in zip(self._models, self.averages):
            for name, weight in _trained(model):
                averages[name].lerp_(weight.detach().float(), 1 - decay)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averages for its weights, in their dtype; then its own again, bit by bit."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        with torch.no_grad():
            for model, averages in zip(self._models, self.averages):
                for name, weight in _trained(model):
                    kept.append((weight, weight.detach().clone()))
                    weight.copy_(averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, own in kept:
                    weight.copy_(own)

    # Below: in checkpoints --------------------------------------------------------------------------------------

    def sharded_state_dict(self, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The averages as sharded tensors named `ema.` and the weight's name, for `dist_checkpointing`.

        Args:
            metadata: as of the model's `sharded_state_dict`.
        """
        state: dict[str, Any] = {}
        for index, (model, averages) in enumerate(zip(self._models, self.averages)):
            whole = model.sharded_state_dict(metadata=metadata)
            weights = dict(_trained(model))
            state[f"ema{index}"] = {
                name: _of_average(entry, weights[name], averages[name])
                for name, entry in whole.items()
                if name in averages
            }
        return state

    def take(self, state: dict[str, Any], updates: int) -> None:
        """Goes on with averages that were read; takes them out of `state`.

        Args:
            state: what was read for `sharded_state_dict`.
            updates: that they have behind them.
        """
        for index, averages in enumerate(self.averages):
            for name, found in state.pop(f"ema{index}").items():
                averages[name].copy_(found)
        self.updates = updates


def is_there(stored: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's description has averages."""
    return any(name.startswith(PREFIX) for name in stored)


def _trained(model: MimoModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _of_average(entry: Any, weight: nn.Parameter, average: Tensor) -> ShardedTensor | ShardedTensorFactory:
    """A weight's entry of a sharded state, with its average in place of the weight."""
    data = entry.data.detach()
    if data.shape != average.shape:  # such as one dim more for the layer
        offset = data.storage_offset() - weight.detach().storage_offset()
        average = average.as_strided(data.shape, data.stride(), offset)
    changes: dict[str, Any] = {"key": f"{PREFIX}{entry.key}", "data": average}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = average.dtype
    return replace(entry, **changes)
