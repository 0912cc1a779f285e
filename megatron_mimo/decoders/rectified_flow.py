"""Rectified flow: the straight path between data and noise, solvers along it, and its decoder.

Liu et al., "Flow Straight and Fast", arXiv 2209.03003, with time running as in Esser et al.,
arXiv 2403.03206: `x_t = (1 - t) * clean + t * noise`, `velocity = dx/dt = noise - clean`, so
sampling starts from noise at `t = 1` and integrates down to `t = 0`.

Shapes: `N` rows, `n` items, `W` width of the rows, `M` targets, `D` width of a target.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_mimo.decoders.base import (
    Decoder,
    PositionRule,
    Targets,
    at_least_one,
    one_of,
    phase,
    usable,
    weighted_sum,
)
from megatron_mimo.decoders.guidance import ConditionDropout, guided
from megatron_mimo.decoders.tokenizers import Tokenizer, built
from megatron_mimo.draws import draws
from megatron_mimo.losses import LossTerm

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class RectifiedFlow:
    """How training draws time and noise. Decoder and input rule of a modality share one.

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
        if not self.logit_std > 0:
            raise ValueError(f"RectifiedFlow: logit_std must be positive, got {self.logit_std}")

    def add_draws(self, targets: Targets, items: int, stream: str) -> dict[str, Tensor]:
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


class RectifiedFlowDecoder(Decoder):
    """A decoder that learns the velocity from noise to its targets and samples by integrating it.

    Training predicts `noise - target` at `x_t = (1 - t) * target + t * noise`; the loss of a target
    is the squared error's mean over `D`. A subclass defines the network, `velocity`.

    Targets: `target` `[M, D]` floating, item by item; or, with a tokenizer, `media` `[n, ...]` from
    which `prepare` makes it. Optionally `weight` `[M]`; optionally the draws `time` `[n]`, `noise`
    `[M, D]`, `drop` bool `[n]`, which `prepare` adds otherwise.

    Args:
        width: `W`.
        target_width: `D`.
        rows_per_item: rows of an item, which share one time.
        targets_per_item: targets of an item, `M = n * targets_per_item`.
        flow: how time is drawn; share it with a `NoisedTargetInput`.
        condition_dropout: how often an item's rows are replaced by a learned null condition in
            training, for guidance in sampling.
        tokenizer: frozen codec, or its spec, that makes targets from media and media from samples.
        position_rule: see `Decoder`.
    """

    def __init__(
        self,
        *,
        width: int,
        target_width: int,
        rows_per_item: int,
        targets_per_item: int,
        flow: RectifiedFlow,
        condition_dropout: float,
        tokenizer: Tokenizer | ModuleSpec | None,
        position_rule: PositionRule,
    ) -> None:
        super().__init__(width=width, position_rule=position_rule, rows_per_item=rows_per_item)
        at_least_one(type(self).__name__, target_width=target_width, targets_per_item=targets_per_item)
        self.target_width = target_width
        self.targets_per_item = targets_per_item
        self.flow = flow
        self.condition_dropout = ConditionDropout(width, condition_dropout)
        self.tokenizer = None if tokenizer is None else built(tokenizer)

    @abstractmethod
    def velocity(self, rows: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The predicted velocity `[M, D]`.

        Args:
            rows: `[N, W]` conditions.
            x: `[M, D]` float32, a point between noise and target.
            time: float32, `[n]` or a scalar for all.
        """

    def num_rows(self, targets: Targets) -> int:
        """`rows_per_item` for every `targets_per_item` targets (or tokens of the media)."""
        if "media" in targets and self.tokenizer is not None:
            self.check_targets(targets, ("media",), ("weight", "time", "noise", "drop"))
            count = targets["media"].shape[0] * self.tokenizer.tokens_per_item
        else:
            self.check_targets(targets, ("target",), ("weight", "time", "noise", "drop"))
            count = self._check_target(targets["target"])
        if count % self.targets_per_item:
            raise ValueError(
                f"{type(self).__name__} got {count} targets, which is no whole number of items of "
                f"{self.targets_per_item}."
            )
        items = count // self.targets_per_item
        shapes = {"time": (items,), "drop": (items,), "noise": (count, self.target_width)}
        self.check_shapes(targets, weight=(count,), **shapes)
        return items * self.rows_per_item

    @property
    def rows_per_medium(self) -> int:
        """`rows_per_item` for every `targets_per_item` tokens of a medium, or one item's without a
        tokenizer."""
        if self.tokenizer is None:
            return self.rows_per_item
        items = self.tokenizer.tokens_per_item // self.targets_per_item
        return max(items, 1) * self.rows_per_item

    @property
    def sampled_rows(self) -> tuple[int, int] | None:
        """An item's targets; None where the tokenizer makes media of them."""
        return (self.targets_per_item, self.target_width) if self.tokenizer is None else None

    def loss_shape(self, targets: Targets) -> tuple[int]:
        """One loss a target."""
        return (self.num_rows(targets) // self.rows_per_item * self.targets_per_item,)

    def prepare(self, targets: Targets, stream: str = "") -> dict[str, Tensor]:
        """The targets with `target`, `time`, `noise` and, where conditions are dropped, `drop`."""
        items, stream = self.num_rows(targets) // self.rows_per_item, phase(self, stream)
        prepared = dict(targets)
        if "media" in prepared:
            prepared["target"] = self.tokenizer.encode(prepared.pop("media"))
        prepared = self.flow.add_draws(prepared, items, stream)
        drop = self.condition_dropout.draw(items, prepared["target"].device, stream)
        return prepared if drop is None else {"drop": drop, **prepared}

    def loss(self, rows: Tensor, targets: Targets) -> LossTerm:
        """Squared velocity error, its mean over `D`, summed over targets; and their weight."""
        self.check_rows(rows, expected=self.num_rows(targets))
        if rows.shape[0] == 0:
            return self.zero_loss(rows)
        self.check_targets(targets, ("target", "time", "noise"), ("weight", "drop"))
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

    def _check_target(self, target: Tensor) -> int:
        if target.ndim != 2 or target.shape[1] != self.target_width:
            raise ValueError(
                f"{type(self).__name__}'s target must be [M, {self.target_width}], got {list(target.shape)}"
            )
        return target.shape[0]
