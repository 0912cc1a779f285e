"""What a loop tells others of its run, and what others add to its loss; the same in `Trainer` and in `pretrain`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.losses import LossTerm
from megatron_mimo.model import MimoModel
from megatron_mimo.output import MimoOutput
from megatron_mimo.training.settings import StepReport


@dataclass(frozen=True)
class Began:
    """Where a run begins.

    Args:
        step: how many steps it has behind it; more than 0 where it goes on from a checkpoint.
        steps: of the whole run.
        writes: this rank is the one that writes: a logger does nothing on the others. It is rank 0 of a `Trainer`, and
            the last rank of `pretrain`, where losses are.
    """

    step: int
    steps: int
    writes: bool


class Callback:
    """What is told of a run. A subclass overrides what it needs; the methods here do nothing.

    Every rank calls every method at the same point of the run, so a collective in one is fine. What it raises ends the
    run on all ranks. A run that goes on from a checkpoint tells steps again that a run before it had told after that
    checkpoint: see `Began.step`.

    Example:
        >>> class Printed(Callback):
        ...     def trained(self, report: StepReport) -> None:
        ...         print(report.step, report.losses["loss"])
        >>> trainer = Trainer(config, run, settings, callbacks=[Printed()])      # doctest: +SKIP
    """

    def began(self, run: Began) -> None:
        """Before the first step."""

    def trained(self, report: StepReport) -> None:
        """After each step. In `pretrain` the losses are known on ranks of the last pipeline stage alone."""

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """After each evaluation, with `step` steps behind it."""

    def ended(self) -> None:
        """After the last step, or where the run ended for another reason, an exception included."""


class FurtherLoss(ABC):
    """A term that is added to a model's loss: `weight * sum / count`, over the whole step as every term.

    It is reported by its name, in training and in evaluation.

    Args:
        name: of the term, one word.
        weight: in the loss.

    Raises:
        ValueError: a name with a slash, or one that a report has already.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        if not name.isidentifier() or name in ("text", "loss"):
            raise ValueError(f"FurtherLoss: expected a name of one word other than 'text' and 'loss', found {name!r}")
        self.name, self.weight = name, float(weight)

    @abstractmethod
    def count(self, batch: Batch) -> float:
        """What the term of a microbatch is a sum over, known before the model runs.

        Args:
            batch: whole, on the CPU, with its `loss_mask`; equal on context-parallel ranks.
        """

    @abstractmethod
    def term(self, outputs: Tensor | MimoOutput, loss_mask: Tensor | None, batch: Batch, model: MimoModel) -> LossTerm:
        """The term of a microbatch, on the last pipeline stage.

        Args:
            outputs: of `MimoModel.forward`: the language loss of each position `[B, S / cp]`, float32, rank-local, or
                a `MimoOutput` around it.
            loss_mask: `[B, S / cp]`, weights of these positions, rank-local.
            batch: what this stage got of it, on its device; whole sequences.
            model: of this stage.

        Returns:
            A rank-local sum with gradient and its count; counts of context-parallel ranks add up to `count(batch)`.
            Equal on tensor-parallel ranks.
        """


@dataclass(frozen=True)
class Hooks:
    """What takes part in a run of Megatron's loop, made once its arguments are known.

    Args:
        callbacks: `(args) -> callbacks`; None for none.
        further_losses: `(args) -> losses`; None for none.

    Example:
        >>> hooks = Hooks(callbacks=lambda args: [Lines(f"{args.save}/log.jsonl")])    # doctest: +SKIP
        >>> with adapt_megatron(model_config, hooks):                             # doctest: +SKIP
        ...     pretrain(...)
    """

    callbacks: Callable[[Any], Sequence[Callback]] | None = None
    further_losses: Callable[[Any], Sequence[FurtherLoss]] | None = None


@dataclass(frozen=True)
class Told:
    """Several callbacks as one.

    Args:
        callbacks: in the order in which they are told.
    """

    callbacks: Sequence[Callback] = ()

    @contextmanager
    def of(self, run: Began) -> Iterator[Told]:
        """Within it a run goes on; its end is told whatever ends it."""
        self.began(run)
        try:
            yield self
        finally:
            self.ended()

    def began(self, run: Began) -> None:
        """As `Callback.began`."""
        for each in self.callbacks:
            each.began(run)

    def trained(self, report: StepReport) -> None:
        """As `Callback.trained`."""
        for each in self.callbacks:
            each.trained(report)

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """As `Callback.evaluated`."""
        for each in self.callbacks:
            each.evaluated(step, losses)

    def ended(self) -> None:
        """As `Callback.ended`."""
        for each in self.callbacks:
            each.ended()


def check_hooks(callbacks: Sequence[Callback], losses: Sequence[FurtherLoss], modalities: Sequence[str]) -> None:
    """Refuses what is no callback or loss, and names that a report would have twice. Rank-local.

    Args:
        callbacks, losses: of a run.
        modalities: of the model.

    Raises:
        TypeError, ValueError: naming it and what is expected.
    """
    for each in callbacks:
        if not isinstance(each, Callback):
            raise TypeError(f"callbacks: expected objects of megatron_mimo.training.Callback, found {each!r}")
    for loss in losses:
        if not isinstance(loss, FurtherLoss):
            raise TypeError(f"further_losses: expected objects of megatron_mimo.training.FurtherLoss, found {loss!r}")
    taken = list(modalities) + [loss.name for loss in losses]
    for name in taken:
        if taken.count(name) > 1:
            raise ValueError(
                f"further_losses: {name!r} names a modality of the model or another loss; give each a name of its own"
            )
