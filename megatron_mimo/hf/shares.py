"""Tensor-parallel sizes that share a transformer's layers out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LARGEST = 64


def tensor_sizes(heads: int, groups: int, width: int) -> list[int]:
    """The sizes up to 64 that ranks can share layers in.

    Args:
        heads: of attention, which each rank has as many of.
        groups: of keys and values; ranks have some each, or as many ranks have one together.
        width: of the feed-forward layer.

    Example:
        >>> tensor_sizes(12, 2, 8960)
        [1, 2, 4]
    """
    return [size for size in range(1, _LARGEST + 1) if _shares(size, heads, groups, width)]


def check_tensor_size(size: int, whose: str, settings: Mapping[str, Any]) -> None:
    """Refuses a tensor-parallel size that does not share layers out.

    Args:
        size: of the layout.
        whose: layers they are, for the message.
        settings: of Megatron's `TransformerConfig`.

    Raises:
        ValueError: naming the sizes that do.
    """
    heads, width = settings["num_attention_heads"], settings["ffn_hidden_size"]
    groups = settings.get("num_query_groups") or heads
    if not _shares(size, heads, groups, width):
        raise ValueError(
            f"tensor_model_parallel_size {size}: expected one of {tensor_sizes(heads, groups, width)}, which share out "
            f"{whose}: {heads} heads, {groups} groups of keys, a feed-forward layer of {width}. Lower it to one."
        )


def _shares(size: int, heads: int, groups: int, width: int) -> bool:
    return heads % size == 0 and width % size == 0 and (groups % size == 0 or size % groups == 0)
