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
"""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch

__all__ = ["cpu_backend_enabled", "disable_cpu_backend", "enable_cpu_backend"]

_CPU = torch.device("cpu")

_FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _is_cuda(device: Any) -> bool:
    """Whether `device` names a GPU: ``"cuda"``, ``"cuda:1"``, ``torch.device("cuda")`` or a bare index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory`, with a CUDA `device` read as the CPU and `pin_memory` dropped (there is nothing to copy to)."""

    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _tensor_to(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``Tensor.to``, with a CUDA device read as the CPU."""

    @functools.wraps(original)
    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type``, which tells Megatron's optimizers (and nobody else) the CUDA name of a CPU tensor's type.

    They sort parameters into fp32, fp16 and bf16 by comparing with names such as ``"torch.cuda.FloatTensor"``.
    """

    @functools.wraps(original)
    def type_(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer."):
                return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


class _Stream:
    """A CUDA stream on a machine where everything runs in program order: waiting is already done."""

    device = _CPU

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def wait_event(self, event: "_Event") -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event if event is not None else _Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _Event:
    """A CUDA event that has happened as soon as it is recorded, and keeps the wall clock for `elapsed_time`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._recorded_s = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self._recorded_s = time.perf_counter()

    def wait(self, stream: _Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: "_Event") -> float:
        """Milliseconds between this event and `end_event`."""
        return (end_event._recorded_s - self._recorded_s) * 1000.0


_STREAM = _Stream()


def _host_memory(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of the host, in the place of ``torch.cuda.mem_get_info``."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _tracker_set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _manual_seed_all(seed: int) -> None:
    _manual_seed(seed)


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


def _all_to_all_single(original: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.distributed.all_to_all_single``, which takes split sizes as tensors too.

    Megatron's expert dispatcher turns them into lists while it copies them from the GPU, and there is no such copy.
    """

    @functools.wraps(original)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        splits = [
            sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
            for sizes in (output_split_sizes, input_split_sizes)
        ]
        return original(output, input, *splits, group=group, async_op=async_op)

    return all_to_all_single


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


def _nothing() -> Callable[..., None]:
    """Gives a function that answers a call whose effect has no counterpart on a CPU.

    A new one each time: torch.compile keeps a table of torch's functions by identity and refuses one under two names.
    """

    def nothing(*args, **kwargs) -> None:
        pass

    return nothing


def _replacements() -> Iterator[tuple[object, str, Any]]:
    """Everything that the backend replaces, as (owner, attribute, replacement)."""
    # Not at the top of the file: Megatron-Core warns about absent extensions when imported, and importing this
    # package says nothing.
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for name in _FACTORIES:
        yield torch, name, _factory_on_cpu(getattr(torch, name))
    for name in _TENSOR_FACTORIES:
        yield torch.Tensor, name, _factory_on_cpu(getattr(torch.Tensor, name))
    yield torch.Tensor, "to", _tensor_to(torch.Tensor.to)
    yield torch.Tensor, "type", _tensor_type(torch.Tensor.type)
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self
    yield torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self
    yield torch.Tensor, "record_stream", _nothing()
    # Module.cuda moves parameters through Tensor.cuda, so it needs no replacement of its own.

    cuda = torch.cuda
    yield cuda, "is_available", lambda: False
    yield cuda, "device_count", lambda: 0
    yield cuda, "current_device", lambda: _CPU
    yield cuda, "set_device", _nothing()
    yield cuda, "get_device_name", lambda device=None: "cpu"
    yield cuda, "get_device_capability", lambda device=None: (0, 0)
    yield cuda, "is_current_stream_capturing", lambda: False

    yield cuda, "Stream", _Stream
    yield cuda, "Event", _Event
    yield cuda, "stream", lambda stream: _STREAM
    yield cuda, "current_stream", lambda device=None: _STREAM
    yield cuda, "default_stream", lambda device=None: _STREAM
    yield cuda, "set_stream", _nothing()
    yield cuda, "synchronize", _nothing()

    yield cuda, "empty_cache", _nothing()
    yield cuda, "ipc_collect", _nothing()
    yield cuda, "reset_peak_memory_stats", _nothing()
    yield cuda, "mem_get_info", _host_memory
    yield cuda.nvtx, "range_push", _nothing()
    yield cuda.nvtx, "range_pop", _nothing()

    for owner in (cuda, cuda.random):
        yield owner, "get_rng_state", _get_rng_state
        yield owner, "set_rng_state", _set_rng_state
        yield owner, "manual_seed", _manual_seed
        yield owner, "manual_seed_all", _manual_seed_all
    yield torch.distributed, "all_to_all_single", _all_to_all_single(torch.distributed.all_to_all_single)
    yield megatron_random, "_set_cuda_rng_state", _tracker_set_rng_state
    yield megatron_random, "_get_share_storage", _refill_storages
    optimizer = DistributedOptimizer
    yield optimizer, "state_dict", _optimizer_state_dict(optimizer.state_dict)
    set_parameter = "_set_main_param_and_optimizer_states"
    yield optimizer, set_parameter, _optimizer_set_parameter(getattr(optimizer, set_parameter))
    yield optimizer, "load_state_dict", _optimizer_load_state_dict(optimizer.load_state_dict)
    checkpoint = megatron_random.CheckpointWithoutOutput
    yield checkpoint, "__init__", _checkpoint_without_output_init(checkpoint.__init__)


class _OneGenerator(logging.Filter):
    """Drops the tracker's remark that the CPU generator moved while the CUDA one was forked: here they are one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("CPU RNG state changed")


_ABSENT = object()


class _Backend:
    """The replacements in force, and what to put back."""

    def __init__(self) -> None:
        # torch keeps a table of its factories for `with torch.device(...)`, built on first use. Built after the
        # replacement it would hold our wrappers and miss the functions that they call.
        with torch.device("meta"):
            torch.empty(0)
        self._before: list[tuple[object, str, Any]] = []
        for owner, name, replacement in list(_replacements()):
            self._before.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, replacement)
        self._filter = _OneGenerator()
        self._logger = logging.getLogger("megatron.core.tensor_parallel.random")
        self._logger.addFilter(self._filter)
        # Megatron decorates small functions with torch.compile; on a CPU that would need a C++ compiler at run time.
        self._stance = torch.compiler.set_stance("force_eager")

    def undo(self) -> None:
        """Puts every replaced attribute back as it was, the last one first."""
        from torch._dynamo.trace_rules import clear_lru_cache

        self._stance.__exit__(None, None, None)
        self._logger.removeFilter(self._filter)
        for owner, name, before in reversed(self._before):
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        # torch.compile's table of torch's functions may have been built from the replacements.
        clear_lru_cache()


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
