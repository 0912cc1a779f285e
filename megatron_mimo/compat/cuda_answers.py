"""What Megatron-Core asks of torch's CUDA half, answered with the CPU: devices, generators, memory.

Every answer stands in the place of one of torch's own functions (`answers` lists them), takes what that one takes,
and goes back when the CPU backend is disabled.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _device

from megatron_mimo.compat.cuda_streams import STREAM, Event, Guard, Stream

__all__ = ["answers", "gpu_without_memory"]

_CPU = torch.device("cpu")  # or what `gpu_without_memory` puts there

# Functions with a keyword `device`.
_FACTORIES = (
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_like", "empty_permuted",
    "empty_strided", "eye", "full", "full_like", "hamming_window", "hann_window", "kaiser_window", "linspace",
    "logspace", "normal", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "randperm", "range", "scalar_tensor", "sparse_bsc_tensor", "sparse_bsr_tensor", "sparse_compressed_tensor",
    "sparse_coo_tensor", "sparse_csc_tensor", "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    "zeros_like",
)  # fmt: skip
_OF_TENSORS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_OF_FFT = ("fftfreq", "rfftfreq")


@contextmanager
def gpu_without_memory() -> Iterator[None]:
    """Within it what is asked for on the GPU is made on the meta device, while the CPU backend is on."""
    global _CPU
    before, _CPU = _CPU, torch.device("meta")
    try:
        yield
    finally:
        _CPU = before


def answers() -> Iterator[tuple[object, str, Any]]:
    """Everything that is answered, as (owner, attribute, replacement)."""
    factories: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (torch, _FACTORIES),
        (torch.Tensor, _OF_TENSORS),
        (torch.fft, _OF_FFT),
    )
    for owner, names in factories:
        for name in names:
            yield owner, name, _named(owner, name, _on_cpu(getattr(owner, name)))
    tensor = torch.Tensor
    yield tensor, "to", _named(tensor, "to", _tensor_to(tensor.to))
    yield tensor, "type", _named(tensor, "type", _tensor_type(tensor.type))
    for name in ("cuda", "pin_memory"):
        yield tensor, name, _named(tensor, name, _itself(getattr(tensor, name)))
    # Module.cuda moves parameters through Tensor.cuda, so it needs no answer of its own.
    yield torch.UntypedStorage, "cuda", _itself(torch.UntypedStorage.cuda)
    yield tensor, "record_stream", _named(tensor, "record_stream", _nothing())
    yield torch, "load", _named(torch, "load", _load(torch.load))
    yield _device.DeviceContext, "__init__", _device_context_init(_device.DeviceContext.__init__)
    distributed = torch.distributed
    yield distributed, "all_to_all_single", _all_to_all_single(distributed.all_to_all_single)
    for module, name, answer in _of_cuda():
        yield module, name, answer if isinstance(answer, type) else _named(module, name, answer)


def _of_cuda() -> Iterator[tuple[object, str, Any]]:
    cuda = torch.cuda
    yield cuda, "is_available", lambda: False
    yield cuda, "device_count", lambda: 0
    # A number, as on a GPU: it is used as an index, and in names such as f"cuda:{current_device()}". Where it is
    # given as a device it is read as the CPU.
    yield cuda, "current_device", lambda: 0
    yield cuda, "set_device", _nothing()
    yield cuda, "device", Guard
    yield cuda, "get_device_name", lambda device=None: "cpu"
    yield cuda, "get_device_capability", lambda device=None: (0, 0)
    yield cuda, "is_current_stream_capturing", lambda: False

    yield cuda, "Stream", Stream
    yield cuda, "Event", Event
    yield cuda, "stream", lambda stream: STREAM
    yield cuda, "current_stream", lambda device=None: STREAM
    yield cuda, "default_stream", lambda device=None: STREAM
    yield cuda, "set_stream", _nothing()
    yield cuda, "synchronize", _nothing()

    yield cuda, "empty_cache", _nothing()
    yield cuda, "ipc_collect", _nothing()
    yield cuda, "reset_peak_memory_stats", _nothing()
    yield cuda, "mem_get_info", _host_memory
    yield cuda.nvtx, "range_push", _nothing()
    yield cuda.nvtx, "range_pop", _nothing()

    for owner in (cuda, cuda.random):
        yield owner, "get_rng_state", lambda device=None: torch.get_rng_state()
        yield owner, "set_rng_state", lambda new_state, device=None: torch.set_rng_state(new_state)
        yield owner, "initial_seed", lambda: torch.initial_seed()
        for name in ("manual_seed", "manual_seed_all"):
            yield owner, name, lambda seed: torch.default_generator.manual_seed(int(seed)) and None


def _named(owner: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under the name that it stands for: that is how pickle finds a function again."""
    function.__name__ = name
    if isinstance(owner, type):
        function.__module__, function.__qualname__ = owner.__module__, f"{owner.__qualname__}.{name}"
    else:
        function.__module__, function.__qualname__ = owner.__name__, name
    return function


def _is_cuda(device: Any) -> bool:
    """Whether `device` names a GPU: ``"cuda"``, ``"cuda:1"``, ``torch.device("cuda")`` or a bare index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
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


def _itself(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that would move its object to a GPU or into pinned memory: the object is where it shall be."""

    @functools.wraps(original)
    def itself(self, *args, **kwargs):
        return self

    return itself


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load``, with a CUDA `map_location` read as the CPU."""

    @functools.wraps(original)
    def load(f, map_location=None, *args, **kwargs):
        return original(f, _CPU if _is_cuda(map_location) else map_location, *args, **kwargs)

    return load


def _device_context_init(original: Callable[..., None]) -> Callable[..., None]:
    """What ``with torch.device("cuda")`` and ``torch.set_default_device("cuda")`` build, with the CPU in it.

    Private: `torch.utils._device.DeviceContext`, since torch 2.0. When it goes: leave the mend out; both then fail.
    """

    @functools.wraps(original)
    def init(self, device) -> None:
        original(self, _CPU if _is_cuda(device) else device)

    return init


def _host_memory(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of the host, in the place of ``torch.cuda.mem_get_info``."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


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


def _nothing() -> Callable[..., None]:
    """Gives a function that answers a call whose effect has no counterpart on a CPU.

    A new one each time: torch.compile keeps a table of torch's functions by identity and refuses one under two names.
    """

    def nothing(*args, **kwargs) -> None:
        pass

    return nothing
