"""What Megatron's loop tells callbacks: its steps, and its evaluations on the validation set."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any

from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_mimo.compat.megatron_training import save_now
from megatron_mimo.training.agreement import gathered
from megatron_mimo.training.best import Best
from megatron_mimo.training.checkpoints.directories import is_complete, keep_linked
from megatron_mimo.training.ema import Ema
from megatron_mimo.training.hooks import Began, Told
from megatron_mimo.training.norms import norms_of
from megatron_mimo.training.settings import StepReport
from megatron_mimo.training.stop import Pace
from megatron_mimo.training.watch import BETWEEN, COMPUTING, SAVING, Stages, Watch, Watched

# Where Megatron's training step takes them.
_PLACES = (("model", 2), ("optimizer", 3))


#: Below --save: where the best checkpoint is kept, to be given to --load.
BEST = "best"


class Telling:
    """Callbacks of one run of Megatron's loop.

    Args:
        args: Megatron's.
        told: the callbacks.
        weights: gives loss term -> its weight, on ranks of the last pipeline stage.
        ema: averages of the weights; None for none.
    """

    def __init__(
        self, args: Namespace, told: Told, weights: Callable[[], Mapping[str, float]], ema: Ema | None = None
    ) -> None:
        self._args, self._told, self._weights, self._ema = args, told, weights, ema
        self._best = Best(args.best_of)
        self._best.load_state_dict(args.compared)
        self.stages, self._pace = Stages(), Pace()
        self._watch: Watch | None = None
        self._kept: int | None = None  # the step whose checkpoint is to be kept, until it is whole
        self._began = False
        self._evaluated: int | None = None  # there is an evaluation after the last step too

    def step_by(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's training step, which tells of itself."""

        @wraps(train_step)
        def told_step(*given: Any, **named: Any) -> Any:
            self.begin()
            if self._patience_is_over():  # of a run before this one
                return {}, True, False, True, 0, None, None, 0
            if self._ema is not None:
                self._ema.start()
            schedule = named["opt_param_scheduler"] if "opt_param_scheduler" in named else given[4]
            learning_rate = schedule.get_lr({})  # of a group that says nothing of its own
            started, norms = perf_counter(), dict[str, float]()
            chunks, optimizer = (named.get(name, given[at] if len(given) > at else None) for name, at in _PLACES)
            self.stages.step = self._args.curr_iteration
            self.stages.enter(COMPUTING)
            with self._norms_before_step(chunks, optimizer, norms):
                outcome = train_step(*given, **named)
            self.stages.enter(BETWEEN)
            self._pace.ended(perf_counter() - started)
            losses, skipped, _, leaves, _, norm, *_ = outcome
            if self._ema is not None and not skipped:
                self._ema.update()
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
        self._pace.ended()
        means = values_of(losses)
        if means:
            weights = self._weights()
            means["loss"] = sum(weights.get(name.partition("/")[0], 1.0) * mean for name, mean in means.items())
        means = gathered(means)[-1]  # the last rank is of the last stage
        if self._best.take(step, means) and self._args.keep_best:
            self._kept = step
        self._args.compared = self._best.state_dict()
        self._told.evaluated(step, means)
        if self._patience_is_over():
            self._args.train_iters = min(self._args.train_iters, step)  # Megatron's loop ends there, and saves

    def _patience_is_over(self) -> bool:
        patience = self._args.early_stopping_patience
        return patience is not None and self._best.waited >= patience

    def saving_by(self, decide: Callable[..., bool]) -> Callable[..., bool]:
        """Megatron's decision to save and to end, before which the best evaluation is saved."""

        @wraps(decide)
        def saved_and_decided(*given: Any, **named: Any) -> bool:
            iteration = named.get("iteration", given[3] if len(given) > 3 else None)
            every = self._args.save_interval
            self.stages.enter(SAVING)
            if self._kept == iteration and not (every and iteration % every == 0):
                save_now(*given, **named)
            outcome = decide(*given, **named)
            self.stages.enter(BETWEEN)
            self._pace.ended()
            self._keep()
            return outcome

        return saved_and_decided

    def _keep(self) -> None:
        """Keeps the best checkpoint where it is whole by now; on rank 0."""
        if self._kept is not None and self._args.rank == 0:
            path = Path(self._args.save) / f"iter_{self._kept:07d}"
            if is_complete(path):
                keep_linked(path, Path(self._args.save) / BEST)
                self._kept = None

    def begin(self) -> None:
        """Tells that the run begins, the first time."""
        if not self._began:
            args, self._began = self._args, True
            watched = Watched(args.rank, args.world_size)
            self._watch = Watch(watched, self.stages, self._pace, args.stall_seconds).__enter__()
            self._told.began(Began(args.iteration, args.train_iters, args.rank == args.world_size - 1))

    def end(self) -> None:
        """Tells that the run ended, where it had begun."""
        self._keep()
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None
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
