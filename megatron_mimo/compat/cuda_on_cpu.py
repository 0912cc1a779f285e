"""Megatron-Core on a CPU: answer in software what it asks of CUDA.

Megatron-Core computes on whatever device its tensors live on, but it names that device by asking CUDA:
``torch.cuda.current_device()`` as a tensor device, ``device="cuda"`` in factory calls, ``torch.cuda`` streams around
its collectives, the CUDA generator behind dropout. `enable_cpu_backend` replaces those answers for the whole process,
so that the same model, optimizer, pipeline schedule and checkpoint code runs on CPU tensors and gloo process groups.

Gloo itself (torch 2.11) needs no help for the collectives that Megatron-Core issues: reductions in every dtype
including bfloat16 and with ``ReduceOp.AVG``, ``reduce_scatter_tensor``, ``all_gather_into_tensor``, both of these
coalesced and asynchronous, ``all_to_all_single`` with uneven splits, and batched ``isend`` / ``irecv``. Only
``torch.distributed.all_to_all`` on lists of tensors is missing, and Megatron-Core does not call it.

One generator plays both parts here: torch's CPU generator is also "the CUDA generator". Megatron's RNG tracker saves,
forks and restores it as it would a GPU's, so dropout under activation recomputation repeats exactly.

Code that has nothing to do with Megatron goes on as before while the backend is on: TorchScript, fx and export take
functions that call factories, tensors and functions are pickled, files loaded, devices compared. What remains: a
factory is then a Python function in place of a builtin one (`inspect.isbuiltin` says so, warnings from within it name
this package, and a subclass's `__torch_function__` gets the builtin one), `torch.compile` runs code as it is, and
``torch.Generator("cuda")`` cannot be built.
"""

import logging
from typing import Any

import torch

from megatron_mimo.compat.cuda_answers import answers
from megatron_mimo.compat.megatron_on_cpu import OneGenerator, mends
from megatron_mimo.compat.torch import build_table_of_factories, forget_compiled_names, script_as

__all__ = ["cpu_backend_enabled", "disable_cpu_backend", "enable_cpu_backend"]

_ABSENT = object()


class _Backend:
    """The replacements in force, and what to put back."""

    def __init__(self) -> None:
        # Built after the replacement, torch's tables of its functions would hold ours and miss those that they call.
        build_table_of_factories()
        torch.overrides.get_overridable_functions()
        replacements = [*answers(), *mends()]
        self._unscript = [
            script_as(replacement, vars(owner)[name])
            for owner, name, replacement in replacements
            if name in vars(owner)
        ]
        self._before: list[tuple[Any, str, Any]] = []
        for owner, name, replacement in replacements:
            self._before.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, replacement)
        self._filter = OneGenerator()
        self._logger = logging.getLogger(OneGenerator.LOGGER)
        self._logger.addFilter(self._filter)
        # Megatron decorates small functions with torch.compile; on a CPU that would need a C++ compiler at run time.
        self._stance = torch.compiler.set_stance("force_eager")

    def undo(self) -> None:
        """Puts every replaced attribute back as it was, the last one first."""
        self._stance.__exit__(None, None, None)
        self._logger.removeFilter(self._filter)
        for owner, name, before in reversed(self._before):
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        for undo in self._unscript:
            undo()
        # torch.compile's table of torch's functions may have been built from the replacements.
        forget_compiled_names()


_backend: _Backend | None = None


def enable_cpu_backend(force: bool = False) -> None:
    """Makes Megatron-Core run on CPU tensors and gloo, in this whole process, until `disable_cpu_backend`.

    Calling it again changes nothing. Call it before building models: tensors that exist already stay where they are.

    Args:
        force: enable it although a GPU is available; the process then behaves as if there were none.

    Raises:
        RuntimeError: a GPU is available and `force` is false.

    Example:
        >>> from megatron_mimo.compat.cuda_on_cpu import disable_cpu_backend, enable_cpu_backend
        >>> enable_cpu_backend(force=True)
        >>> torch.zeros(2, device="cuda").device
        device(type='cpu')
        >>> disable_cpu_backend()
    """
    global _backend
    if _backend is not None:
        return
    if torch.cuda.is_available() and not force:
        raise RuntimeError(
            "enable_cpu_backend: expected a machine without a GPU, found "
            f"{torch.cuda.device_count()} CUDA device(s). Run on the GPU without the CPU backend, or pass force=True "
            "to have this process ignore the GPU."
        )
    _backend = _Backend()


def disable_cpu_backend() -> None:
    """Undoes `enable_cpu_backend`: every replaced attribute is again what it was. Without effect when not enabled."""
    global _backend
    if _backend is not None:
        _backend.undo()
        _backend = None


def cpu_backend_enabled() -> bool:
    """Whether the CPU backend is in force in this process."""
    return _backend is not None
