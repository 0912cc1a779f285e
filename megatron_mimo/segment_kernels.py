"""Fused kernels of torch for packed sequences on GPUs: `varlen_attn` where all is causal, `flex_attention` with spans.

Which blocks of scores there are to compute is told by integers of the host, made with the batch: nothing is the size of
the pack squared, and no device is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries and keys of a block of scores: torch's own default."""


def takes_varlen(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's variable-length attention can take queries: half precision on a GPU.

    Args:
        device, dtype: of the queries.
        width: of a head.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and width % 8 == 0 and width <= 256 and _varlen() is not None


def takes_flexible(device: torch.device, width: int) -> bool:
    """Whether the compiled kernel of `flexible` can take queries: on a GPU, heads of 16 and more.

    Args:
        device: of the queries.
        width: of a head.
    """
    told = "seq_lengths" in inspect.signature(BlockMask.from_kv_blocks).parameters  # torch 2.8 and later
    return device.type == "cuda" and width >= 16 and told


def varlen(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, *, scale: float | None, causal: bool
) -> Tensor:
    """Attention of each sequence to itself, `[S, heads, d]`, in one kernel.

    Args:
        query: `[S, heads, d]`; key and value with heads that divide them.
        boundaries: int32 `[sequences + 1]` on the same device.
        longest: of the sequences.
        scale: of the scores; None for `d ** -0.5`.
        causal: whether a position sees those before it alone.
    """
    attend = cast("Callable[..., Tensor]", _varlen())
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    return attend(
        query, key.contiguous(), value.contiguous(), boundaries, boundaries, longest, longest, scale=scale,
        window_size=window,
    )  # fmt: skip


def flexible(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float | None) -> Tensor:
    """Attention by a block mask, `[S, heads, d]`; compiled on a GPU.

    Args:
        query: `[S, heads, d]`; key and value with heads that divide them.
        mask: of `block_mask`.
        scale: of the scores; None for `d ** -0.5`.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    attend = _compiled() if query.is_cuda else flex_attention
    found = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return found[0].transpose(0, 1)


@cache
def _varlen() -> Callable[..., Any] | None:
    """Torch's variable-length attention, None where this torch has none that can be causal (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def block_mask(blocks: Tensor, boundaries: Tensor, spans: Tensor) -> BlockMask:
    """The mask that `flexible` takes, on the device of its tensors; nothing waits for it.

    Args:
        blocks: of `block_lists`.
        boundaries: int32 `[sequences + 1]`, padded.
        spans: int32 `[S]`, -1 outside of spans.
    """
    length = len(spans)
    samples = torch.searchsorted(boundaries[1:], torch.arange(length, device=spans.device), right=True)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        within = (spans[query] == spans[key]) & (spans[query] >= 0)
        return (samples[query] == samples[key]) & ((key <= query) | within)

    partial, full = ((lists[None, None, :, 0], lists[None, None, :, 1:]) for lists in blocks)
    return BlockMask.from_kv_blocks(
        partial[0].contiguous(), partial[1].contiguous(), full[0].contiguous(), full[1].contiguous(),
        BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length),
    )  # fmt: skip


def block_lists(boundaries: Sequence[int], spans: Tensor) -> Tensor:
    """Which blocks of keys each block of queries sees in part, and which all of, int32 `[2, blocks, 1 + blocks]`.

    Each row is how many there are, and then which.

    Args:
        boundaries: padded, as numbers.
        spans: int `[S]` on the CPU, -1 outside of spans.

    Example:
        >>> block_lists([0, 256], torch.full((256,), -1)).tolist()
        [[[1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 0, 0]]]
    """
    length = boundaries[-1]
    count = -(-length // BLOCK)
    lists = torch.zeros(2, count, 1 + count, dtype=torch.int32)
    extents = _extents(spans)
    for block in range(count):
        first, last = block * BLOCK, min((block + 1) * BLOCK, length)
        seen: set[int] = set()
        whole: set[int] = set()
        for start, stop in pairwise(boundaries):
            low, high = max(first, start), min(last, stop)
            if low >= high:
                continue
            # Of one sample the keys are a run: those before the last query, and spans that queries lie in.
            reach = max([high, *(end for begin, end in extents if begin < high and end > low)])
            seen.update(range(start // BLOCK, -(-reach // BLOCK)))
            if (low, high) == (first, last):
                own = [(begin, end) for begin, end in extents if begin <= first and end >= last]
                whole.update(
                    key
                    for key in range(-(-start // BLOCK), min(stop, length) // BLOCK)
                    if (key + 1) * BLOCK <= first + 1
                    or any(begin <= key * BLOCK and (key + 1) * BLOCK <= end for begin, end in own)
                )
        for kind, found in enumerate((sorted(seen - whole), sorted(whole))):
            lists[kind, block, 0] = len(found)
            lists[kind, block, 1 : 1 + len(found)] = torch.tensor(found, dtype=torch.int32)
    return lists


def _extents(spans: Tensor) -> list[tuple[int, int]]:
    """First position and end of each span."""
    extents: dict[int, tuple[int, int]] = {}
    places = torch.nonzero(spans >= 0).flatten()
    for place, span in zip(places.tolist(), spans[places].tolist()):
        extents[span] = (extents.get(span, (place, 0))[0], place + 1)
    return list(extents.values())
