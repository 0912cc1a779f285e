"""Continuous regression of one vector per row: patches, features, or a condition embedding.

Shapes: `N` rows, `W` width of the rows, `D` width of the targets.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mimo.decoders.base import (
    Decoder,
    PositionRule,
    Targets,
    at_least_one,
    one_of,
    usable,
    weighted_sum,
)
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
        hidden_width: int | None = None,
        objective: Literal["mse", "l1", "huber", "cosine"] = "mse",
        huber_delta: float = 1.0,
        position_rule: PositionRule = "own",
    ) -> None:
        super().__init__(width=width, position_rule=position_rule)
        one_of("RegressionDecoder", "objective", objective, OBJECTIVES)
        if not huber_delta > 0:
            raise ValueError(f"RegressionDecoder: huber_delta must be positive, got {huber_delta}")
        self.target_width = width if target_width is None else target_width
        self.objective = objective
        self.huber_delta = huber_delta
        self.network = _network(width, hidden_width, target_width)

    @property
    def sampled_rows(self) -> tuple[int, int]:
        """One prediction a row."""
        return 1, self.target_width

    def num_rows(self, targets: Targets) -> int:
        """The number of targets, one a row."""
        self.check_targets(targets, ("target",), ("weight",))
        target = targets["target"]
        if target.ndim != 2 or target.shape[1] != self.target_width:
            raise ValueError(f"RegressionDecoder's target must be [N, {self.target_width}], got {list(target.shape)}")
        self.check_shapes(targets, weight=(target.shape[0],))
        return target.shape[0]

    def loss(self, rows: Tensor, targets: Targets) -> LossTerm:
        """The objective summed over rows, and the rows' weight."""
        self.check_rows(rows, expected=self.num_rows(targets))
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
