"""What Megatron's loop tells callbacks: its steps, and its evaluations on the validation set."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_mimo.training.hooks import Began, Told
from megatron_mimo.training.norms import norms_of
from megatron_mimo.training.settings import StepReport

# Where Megatron's training step takes them.
_PLACES = (("model", 2), ("optimizer", 3))


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
            started, norms = perf_counter(), dict[str, float]()
            chunks, optimizer = (named.get(name, given[at] if len(given) > at else None) for name, at in _PLACES)
            with self._norms_before_step(chunks, optimizer, norms):
                outcome = train_step(*given, **named)
            losses, skipped, _, leaves, _, norm, *_ = outcome
            log_norms(self._args, norms)
            if self._told.callbacks and not leaves:
                report = StepReport(
                    self._args.curr_iteration,
                    values_of(losses),
                    learning_rate,
                    None if norm is None else float(norm),
                    bool(skipped),
                    perf_counter() - started,
                    norms,
                )
                self._told.trained(report)
            return outcome

        return told_step

    @contextmanager
    def _norms_before_step(self, chunks: Any, optimizer: Any, norms: dict[str, float]) -> Iterator[None]:
        """Within it the optimizer's step begins with the parts' norms, with --log-part-norms."""
        if not self._args.log_part_norms:
            yield
            return
        step = optimizer.step

        def measured() -> Any:
            norms.update(norms_of(chunks, optimizer, unwrap_model(chunks[0]).pg_collection))
            return step()

        optimizer.step = measured
        try:
            yield
        finally:
            del optimizer.step

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


def log_norms(args: Namespace, norms: Mapping[str, float]) -> None:
    """To where `megatron.training` reports, on its last rank."""
    if not norms or args.rank != args.world_size - 1:
        return
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    writer, wandb, step = get_tensorboard_writer(), get_wandb_writer(), args.curr_iteration + 1
    for part, norm in norms.items():
        if writer:
            writer.add_scalar(f"grad-norm/{part}", norm, step)
        if wandb:
            wandb.log({f"grad-norm/{part}": norm}, step)


def values_of(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Term -> mean; the host waits for them."""
    return {name.removesuffix(" loss"): float(value) for name, value in losses.items()}
