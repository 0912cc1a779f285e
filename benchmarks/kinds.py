"""What the device does in a step, by kind of kernel, and how quiet the host is that launches it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import torch

# The first kind of which a kernel's name has a mark, as CUDA 13, cuDNN 9, Triton 3 and TransformerEngine 2 name them.
KINDS = {
    "collectives": r"nccl",  # the wait for the other ranks too
    "copies": r"memcpy|memset|copy_kernel|CatArrayBatchedCopy",
    "attention": r"flash|fmha|sdpa|attention|fused_attn|cudnn_generated",
    "rope": r"rope|rotary",
    "activation": r"swiglu|gated|glu|gelu|silu",
    "norm": r"rmsnorm|layer_norm|layernorm|norm_kernel|ln_fwd|ln_bwd|rms_",
    "GEMM": r"gemm|nvjet|cutlass|xmma|cublas|splitk",
    "softmax": r"softmax|cross_entropy|log_soft",
    "compiled": r"triton_",
    "rows moved": r"gather|scatter|index|embedding|_gather|_gradient|_rows",
    "reduction": r"reduce|sum_kernel",
    "elementwise": r"elementwise|vectorized|foreach|multi_tensor",
}
OTHER = "other"
_TIMES = 20_000  # launches, some tenth of a second of them


def kind_of(kernel: str) -> str:
    """The kind of a kernel.

    Example:
        >>> kind_of("nvjet_sm90_tst_128x256_64x4"), kind_of("at::native::vectorized_elementwise_kernel")
        ('GEMM', 'elementwise')
        >>> kind_of("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
        'collectives'
    """
    return next((kind for kind, marks in KINDS.items() if re.search(marks, kernel, re.IGNORECASE)), OTHER)


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums of the times of `(name, time)`, largest first.

    Example:
        >>> by_kind([("nvjet_a", 2.0), ("Memset", 0.5), ("nvjet_b", 1.0)])
        {'GEMM': 3.0, 'copies': 0.5}
    """
    sums: dict[str, float] = {}
    for name, spent in kernels:
        sums[kind_of(name)] = sums.get(kind_of(name), 0.0) + spent
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans `(begin, end)` lasts.

    Example:
        >>> busy([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
        4.0
    """
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def device_times(step: Callable[[], object], steps: int) -> tuple[dict[str, float], float, float]:
    """Milliseconds of a step on the device by kind, in which it is busy at all, and its number of kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    kinds = by_kind(
        (event.name, (end - begin) / 1e3 / steps) for event, (begin, end) in zip(events, spans, strict=True)
    )
    return kinds, busy(spans) / 1e3 / steps, len(events) / steps


def launches_a_second() -> float:
    """How many small kernels the host launches in a second: what a step pays that is not replayed. Measured first."""
    number = torch.zeros(1, device="cuda")
    for _ in range(_TIMES // 10):
        number.add_(1)
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(_TIMES // 3):
            number.add_(1)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return (_TIMES // 3) / best
