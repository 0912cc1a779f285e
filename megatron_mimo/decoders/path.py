"""Rectified flow: the straight path between data and noise, its draws, points on it, and solvers along it.

Liu et al., "Flow Straight and Fast", arXiv 2209.03003, with time running as in Esser et al.,
arXiv 2403.03206: `x_t = (1 - t) * clean + t * noise`, `velocity = dx/dt = noise - clean`, so
sampling starts from noise at `t = 1` and integrates down to `t = 0`.

Shapes: `N` elements, `n` items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_mimo.decoders.arguments import at_least_one, finite, one_of
from megatron_mimo.draws import draws


@dataclass(frozen=True)
class RectifiedFlow:
    """How training draws time and noise.

    Args:
        time: `"uniform"` over [0, 1], or `"logit-normal"`, `sigmoid(z)` with
            `z ~ Normal(logit_mean, logit_std)`, which spends more draws on the middle of the path
            (arXiv 2403.03206, section 3.1).
        logit_mean, logit_std: of the logit-normal.

    Raises:
        ValueError: an unknown `time` or a standard deviation that is not positive.

    Example:
        >>> flow = RectifiedFlow(time="logit-normal")
        >>> targets = flow.add_draws({"target": torch.zeros(6, 4)}, items=3, stream="images/pixels")
        >>> targets["time"].shape, targets["noise"].shape
        (torch.Size([3]), torch.Size([6, 4]))
    """

    time: Literal["uniform", "logit-normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        one_of("RectifiedFlow", "time", self.time, ("uniform", "logit-normal"))
        finite("RectifiedFlow", logit_mean=self.logit_mean, logit_std=self.logit_std)
        if not self.logit_std > 0:
            raise ValueError(f"RectifiedFlow: logit_std must be positive, got {self.logit_std}")

    def add_draws(self, targets: Mapping[str, Tensor], items: int, stream: str) -> dict[str, Tensor]:
        """The targets with `time` `[items]` and `noise` for `target`, unless they hold them.

        Args:
            targets: hold `target` `[N, ...]`. Left unchanged.
            items: how many times to draw, one for each run of `N / items` leading elements.
            stream: prefix of the random stream.

        Returns:
            A new mapping; what was drawn is float32, on the device of `target`.
        """
        targets = dict(targets)
        clean = targets["target"]
        if "time" not in targets:
            with draws(f"{stream}/time"):
                targets["time"] = self._time(items, clean.device)
        if "noise" not in targets:
            with draws(f"{stream}/noise"):
                targets["noise"] = torch.randn(clean.shape, device=clean.device)
        return targets

    def _time(self, items: int, device: torch.device) -> Tensor:
        if self.time == "uniform":
            return torch.rand(items, device=device)
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(items, device=device))


def noised(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """`x_t = (1 - t) * clean + t * noise`, float32.

    Args:
        clean, noise: `[N, ...]`, rank-local.
        time: `[n]` in [0, 1], one for each run of `N / n` leading elements.
    """
    time = repeated(time, clean.shape[0]).reshape(-1, *(1,) * (clean.ndim - 1))
    return (1 - time) * clean.float() + time * noise.float()


def repeated(values: Tensor, rows: int) -> Tensor:
    """Values `[n, ...]`, one for each run of `rows / n` rows, as `[rows, ...]`.

    Example:
        >>> repeated(torch.tensor([1.0, 2.0]), rows=4)
        tensor([1., 1., 2., 2.])
    """
    run = rows // max(values.shape[0], 1)
    return values[:, None].expand(-1, run, *values.shape[1:]).flatten(0, 1)


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    steps: int,
    solver: Literal["euler", "heun"] = "euler",
    shift: float = 1.0,
) -> Tensor:
    """The sample at `t = 0` that the velocity field carries `noise` at `t = 1` to.

    Args:
        velocity: `(x, time) -> dx/dt`; `x` shaped like `noise`, `time` a float32 scalar tensor.
        noise: `[N, ...]`, float32, rank-local.
        steps: number of steps, of equal length where `shift` is 1. Heun evaluates the field twice
            a step and errs by the square of the step's length, Euler by the length.
        shift: `t -> shift * t / (1 + (shift - 1) * t)` applied to the steps' ends; above 1 it
            spends more steps near the noise, as larger images need (arXiv 2403.03206, eq. 23).

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> integrate(lambda x, t: torch.ones_like(x), torch.ones(3), steps=4)
        tensor([0., 0., 0.])
    """
    at_least_one("integrate", steps=steps)
    one_of("integrate", "solver", solver, ("euler", "heun"))
    finite("integrate", shift=shift)
    if not shift > 0:
        raise ValueError(f"integrate: shift must be positive, got {shift}")
    ends = torch.linspace(1, 0, steps + 1, device=noise.device)
    ends = shift * ends / (1 + (shift - 1) * ends)
    x = noise.float()
    for step in range(steps):
        here, there = ends[step], ends[step + 1]
        slope = velocity(x, here)
        ahead = x + (there - here) * slope
        if solver == "heun":
            ahead = x + (there - here) * (slope + velocity(ahead, there)) / 2
        x = ahead
    return x
