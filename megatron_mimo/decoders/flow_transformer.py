"""A per-span rectified-flow transformer: all patches of an image denoised together.

After Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748. The span's rows
are tokens before the noised ones, so that any number of rows conditions any number of patches; or each
row steers the norms of the one token it corresponds to.

Shapes: `N` rows, `n` items, `W` width of the rows, `T` tokens an item, `D` width of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mimo.decoders.arguments import at_least_one, one_of
from megatron_mimo.decoders.base import PositionRule
from megatron_mimo.decoders.layers import (
    FeedForward,
    Modulation,
    Sharding,
    TimeEmbedding,
    modulated,
)
from megatron_mimo.decoders.path import RectifiedFlow
from megatron_mimo.decoders.rectified_flow import RectifiedFlowDecoder
from megatron_mimo.decoders.targets import FlowTargets
from megatron_mimo.decoders.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


class FlowTransformerDecoder(RectifiedFlowDecoder):
    """Generates the `T` tokens of an item together, from noise, conditioned on its span's rows.

    Objective, targets and sampling are those of `RectifiedFlowDecoder` with `T` targets an item.

    Args:
        width: `W`.
        target_width: `D`.
        targets_per_item: `T`.
        rows_per_item: rows of a span, which need not be `T`.
        targets: describes the targets in place of `target_width`, `targets_per_item`, `rows_per_item`, `flow` and
            `tokenizer`.
        hidden_width: width of the transformer; even, and a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads; with a config, a multiple of the tensor-parallel size.
        condition: `"prefix"` puts the rows as tokens before the noised ones. `"own"` steers each token
            by its own row instead, for rows and targets that correspond one to one: fewer tokens, and
            learned sooner (the digits demo dials 99 % of its tones after 800 steps, against 53 %).
        flow: how time is drawn.
        condition_dropout: how often an item's rows are replaced by a learned null condition in
            training, for guidance in sampling.
        tokenizer: frozen codec, or its spec, that makes targets from media and media from samples.
        position_rule: see `Decoder`.
        config: the language model's config cuts the transformer's matrices over its tensor-parallel
            ranks; None keeps them whole on each.
        pg_collection: process groups, of which a config makes use of `tp`; None for Megatron's.

    Raises:
        ValueError: an argument is out of range, the heads cannot be shared out, or rows that do not
            correspond to targets one to one are to steer them.

    Example:
        >>> decoder = FlowTransformerDecoder(width=16, target_width=4, targets_per_item=9,
        ...     rows_per_item=2, hidden_width=32, depth=1, heads=2)
        >>> targets = decoder.prepare({"target": torch.zeros(3 * 9, 4)})
        >>> decoder.loss(torch.ones(3 * 2, 16), targets).count
        tensor(27.)
        >>> decoder.sample(torch.ones(3 * 2, 16), steps=2).shape
        torch.Size([27, 4])
    """

    def __init__(
        self,
        *,
        width: int,
        target_width: int | None = None,
        targets_per_item: int | None = None,
        rows_per_item: int | None = None,
        targets: FlowTargets | None = None,
        hidden_width: int = 768,
        depth: int = 12,
        heads: int = 12,
        condition: Literal["prefix", "own"] = "prefix",
        flow: RectifiedFlow | None = None,
        condition_dropout: float = 0.0,
        tokenizer: Tokenizer | ModuleSpec | None = None,
        position_rule: PositionRule = "own",
        config: ModelParallelConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            width=width,
            targets=targets,
            target_width=target_width,
            rows_per_item=rows_per_item,
            targets_per_item=targets_per_item,
            flow=flow,
            tokenizer=tokenizer,
            condition_dropout=condition_dropout,
            position_rule=position_rule,
        )
        rows_per_item, targets_per_item = self.rows_per_item, self.targets_per_item
        at_least_one("FlowTransformerDecoder", hidden_width=hidden_width, depth=depth, heads=heads)
        one_of("FlowTransformerDecoder", "condition", condition, ("prefix", "own"))
        if condition == "own" and rows_per_item != targets_per_item:
            raise ValueError(
                f"FlowTransformerDecoder: condition='own' steers each of {targets_per_item} targets by "
                f"its own row, but an item has {rows_per_item} rows. Make rows_per_item equal, or take "
                "condition='prefix'."
            )
        self.condition = condition
        sharding = Sharding(config, pg_collection)
        self.condition_in = sharding.whole(width, hidden_width)
        self.noised_in = sharding.whole(self.target_width, hidden_width)
        prefix = rows_per_item if condition == "prefix" else 0
        places = torch.empty(prefix + targets_per_item, hidden_width)
        places = nn.init.normal_(places, std=0.02)  # small beside the tokens they are added to
        self.places = nn.Parameter(places.to(self.condition_in.weight.dtype))
        self.time = TimeEmbedding(hidden_width, sharding)
        self.blocks = nn.ModuleList(_Block(hidden_width, heads, sharding) for _ in range(depth))
        self.last_modulation = Modulation(hidden_width, 2, sharding)
        self.out = sharding.whole(hidden_width, self.target_width)
        nn.init.zeros_(self.out.weight)

    def velocity(self, rows: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The predicted velocity `[n * T, D]` at `x` `[n * T, D]` and `time` (scalar or `[n]`)."""
        dtype = self.noised_in.weight.dtype
        conditions = self.condition_in(rows.to(dtype)).unflatten(0, (-1, self.rows_per_item))
        patches = self.noised_in(x.to(dtype)).unflatten(0, (-1, self.targets_per_item))
        steer = self.time(time.reshape(-1, 1))
        if self.condition == "own":
            hidden, steer = patches + self.places, steer + conditions
        else:
            hidden = torch.cat([conditions, patches], dim=1) + self.places
            # One vector an item steers the norms: its time, and the gist of its condition.
            steer = steer + conditions.mean(dim=1, keepdim=True)
        for block in self.blocks:
            hidden = block(hidden, steer)
        patches = hidden[:, -self.targets_per_item :]
        return self.out(modulated(patches, *self.last_modulation(steer))).flatten(0, 1)


class _Block(nn.Module):
    """Attention over an item's tokens, then a feed-forward layer, each gated by the condition."""

    def __init__(self, width: int, heads: int, sharding: Sharding) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6, sharding)
        self.attention = _Attention(width, heads, sharding)
        self.feed_forward = FeedForward(width, 4 * width, sharding)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = self.modulation(condition)
        x = x + gate_a * self.attention(modulated(x, scale_a, shift_a))
        return x + gate_f * self.feed_forward(modulated(x, scale_f, shift_f))


class _Attention(nn.Module):
    """Full self-attention, its heads cut over tensor-parallel ranks."""

    def __init__(self, width: int, heads: int, sharding: Sharding) -> None:
        super().__init__()
        if width % heads or heads % sharding.size:
            raise ValueError(
                f"{heads} attention heads must divide the width {width} and be a multiple of the "
                f"tensor-parallel size {sharding.size}"
            )
        self.heads = heads // sharding.size
        # Output features are ordered (head, query | key | value), so a contiguous shard is whole heads.
        self.queries_keys_values = sharding.column(width, 3 * width)
        self.out = sharding.row(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, tokens, width] -> [n, tokens, width]`."""
        heads = self.queries_keys_values(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(-2))
