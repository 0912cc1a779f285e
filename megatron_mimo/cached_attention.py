"""Core attention over a static cache of rotated keys: each sample has its own length, nothing is rotated twice.

A `CachedAttention` takes the place of a layer's core attention while a model generates (`generation.borrow`). Layers
give it keys that are rotated already, and no inference context; it keeps them in its cache and attends to what the
`Step` in progress says that each row sees.

Shapes: `B` rows of the cache that take part in a step, `n` new positions of each, `L` slots of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn import functional as F

#: Slots of a cache and of what a step reads of it are whole numbers of these: memory-efficient attention wants masks
#: whose rows start at multiples of 16 bytes, and fewer lengths mean fewer graphs.
BUCKET = 64


@dataclass(eq=False)
class Step:
    """One pass over positions that join the cache, the same for all layers.

    Attributes:
        slots: int64 `[B, n]`, the slot that each new position is kept in.
        sees: int64 `[B, n]`, the last slot that it sees: its own, or the end of a span that sees the whole of itself.
        positions: int64 `[B, n]`, for rotary embeddings.
        reach: how many slots attention reads, more than any of `sees`. A number of the host's.
        rows: int64 `[B]`, which rows of the cache these are; None for all of them in order.
        fresh: nothing was kept before, slots count from 0, and every position sees those up to its own: attention
            then needs neither the cache nor a mask.
    """

    slots: Tensor
    sees: Tensor
    positions: Tensor
    reach: int
    rows: Tensor | None = None
    fresh: bool = False
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict, repr=False)

    def mask(self, window: int | None, heads: int) -> Tensor:
        """Bool `[B, 1, heads * n or 1, reach]`, True where a position is seen, made once for all layers.

        Args:
            window: how far back a position sees; None for all of it.
            heads: query heads of a group, whose rows come one below the other.
        """
        key = (window, heads)
        if key not in self._masks:
            places = torch.arange(self.reach, device=self.slots.device)
            seen = places <= self.sees[:, :, None]
            if window is not None:
                seen &= places >= torch.minimum(self.slots, self.sees)[:, :, None] - window
            if self.slots.shape[1] > 1:
                seen = seen.repeat(1, heads, 1)
            self._masks[key] = seen[:, None]
        return self._masks[key]


class Turn:
    """Which step is in progress. All cached layers of a model look here.

    Attributes:
        step: set before the model runs.
    """

    step: Step | None = None


class CachedAttention(nn.Module):
    """A layer's core attention over what it has kept so far; forward passes alone, without dropout.

    Args:
        attention: the layer's attention, whose `core_attention` this stands in for. Nothing of it is changed.
        turn: where the step in progress is found.
        rows: of the cache.
        slots: of each row, a multiple of `BUCKET`.

    Attributes:
        key, value: `[rows, groups, slots, D]`, rank-local along groups; None until the first step.
    """

    key: Tensor | None
    value: Tensor | None

    def __init__(self, attention: Attention, turn: Turn, rows: int, slots: int) -> None:
        super().__init__()
        config = attention.config
        self._turn, self._rows, self._slots = turn, rows, slots
        self._scale = config.softmax_scale  # None: the root of D, for which layer scaling changes nothing
        self.window = window_of(attention)
        self.key = self.value = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """What attention gives for new positions, `[n, B, heads * D]`; they are kept before.

        Args:
            query: `[n, B, heads, D]`, rotated, rank-local; key and value `[n, B, groups, D]`.
            attention_mask, attn_mask_type, attention_bias, packed_seq_params: not looked at; the step says what is
                seen.
        """
        step = self._turn.step
        assert step is not None, "a cached layer runs within a step"
        self._keep(key, value, step)
        length, batch, heads, width = query.shape
        groups = key.shape[2]
        if step.fresh and self.window is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self._scale, enable_gqa=heads != groups
            )
            return mixed.permute(2, 0, 1, 3).flatten(2)
        kept = [x if step.rows is None else x.index_select(0, step.rows) for x in self.held()]
        k, v = (x[:, :, : step.reach] for x in kept)
        # A group's heads become rows: neither flash nor memory-efficient attention takes a mask and unequal heads.
        each = heads // groups
        q = query.permute(1, 2, 0, 3).reshape(batch, groups, each * length, width)
        mask = step.mask(self.window, each).expand(batch, 1, -1, -1)
        if mask.shape[2] != q.shape[2]:
            mask = mask.expand(-1, -1, q.shape[2], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
        return mixed.reshape(batch, heads, length, width).permute(2, 0, 1, 3).flatten(2)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[rows, groups, slots, D]` of a cache that was written to."""
        assert self.key is not None and self.value is not None, "nothing is kept yet"
        return self.key, self.value

    def _keep(self, key: Tensor, value: Tensor, step: Step) -> None:
        if self.key is None:
            shape = (self._rows, key.shape[2], self._slots, key.shape[3])
            self.key, self.value = key.new_zeros(shape), value.new_zeros(*shape[:3], value.shape[3])
        keys, values = self.held()
        rows = torch.arange(self._rows, device=key.device) if step.rows is None else step.rows
        keys[rows[:, None], :, step.slots] = key.transpose(0, 1)
        values[rows[:, None], :, step.slots] = value.transpose(0, 1)


def window_of(attention: Attention) -> int | None:
    """How many positions before its own a causal layer sees; None for all.

    Raises:
        ValueError: a window that reaches ahead.
    """
    config = attention.config
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, attention.layer_number):
        return None
    back, ahead = config.window_size
    if ahead > 0:
        raise ValueError(
            f"generation: expected a window that does not reach ahead, found window_size={config.window_size}. A "
            "position that is not written yet cannot be seen."
        )
    return None if back < 0 else back


def cache_bytes(attentions: Sequence[Attention], rows: int, slots: int) -> int:
    """What the caches of these layers take on this rank, in bytes, before any of it is there."""
    total = 0
    for attention in attentions:
        width = attention.hidden_size_per_attention_head
        size = next(attention.parameters()).element_size()
        total += 2 * rows * attention.num_query_groups_per_partition * slots * width * size
    return total


def bucketed(length: int) -> int:
    """The least multiple of `BUCKET` that is at least `length`.

    Example:
        >>> bucketed(1), bucketed(64), bucketed(65)
        (64, 64, 128)
    """
    return -(-length // BUCKET) * BUCKET
