"""Megatron-Core where there is no GPU: what it does with CUDA's insides, done with the CPU's.

Each function mends one name; its docstring says why. All are looked up in Megatron-Core 0.19.2, by
`tests/unit/test_compat.py` on the installed version. When a name goes: run `tests/unit/test_cpu.py` without the mend,
and remove it if what its docstring speaks of works.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["OneGenerator", "mends"]


def mends() -> Iterator[tuple[object, str, Any]]:
    """What is mended in Megatron, as (owner, attribute, replacement)."""
    # Not at the top of the file: Megatron-Core warns about absent extensions when imported, and importing this
    # package says nothing.
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    yield megatron_random, "_set_cuda_rng_state", _tracker_set_rng_state
    yield megatron_random, "_get_share_storage", _refill_storages
    optimizer = DistributedOptimizer
    yield optimizer, "state_dict", _optimizer_state_dict(optimizer.state_dict)
    set_parameter = "_set_main_param_and_optimizer_states"
    yield optimizer, set_parameter, _optimizer_set_parameter(getattr(optimizer, set_parameter))
    yield optimizer, "load_state_dict", _optimizer_load_state_dict(optimizer.load_state_dict)
    checkpoint = megatron_random.CheckpointWithoutOutput
    yield checkpoint, "__init__", _checkpoint_without_output_init(checkpoint.__init__)


class OneGenerator(logging.Filter):
    """Drops the tracker's remark that the CPU generator moved while the CUDA one was forked: here they are one."""

    #: Of the remark.
    LOGGER = "megatron.core.tensor_parallel.random"
    TEXT = "CPU RNG state changed"

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.TEXT)


def _tracker_set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """``_set_cuda_rng_state``, with which the tracker forks: torch's only generator is "the CUDA generator" too."""
    torch.set_rng_state(new_state)


def _refill_storages() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Gives a function that puts a recomputed tensor's bytes back into a storage that recomputation had emptied.

    Megatron compiles a C++ extension that swaps the pointers; a copy keeps every view valid too and asks for no
    compiler.
    """

    def refill(emptied: torch.Tensor, recomputed: torch.Tensor) -> None:
        source = recomputed.untyped_storage()
        emptied.untyped_storage().resize_(source.nbytes())
        emptied.untyped_storage().copy_(source)

    return refill


def _checkpoint_without_output_init(original: Callable[..., None]) -> Callable[..., None]:
    """``CheckpointWithoutOutput.__init__``, which takes its own default, ``fp8=False``, for "fp8 is on".

    On a GPU that only costs a look into TransformerEngine; without TransformerEngine the look is a NameError.
    """

    @functools.wraps(original)
    def init(self, fp8=None) -> None:
        original(self, fp8=fp8 or None)

    return init


def _optimizer_state_dict(original: Callable[..., dict]) -> Callable[..., dict]:
    """``DistributedOptimizer.state_dict``, which also describes a torch Adam that has not taken a step.

    Loading a checkpoint begins with that description. Megatron reads the step count from the state, which torch's Adam,
    unlike TransformerEngine's and Apex's, creates with its first step.
    """

    @functools.wraps(original)
    def state_dict(self):
        if isinstance(self.optimizer, torch.optim.Adam) and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.zeros(())
        return original(self)

    return state_dict


def _optimizer_load_state_dict(original: Callable[..., None]) -> Callable[..., None]:
    """``DistributedOptimizer.load_state_dict``, after which every parameter counts its own steps.

    Megatron hands torch's Adam one tensor as the count of all parameters, and every parameter would increment it.
    """

    @functools.wraps(original)
    def load_state_dict(self, state_dict):
        original(self, state_dict)
        if isinstance(self.optimizer, torch.optim.Adam):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


def _optimizer_set_parameter(original: Callable[..., None]) -> Callable[..., None]:
    """``DistributedOptimizer._set_main_param_and_optimizer_states``, which leaves torch Adam's step count alone.

    A checkpoint keeps the count once for all parameters, and Megatron looks for it beside each parameter's moments too.
    An fp32 parameter is its own main parameter, a leaf that may be written to only outside autograd.
    """

    @functools.wraps(original)
    @torch.no_grad()
    def set_parameter(self, model_param, tensors):
        original(self, model_param, tensors | {"step": None})

    return set_parameter
