"""A per-row rectified-flow head: a small network that denoises one row's target from its condition.

After Li et al., "Autoregressive Image Generation without Vector Quantization", arXiv 2406.11838,
section 3, with the rectified-flow objective in place of noise prediction.

Shapes: `N` rows, `n` items, `W` width of the rows, `D` width of the targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megatron_mimo.decoders.arguments import at_least_one
from megatron_mimo.decoders.base import PositionRule
from megatron_mimo.decoders.layers import (
    FeedForward,
    Modulation,
    Sharding,
    TimeEmbedding,
    modulated,
)
from megatron_mimo.decoders.path import RectifiedFlow, repeated
from megatron_mimo.decoders.rectified_flow import RectifiedFlowDecoder
from megatron_mimo.decoders.targets import FlowTargets
from megatron_mimo.decoders.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


class FlowDecoder(RectifiedFlowDecoder):
    """Generates a continuous vector per row, each from its own noise: patches, latents, frames.

    Objective, targets and sampling are those of `RectifiedFlowDecoder` with one target a row.

    Args:
        width: `W`.
        target_width: `D`.
        targets: describes the targets in place of `target_width`, `rows_per_item`, `flow` and `tokenizer`.
        hidden_width: width of the network; even.
        depth: number of residual blocks.
        flow: how time is drawn.
        condition_dropout: how often an item's rows are replaced by a learned null condition in
            training, for guidance in sampling.
        tokenizer: frozen codec, or its spec, that makes targets from media and media from samples.
        position_rule: see `Decoder`.
        rows_per_item: rows that share one time; None for 1, each row its own.
        config: the language model's config cuts the network's matrices over its tensor-parallel
            ranks; None keeps them whole on each, which spares a small head its collectives.
        pg_collection: process groups, of which a config makes use of `tp`; None for Megatron's.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> decoder = FlowDecoder(width=16, target_width=4, hidden_width=32, depth=2)
        >>> targets = decoder.prepare({"target": torch.zeros(6, 4)})
        >>> decoder.loss(torch.ones(6, 16), targets).count
        tensor(6.)
        >>> decoder.sample(torch.ones(6, 16), steps=2).shape
        torch.Size([6, 4])
    """

    def __init__(
        self,
        *,
        width: int,
        target_width: int | None = None,
        targets: FlowTargets | None = None,
        hidden_width: int = 1024,
        depth: int = 3,
        flow: RectifiedFlow | None = None,
        condition_dropout: float = 0.0,
        tokenizer: Tokenizer | ModuleSpec | None = None,
        position_rule: PositionRule = "own",
        rows_per_item: int | None = None,
        config: ModelParallelConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            width=width,
            targets=targets,
            target_width=target_width,
            rows_per_item=rows_per_item,
            flow=flow,
            tokenizer=tokenizer,
            condition_dropout=condition_dropout,
            position_rule=position_rule,
        )
        at_least_one("FlowDecoder", hidden_width=hidden_width, depth=depth)
        sharding = Sharding(config, pg_collection)
        self.noised_in = sharding.whole(self.target_width, hidden_width)
        self.condition_in = sharding.whole(width, hidden_width)
        self.time = TimeEmbedding(hidden_width, sharding)
        self.blocks = nn.ModuleList(_Block(hidden_width, sharding) for _ in range(depth))
        self.last_modulation = Modulation(hidden_width, 2, sharding)
        self.out = sharding.whole(hidden_width, self.target_width)
        nn.init.zeros_(self.out.weight)

    def velocity(self, rows: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The predicted velocity `[N, D]` at `x` `[N, D]` and `time` (scalar or `[n]`)."""
        dtype = self.noised_in.weight.dtype
        hidden = self.noised_in(x.to(dtype))
        time_embedding = repeated(self.time(time.reshape(-1)), rows.shape[0])
        condition = self.condition_in(rows.to(dtype)) + time_embedding
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.out(modulated(hidden, *self.last_modulation(condition)))


class _Block(nn.Module):
    """`x + gate * feed_forward(modulated(x))`, row by row."""

    def __init__(self, width: int, sharding: Sharding) -> None:
        super().__init__()
        self.modulation = Modulation(width, 3, sharding)
        self.feed_forward = FeedForward(width, width, sharding)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(condition)
        return x + gate * self.feed_forward(modulated(x, scale, shift))
