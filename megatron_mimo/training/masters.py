"""The float32 copies of half-precision weights that an optimizer steps, held equal to the weights.

An optimizer of bf16 or fp16 weights copies them when it is built, steps the copies and writes them into the weights. A
weight that other code changes is therefore undone by the next step, unless its copy follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_mimo.compat.megatron_optimizers import Master, masters_of


class Masters:
    """An optimizer's float32 copies, which `load_state_dict` of any module reaches.

    Args:
        models: this rank's chunks.
        optimizer: of their parameters.
    """

    def __init__(self, models: Sequence[nn.Module], optimizer: MegatronOptimizer) -> None:
        self._models, self._optimizer = models, optimizer
        self._trained = {
            (index, name): parameter
            for index, model in enumerate(models)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._loaded = _Loaded()
        for model in models:
            for module in model.modules():
                module.register_load_state_dict_post_hook(self._loaded)

    def follow(self) -> None:
        """Copies what `load_state_dict` wrote; refuses weights that other code changed. Called before a step or a save.

        One pass over weights and copies, read once by the host.

        Raises:
            ValueError: naming the weight and what to call.
        """
        self._check_replaced()
        if self._loaded.since_follow:
            self.sync()
            return
        visible = [each for each in masters_of(self._optimizer) if each.master is not None]
        if not visible:
            return
        changed = torch.stack([_changed(each).any() for each in visible]).tolist()
        names = [self._name(each.weight) for each, one in zip(visible, changed) if one]
        if names:
            raise ValueError(
                f"{names[0]} {_and_others(names)}changed since the last step by other means than load_state_dict, and "
                "the optimizer's float32 copy did not: its next step would undo the change. Call "
                "trainer.sync_weights() after the change."
            )

    def sync(self) -> None:
        """Takes weights that differ from their copies into the copies; the copies of other weights keep all bits."""
        self._check_replaced()
        masters = masters_of(self._optimizer)
        if any(each.master is None for each in masters):
            self._optimizer.reload_model_params()  # what we cannot see, Megatron copies
        else:
            for each in masters:
                master = cast(torch.Tensor, each.master)
                master.copy_(torch.where(_changed(each), each.of_weight().float(), master))
        self._loaded.since_follow = False

    def _check_replaced(self) -> None:
        for index, model in enumerate(self._models):
            now = dict(model.named_parameters())
            for (chunk, name), parameter in self._trained.items():
                if chunk == index and now.get(name) is not parameter:
                    raise ValueError(
                        f"{name} is another parameter than the one that the optimizer trains, which would train unseen "
                        "by the model. Copy into it: load_state_dict without assign=True, or copy_ and "
                        "trainer.sync_weights()."
                    )

    def _name(self, weight: nn.Parameter) -> str:
        return next(name for (_, name), parameter in self._trained.items() if parameter is weight)


class _Loaded:
    """A hook of every module that remembers that something was loaded."""

    def __init__(self) -> None:
        self.since_follow = False

    def __call__(self, module: nn.Module, incompatible: object) -> None:
        self.since_follow = True


def _changed(each: Master) -> torch.Tensor:
    """Bool, flat: where the weight is not its copy in the weight's precision."""
    return each.of_weight() != each.master.to(each.weight.dtype)  # type: ignore[union-attr]


def _and_others(names: Sequence[str]) -> str:
    return f"and {len(names) - 1} more tensors " if len(names) > 1 else ""
