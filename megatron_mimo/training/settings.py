"""What a `Trainer` is told, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class EarlyStopping:
    """A run ends where its evaluations get no better.

    Args:
        patience: evaluations in a row without a new best after which it ends.
        term: whose mean counts, `"loss"` for the weighted sum.
        least: by how much a value must be lower to be a new best.

    Raises:
        TypeError: a patience that is no whole number.
        ValueError: one below 1, or a `least` that is negative or not finite.

    Example:
        >>> EarlyStopping(patience=3)
        EarlyStopping(patience=3, term='loss', least=0.0)
    """

    patience: int
    term: str = "loss"
    least: float = 0.0

    def __post_init__(self) -> None:
        check_whole("EarlyStopping: patience", self.patience, least=1)
        if not 0 <= self.least < float("inf"):
            raise ValueError(f"EarlyStopping: least must be finite and at least 0, got {self.least}")


@dataclass(frozen=True)
class TrainerSettings:
    """How long and how often.

    Args:
        steps: of the whole run; the learning rate's schedule ends there.
        warmup_steps: over which the learning rate rises from 0.
        decay: its course afterwards, down to the optimizer's `min_lr`.
        seed: of the decoders' draws.
        evaluate_every: steps between evaluations, of which there is one after the last step too; None
            leaves that one alone.
        evaluation_steps: steps of data that an evaluation takes.
        save_every: steps between checkpoints; the end and a SIGTERM save one in any case.
        directory: of the checkpoints, a path or a string; None saves none.
        progress: show a progress bar on the last rank.
        stop_grace_s: seconds that a step may go on after a SIGTERM; then the process ends and says where it was. None
            for ten times the slowest step so far, and at least 10.
        ema_decay: of an exponential moving average of the weights that train, float32, beside them (`Ema`); None for
            none. With `overlap_param_gather` weights are gathered after each step, which then overlaps nothing.
        part_norms: report the gradient norm of each part too; it takes a pass over the gradients and a wait a step.
        stall_s: seconds without the end of a step after which the log says which rank holds the run up (`Watch`). None
            for ten times the slowest step so far, and at least 60.
        early_stopping: ends the run where its evaluations get no better; None never does.

    Raises:
        TypeError: a number of steps, or the seed, is no whole number; the grace is no number.
        ValueError: a number out of its range, or options that contradict each other.
    """

    steps: int
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    seed: int = 1234
    evaluate_every: int | None = None
    evaluation_steps: int = 1
    save_every: int | None = None
    directory: Path | str | None = None
    progress: bool = True
    stop_grace_s: float | None = None
    early_stopping: EarlyStopping | None = None
    part_norms: bool = False
    ema_decay: float | None = None
    stall_s: float | None = None

    def __post_init__(self) -> None:
        if self.directory is not None:
            object.__setattr__(self, "directory", Path(self.directory))
        if self.decay not in DECAYS:
            raise ValueError(f"TrainerSettings: decay must be one of {list(DECAYS)}, got {self.decay!r}")
        for name in ("steps", "evaluate_every", "evaluation_steps", "save_every"):
            value = getattr(self, name)
            if value is not None or name in ("steps", "evaluation_steps"):
                check_whole(f"TrainerSettings: {name}", value, least=1)
        check_whole("TrainerSettings: warmup_steps", self.warmup_steps)
        check_whole("TrainerSettings: seed", self.seed)
        for name in ("stop_grace_s", "stall_s"):
            seconds = getattr(self, name)
            if not isinstance(seconds, Real | None):
                raise TypeError(f"TrainerSettings: {name} must be a number of seconds, got {seconds!r}")
            if seconds is not None and not 0 < float(seconds) < float("inf"):
                raise ValueError(f"TrainerSettings: {name} must be finite and above 0, got {seconds}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"TrainerSettings: warmup_steps must lie in [0, steps = {self.steps}), got {self.warmup_steps}"
            )
        if self.ema_decay is not None:
            check_decay("TrainerSettings: ema_decay", self.ema_decay)
        if self.early_stopping is not None and self.evaluate_every is None:
            raise ValueError("TrainerSettings: early_stopping compares evaluations and needs evaluate_every")
        if self.save_every is not None and self.directory is None:
            raise ValueError(f"TrainerSettings: save_every {self.save_every} needs a directory to save to")


@dataclass(frozen=True)
class StepReport:
    """What one step did; equal on all ranks.

    Args:
        step: its index, from 0.
        losses: term -> mean over the whole batch, and `"loss"`, the weighted sum. Terms that the
            batch counted nothing of are left out. With a blend of sources also `"text of SOURCE"`, the language loss
            of each, not part of `"loss"`. Of a model with experts also its auxiliary losses by Megatron's
            names, such as `"load_balancing_loss"` and `"z_loss"`, without their coefficients; not part of `"loss"`.
        learning_rate: of parameters without a factor of their own.
        gradient_norm: before clipping; None where the optimizer does not compute it, or nothing was learned.
        skipped: no weight and no optimizer state changed: the gradients had an infinity or NaN (fp16), or nothing was
            learned, because no loss counted anything or every gradient is zero.
        seconds: wall-clock time.
        part_norms: part -> norm of its gradient before clipping, with `TrainerSettings.part_norms`; else empty.
    """

    step: int
    losses: Mapping[str, float]
    learning_rate: float
    gradient_norm: float | None
    skipped: bool
    seconds: float
    part_norms: Mapping[str, float] = field(default_factory=dict)


@dataclass
class History:
    """What a run reported.

    Args:
        steps: a report for each step.
        evaluations: step -> losses of the evaluation after it.
        stopped: a SIGTERM ended the run before its last step.
        ended_early: its evaluations got no better (`TrainerSettings.early_stopping`).
    """

    steps: list[StepReport] = field(default_factory=list)
    evaluations: dict[int, Mapping[str, float]] = field(default_factory=dict)
    stopped: bool = False
    ended_early: bool = False


def check_whole(name: str, value: object, least: int | None = None) -> None:
    """Refuses what counts nothing, such as 2.5 steps: a run of them would never reach its end.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_decay(option: str, decay: object) -> None:
    """Refuses a decay that averages nothing.

    Raises:
        TypeError, ValueError: naming the option, what is expected and what was found.
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"{option} must be a number, got {decay!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"{option} must lie in [0, 1), such as 0.999, got {decay}")


def due(steps: int, every: int | None) -> bool:
    """Whether something that is done every so many steps, or never, is done after `steps` of them."""
    return every is not None and steps % every == 0
