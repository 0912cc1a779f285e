"""Continuous regression of one vector per row: patches, features, or a condition embedding.

Shapes: `N` rows, `W` width of the rows, `D` width of the targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mimo.decoders.arguments import at_least_one, finite, not_both, one_of
from megatron_mimo.decoders.base import Decoder, PositionRule, usable, weighted_sum
from megatron_mimo.decoders.targets import Targets, VectorTargets
from megatron_mimo.losses import LossTerm

OBJECTIVES = ("mse", "l1", "huber", "cosine")


class RegressionDecoder(Decoder):
    """Predicts a target vector per row; its sample is the prediction, the same every time.

    Use it where one right answer follows from the row (a condition embedding for a diffusion model
    outside, features, a spectrum). Where many are right it predicts their mean: use a flow instead.

    Targets: `target` `[N, D]` floating; optionally `weight` `[N]`.

    Args:
        width: `W`.
        target_width: `D`; None takes the rows themselves as the prediction (`D = W`), for an output
            projection that already ends at the target's width.
        targets: describes the targets in place of `target_width`, which it needs then.
        hidden_width: width of a hidden layer with GELU; None for a linear map.
        objective: loss of a row: `"mse"`, `"l1"` and `"huber"` averaged over `D`, or `"cosine"`,
            `1 - cos(prediction, target)`.
        huber_delta: where Huber's loss turns from square to straight.
        position_rule: see `Decoder`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> decoder = RegressionDecoder(width=16, target_width=4)
        >>> decoder.loss(torch.ones(6, 16), {"target": torch.zeros(6, 4)}).count
        tensor(6.)
        >>> decoder.sample(torch.ones(6, 16)).shape
        torch.Size([6, 4])
    """

    def __init__(
        self,
        *,
        width: int,
        target_width: int | None = None,
        targets: VectorTargets | None = None,
        hidden_width: int | None = None,
        objective: Literal["mse", "l1", "huber", "cosine"] = "mse",
        huber_delta: float = 1.0,
        position_rule: PositionRule = "own",
    ) -> None:
        at_least_one("RegressionDecoder", width=width)
        if targets is not None:
            not_both("RegressionDecoder", target_width=target_width)
            target_width = targets.width
        described = targets or VectorTargets(width if target_width is None else target_width)
        super().__init__(width=width, position_rule=position_rule, targets=described)
        one_of("RegressionDecoder", "objective", objective, OBJECTIVES)
        finite("RegressionDecoder", huber_delta=huber_delta)
        if not huber_delta > 0:
            raise ValueError(f"RegressionDecoder: huber_delta must be positive, got {huber_delta}")
        self.target_width = described.width
        self.objective = objective
        self.huber_delta = huber_delta
        self.network = _network(width, hidden_width, target_width)

    @classmethod
    def describe(cls, params: Mapping[str, Any]) -> VectorTargets | None:
        """Vectors of `target_width`, or of the rows' `width`."""
        width = params.get("target_width") or params.get("width")
        return params.get("targets") or (None if width is None else VectorTargets(width))

    def loss(self, rows: Tensor, targets: Targets) -> LossTerm:
        """The objective summed over rows, and the rows' weight."""
        targets = self.prepared(targets)
        self.check_rows(rows, expected=targets.num_rows)
        if rows.shape[0] == 0:
            return self.zero_loss(rows)
        target, weight = targets["target"].float(), targets.get("weight")
        return weighted_sum(self._errors(self.sample(rows), usable(target, weight)), weight)

    def sample(self, rows: Tensor) -> Tensor:
        """The prediction `[N, D]`, float32, for rows `[N, W]`."""
        self.check_rows(rows)
        return _in_dtype_of(self.network, rows).float()

    def _errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The loss of each row, `[N]`."""
        match self.objective:
            case "mse":
                return (predicted - target).square().mean(dim=-1)
            case "l1":
                return (predicted - target).abs().mean(dim=-1)
            case "huber":
                losses = F.huber_loss(predicted, target, reduction="none", delta=self.huber_delta)
                return losses.mean(dim=-1)
            case "cosine":
                return 1 - F.cosine_similarity(predicted, target, dim=-1)


def _network(width: int, hidden_width: int | None, target_width: int | None) -> nn.Module:
    if target_width is None:
        if hidden_width is not None:
            raise ValueError(f"RegressionDecoder: hidden_width {hidden_width} needs a target_width to go on to")
        return nn.Identity()
    at_least_one("RegressionDecoder", target_width=target_width)
    if hidden_width is None:
        return nn.Linear(width, target_width)
    at_least_one("RegressionDecoder", hidden_width=hidden_width)
    return nn.Sequential(nn.Linear(width, hidden_width), nn.GELU(), nn.Linear(hidden_width, target_width))


def _in_dtype_of(network: nn.Module, rows: Tensor) -> Tensor:
    weight = next(network.parameters(), rows)
    return network(rows.to(weight.dtype))
