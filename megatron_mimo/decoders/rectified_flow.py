"""The decoder of a rectified flow: it learns the velocity from noise to its targets, and integrates it.

Shapes: `N` rows, `n` items, `W` width of the rows, `M` targets, `D` width of a target.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megatron_mimo.decoders.arguments import finite, not_both
from megatron_mimo.decoders.base import Decoder, PositionRule, phase, usable, weighted_sum
from megatron_mimo.decoders.guidance import ConditionDropout, guided
from megatron_mimo.decoders.path import RectifiedFlow, integrate, noised, repeated
from megatron_mimo.decoders.targets import FlowTargets, Prepared, Targets
from megatron_mimo.decoders.tokenizers import Tokenizer
from megatron_mimo.losses import LossTerm

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

__all__ = ["RectifiedFlow", "RectifiedFlowDecoder", "integrate", "noised", "repeated"]


class RectifiedFlowDecoder(Decoder):
    """A decoder that learns the velocity from noise to its targets and samples by integrating it.

    Training predicts `noise - target` at `x_t = (1 - t) * target + t * noise`; the loss of a target
    is the squared error's mean over `D`. A subclass defines the network, `velocity`.

    Targets: `target` `[M, D]` floating, item by item; or, with a tokenizer, `media` `[n, ...]` from
    which `prepare` makes it. Optionally `weight` `[M]`; optionally the draws `time` `[n]`, `noise`
    `[M, D]`, `drop` bool `[n]`, which `prepare` adds otherwise.

    Args:
        width: `W`.
        targets: describes the targets; None for what the next five say.
        target_width: `D`.
        rows_per_item: rows of an item, which share one time; None for 1.
        targets_per_item: targets of an item, `M = n * targets_per_item`; None for as many as rows.
        flow: how time is drawn; None for uniform.
        tokenizer: frozen codec, or its spec, that makes targets from media and media from samples.
        condition_dropout: how often an item's rows are replaced by a learned null condition in
            training, for guidance in sampling.
        position_rule: see `Decoder`.

    Raises:
        ValueError: a description and one of the five beside it, or neither.
    """

    def __init__(
        self,
        *,
        width: int,
        targets: FlowTargets | None = None,
        target_width: int | None = None,
        rows_per_item: int | None = None,
        targets_per_item: int | None = None,
        flow: RectifiedFlow | None = None,
        tokenizer: Tokenizer | ModuleSpec | None = None,
        condition_dropout: float = 0.0,
        position_rule: PositionRule = "own",
    ) -> None:
        named: dict[str, Any] = dict(target_width=target_width, rows_per_item=rows_per_item, flow=flow)
        named |= dict(targets_per_item=targets_per_item, tokenizer=tokenizer)
        if targets is not None:
            not_both(type(self).__name__, **named)
        else:
            targets = self.describe(named)
        if targets is None:
            raise ValueError(f"{type(self).__name__}: expected target_width or a description as `targets`")
        super().__init__(width=width, position_rule=position_rule, targets=targets)
        self.target_width = targets.width
        self.targets_per_item = targets.targets_per_item
        self.condition_dropout = ConditionDropout(width, condition_dropout)

    @classmethod
    def describe(cls, params: Mapping[str, Any]) -> FlowTargets | None:
        """Vectors of `target_width`, `targets_per_item` for `rows_per_item` rows, by the `flow`."""
        if params.get("target_width") is None:
            return params.get("targets")
        rows, each = params.get("rows_per_item"), params.get("targets_per_item")
        rows = 1 if rows is None else rows
        return FlowTargets(
            params["target_width"],
            params.get("tokenizer"),
            RectifiedFlow() if params.get("flow") is None else params["flow"],
            rows,
            rows if each is None else each,
        )

    @abstractmethod
    def velocity(self, rows: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The predicted velocity `[M, D]`.

        Args:
            rows: `[N, W]` conditions.
            x: `[M, D]` float32, a point between noise and target.
            time: float32, `[n]` or a scalar for all.
        """

    def prepare(self, targets: Targets, stream: str = "") -> Prepared:
        """The targets with `target`, `time`, `noise` and, where conditions are dropped, `drop`."""
        prepared, stream = super().prepare(targets, stream), phase(self, stream)
        return self.condition_dropout.drawn(prepared, prepared["target"].device, stream)

    def loss(self, rows: Tensor, targets: Targets) -> LossTerm:
        """Squared velocity error, its mean over `D`, summed over targets; and their weight."""
        targets = self.prepared(targets)
        self.check_rows(rows, expected=targets.num_rows)
        if rows.shape[0] == 0:
            return self.zero_loss(rows)
        clean = usable(targets["target"], targets.get("weight"))
        noise, time = targets["noise"], targets["time"]
        condition = self.condition_dropout(rows, targets.get("drop"))
        predicted = self.velocity(condition, noised(clean, noise, time), time)
        error = (predicted.float() - (noise.float() - clean.float())).square().mean(dim=-1)
        return weighted_sum(error, targets.get("weight"))

    @torch.no_grad()
    def sample(
        self,
        rows: Tensor,
        *,
        steps: int = 25,
        solver: Literal["euler", "heun"] = "euler",
        shift: float = 1.0,
        guidance: float = 1.0,
        unconditional_rows: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Targets `[M, D]`, float32, drawn for rows `[N, W]`.

        Args:
            rows: conditions, item by item.
            steps, solver, shift: of the integration, see `integrate`.
            guidance: scale of classifier-free guidance, 1 is off.
            unconditional_rows: `[N, W]` to contrast `rows` with; None takes the null condition
                learned with `condition_dropout`.
            noise: `[M, D]` to start from; None draws it from `generator`, or torch's default.
            generator: on the rows' device.
        """
        self.check_rows(rows)
        finite(type(self).__name__, guidance=guidance)
        shape = (rows.shape[0] // self.rows_per_item * self.targets_per_item, self.target_width)
        if noise is None:
            noise = torch.randn(shape, device=rows.device, generator=generator)
        self.check_noise(noise, shape)
        field = partial(self.velocity, rows)
        if guidance != 1:
            null = self.condition_dropout.unconditional(rows, unconditional_rows)
            field = partial(self._guided_velocity, rows, null, guidance)
        return integrate(field, noise, steps=steps, solver=solver, shift=shift)

    def render(self, samples: Tensor) -> Tensor:
        """Media of samples if there is a tokenizer, else the samples."""
        return samples if self.tokenizer is None else self.tokenizer.decode(samples)

    def _guided_velocity(self, rows: Tensor, null: Tensor, guidance: float, x: Tensor, time: Tensor) -> Tensor:
        return guided(self.velocity(rows, x, time), self.velocity(null, x, time), guidance)
