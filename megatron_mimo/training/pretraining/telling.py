"""What Megatron's loop tells callbacks: its steps, and its evaluations on the validation set."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import wraps
from time import perf_counter
from typing import Any

from torch import Tensor

from megatron_mimo.training.hooks import Began, Told
from megatron_mimo.training.settings import StepReport


class Telling:
    """Callbacks of one run of Megatron's loop.

    Args:
        args: Megatron's.
        told: the callbacks.
        weights: gives loss term -> its weight, on ranks of the last pipeline stage.
    """

    def __init__(self, args: Namespace, told: Told, weights: Callable[[], Mapping[str, float]]) -> None:
        self._args, self._told, self._weights = args, told, weights
        self._began = False
        self._evaluated: int | None = None  # there is an evaluation after the last step too

    def step_by(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's training step, which tells of itself."""

        @wraps(train_step)
        def told_step(*given: Any, **named: Any) -> Any:
            self.begin()
            schedule = named.get("opt_param_scheduler", given[4] if len(given) > 4 else None)
            learning_rate = schedule.get_lr({})  # of a group that says nothing of its own
            started = perf_counter()
            outcome = train_step(*given, **named)
            losses, skipped, _, leaves, _, norm, *_ = outcome
            if self._told.callbacks and not leaves:
                report = StepReport(
                    self._args.curr_iteration,
                    values_of(losses),
                    learning_rate,
                    None if norm is None else float(norm),
                    bool(skipped),
                    perf_counter() - started,
                )
                self._told.trained(report)
            return outcome

        return told_step

    def evaluated(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Tells of an evaluation on the validation set, once for a step.

        Args:
            step: how many steps the run has behind it.
            losses: as Megatron's log has them; empty before the last pipeline stage.
        """
        if self._evaluated == step:
            return
        self.begin()
        self._evaluated = step
        means = values_of(losses)
        if means:
            weights = self._weights()
            means["loss"] = sum(weights.get(name.partition("/")[0], 1.0) * mean for name, mean in means.items())
        self._told.evaluated(step, means)

    def begin(self) -> None:
        """Tells that the run begins, the first time."""
        if not self._began:
            args, self._began = self._args, True
            self._told.began(Began(args.iteration, args.train_iters, args.rank == args.world_size - 1))

    def end(self) -> None:
        """Tells that the run ended, where it had begun."""
        if self._began:
            self._began = False
            self._told.ended()


def values_of(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Term -> mean; the host waits for them."""
    return {name.removesuffix(" loss"): float(value) for name, value in losses.items()}
