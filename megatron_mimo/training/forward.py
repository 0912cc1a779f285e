"""The forward step that Megatron's schedules call for every microbatch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_mimo.batch import Batch
from megatron_mimo.data.step import Counts, StepBatches, read_step
from megatron_mimo.draws import restart_draws
from megatron_mimo.hosts import HostGroups, data_host_group
from megatron_mimo.losses import LossTerm
from megatron_mimo.model import MimoModel
from megatron_mimo.output import MimoOutput, loss_terms
from megatron_mimo.training.auxiliary import scale_mtp
from megatron_mimo.training.by_source import count_sources, counted_sources, source_terms
from megatron_mimo.training.hooks import FurtherLoss
from megatron_mimo.training.reading import part_for, placed_batches
from megatron_mimo.training.scale import StepScale, ToldScale, loss_func, numbers_of, told_of
from megatron_mimo.training.speed import counts as names
from megatron_mimo.training.watch import Stages

#: A microbatch on the device, what its model is given of it in place of what was read (targets, prepared), its counts,
#: the scale of its step, and the same numbers on the device; the last two are None before the last pipeline stage.
Ahead = tuple[Batch, Mapping[str, object], Counts, StepScale | None, ToldScale | None]

#: What a microbatch gave, and what makes its loss of it; None before the last pipeline stage.
Forwarded = tuple[Tensor | MimoOutput, Callable[..., Any] | None]


class ForwardStep:
    """`forward_step(data_iterator, model) -> (outputs, loss_func)` for a `MimoModel`.

    One object serves training and evaluation, and every chunk of an interleaved pipeline. In training
    the first microbatch of a step reads all of the step's, because their losses are divided by the
    counts of the whole step; in evaluation each is read when its turn comes.

    Args:
        microbatches: gives the number of microbatches of the current training step.
        step: gives the index of the current training step; equal on all ranks.
        seed: of the decoders' draws, which start anew at each microbatch.
        on_step: called on the last pipeline stage with the index and the counts of a training step,
            before it runs.
        further_losses: added to those of the model.
        sources: gives the names of a blend's sources, of which batches say `sources`; used where batches are read.
        stages: told of reading; None where the loop tells by itself.
        hosts: for counts and manifests; None for Megatron's host group of the data and its tensor-parallel groups.

    Example:
        >>> forward_step = ForwardStep(microbatches=lambda: 4, step=lambda: 0, seed=1234)
    """

    def __init__(
        self,
        *,
        microbatches: Callable[[], int],
        step: Callable[[], int],
        seed: int,
        on_step: Callable[[int, Counts], None] | None = None,
        further_losses: Sequence[FurtherLoss] = (),
        sources: Callable[[], Sequence[str]] = tuple,
        stages: Stages | None = None,
        hosts: HostGroups | None = None,
    ) -> None:
        self._stages = stages
        self._hosts = None if hosts is None else (hosts.tensor, hosts.data)
        self._sources = sources
        self._microbatches, self._step, self._seed, self._on_step = microbatches, step, seed, on_step
        self._further = tuple(further_losses)
        self._steps: dict[int | None, StepBatches] = {}
        self._told: dict[int | None, deque[ToldScale]] = {}
        self._ahead: dict[int | None, Iterator[Ahead]] | None = None
        self._agreed: set[tuple[str, bool]] = set()
        self._evaluated: dict[int | None, int] = {}

    def __call__(self, data_iterator: Iterator[Batch] | None, model: nn.Module) -> Forwarded:
        """One microbatch through `model`, and the function that makes its loss.

        Args:
            data_iterator: batches of CPU tensors, keyword arguments of `MimoModel.forward`; used on
                rank 0 of the tensor-parallel group alone.
            model: a `MimoModel`, or wrappers of Megatron's around one.

        Returns:
            `(outputs, loss_func)`: hidden states `[S_local, B, H]` before the last pipeline stage.
        """
        mimo = unwrap_model(model)
        told: ToldScale | None = None
        scale: StepScale | None
        instead: Mapping[str, object]
        if self._ahead is not None:
            batch, instead, counted, scale, told = next(self._ahead[mimo.vp_stage])
        else:
            step, scale = self._current_step(data_iterator, mimo)
            if scale is not None and self._told.get(mimo.vp_stage):
                told = self._told[mimo.vp_stage].popleft()
            batch, counted = step.next()
            instead = {}
        sources = batch.pop("sources", None)
        outputs, loss_mask = model(**{**batch, **instead})
        if not mimo.post_process:
            return outputs, None
        further = {each.name: each.term(outputs, loss_mask, batch, mimo) for each in self._further}
        if scale is not None:
            self._check_counts(outputs, loss_mask, further, counted, mimo)
        counted_of = counted_sources(counted) if mimo.training else []
        return outputs, partial(
            loss_func,
            loss_mask=loss_mask,
            weights=self.weights(mimo),
            names=[*self._terms(mimo), *counted_of],
            reported=source_terms(outputs, loss_mask, sources, counted_of, batch, mimo),
            further=further,
            scale=scale,
            told=told,
            # Told once of a batch whose parts several ranks have: only the sum over ranks is used.
            held=None if scale is None else self.held(counted, mimo),
        )

    def weights(self, mimo: MimoModel) -> dict[str, float]:
        """Modality or further loss -> weight of its terms, 1 where it is not named."""
        return {**mimo.loss_weights, **{each.name: each.weight for each in self._further}}

    def read(self, data_iterator: Iterator[Batch] | None, mimo: MimoModel) -> tuple[StepBatches, StepScale | None]:
        """A training step's microbatches before its schedule runs, and its scale on the last stage; for `given`.

        Args:
            data_iterator: as `__call__` takes it.
            mimo: a chunk of the model.
        """
        step = self._read(data_iterator, mimo, self._microbatches())
        if not mimo.post_process:
            return step, None
        if self._on_step is not None:
            self._on_step(self._step(), step.counts)
        return step, self._scale(step.counts, mimo)

    def begin(self, mimo: MimoModel, index: int) -> None:
        """The draws from here on are those of a training step's microbatch of this rank; of those that were `read`."""
        self._begin(mimo, self._step(), index)

    def held(self, counted: Counts, mimo: MimoModel) -> int:
        """Tokens that this rank reports of a microbatch: one of its context-parallel ranks speaks for all."""
        return int(counted[names.HELD]) if mimo.pg_collection.cp.rank() == 0 else 0

    @contextmanager
    def given(self, microbatches: Mapping[int | None, Iterable[Ahead]]) -> Iterator[None]:
        """Within it, the schedule gets these microbatches, on the device, by chunk (`vp_stage`), and reads none."""
        self._ahead = {chunk: iter(of_chunk) for chunk, of_chunk in microbatches.items()}
        try:
            yield
        finally:
            self._ahead = None

    def start_evaluation(self) -> None:
        """The evaluation that follows draws what every one does; of two in a row nothing else tells."""
        self._evaluated.clear()

    def _current_step(self, iterator: Iterator[Batch] | None, mimo: MimoModel) -> tuple[StepBatches, StepScale | None]:
        """This chunk's remaining microbatches, read where none are left, and the step's scale."""
        chunk = mimo.vp_stage
        if not mimo.training:
            # The same draws in every evaluation, and none of training's.
            index = self._evaluated.get(chunk, 0)
            self._evaluated[chunk] = index + 1
            self._begin(mimo, -1, index)
            return self._read(iterator, mimo, 1), None
        self._evaluated[chunk] = 0
        step = self._steps.get(chunk)
        if not step:
            step = self._steps[chunk] = self._read(iterator, mimo, self._microbatches())
            if mimo.post_process and self._on_step is not None:
                self._on_step(self._step(), step.counts)
            if mimo.post_process:
                scale_mtp(mimo.config, step.counts[names.HELD], step.counts[names.term("text")])
                self._told[chunk] = deque(self._tell(step, mimo))
        self._begin(mimo, self._step(), self._microbatches() - len(step))
        return step, self._scale(step.counts, mimo) if mimo.post_process else None

    def _begin(self, mimo: MimoModel, step: int, index: int) -> None:
        """Before the microbatch `index` of this rank: the draws; ranks take turns, as Megatron deals out samples."""
        if index == 0:  # wrappers of the model ask the language model's configuration alone
            mimo.set_is_first_microbatch()
        if mimo.pre_process or mimo.post_process:  # the stages that draw
            ranks = mimo.pg_collection.dp
            restart_draws(self._seed, step, index * ranks.size() + ranks.rank())

    def _read(self, iterator: Iterator[Batch] | None, mimo: MimoModel, number: int) -> StepBatches:
        groups = mimo.pg_collection
        if self._hosts is None:
            self._hosts = groups.tp, data_host_group(groups.dp)
        tensor_hosts, data_hosts = self._hosts
        if iterator is not None and self._stages is not None:
            iterator = self._stages.reading(iterator)
        return read_step(
            placed_batches(iterator, mimo),
            number,
            keep=partial(part_for, model=mimo),
            count=partial(self._count, mimo=mimo) if mimo.post_process else _nothing,
            tensor_group=groups.tp,
            data_group=data_hosts if mimo.post_process and mimo.training else None,
            manifest_group=tensor_hosts,
            device=next(mimo.parameters()).device,
        )

    def _terms(self, mimo: MimoModel) -> list[str]:
        """Every loss term that a microbatch may have, in one order."""
        return ["text", *names.decoders_of(mimo), *(each.name for each in self._further)]

    def _count(self, batch: Batch, mimo: MimoModel) -> Counts:
        further = {names.term(each.name): float(each.count(batch)) for each in self._further}
        of_sources = count_sources(batch, self._sources(), mimo) if mimo.training else {}
        return names.count_batch(batch, mimo) | further | of_sources

    def _scale(self, counts: Counts, mimo: MimoModel) -> StepScale:
        return StepScale(
            counts={name: counts[names.term(name)] for name in [*self._terms(mimo), *counted_sources(counts)]},
            tokens=counts[names.HELD],
            parts=self._microbatches() * mimo.pg_collection.dp_cp.size(),
            per_token=mimo.config.calculate_per_token_loss,
        )

    def _tell(self, step: StepBatches, mimo: MimoModel) -> list[ToldScale]:
        """The step's numbers on a GPU, where division by a number of the host's rounds otherwise; none on the CPU."""
        device = next(mimo.parameters()).device
        if device.type == "cpu":
            return []
        scale = self._scale(step.counts, mimo)
        held = [self.held(counted, mimo) for counted in step.microbatch_counts]
        return told_of(scale, numbers_of(scale, held, device))

    def _check_counts(
        self,
        outputs: Tensor | MimoOutput,
        loss_mask: Tensor | None,
        further: Mapping[str, LossTerm],
        counted: Counts,
        mimo: MimoModel,
    ) -> None:
        """Holds the counts told ahead against those of the losses, once for every term: it waits.

        A microbatch that shall count nothing of a term says nothing about those that do: both are looked at.
        """
        terms: Mapping[str, LossTerm] = {}
        if not {(name, counted[names.term(name)] > 0) for name in self._terms(mimo)} <= self._agreed:
            terms = loss_terms(outputs, loss_mask) | dict(further)
        for name in terms:  # in one order on every rank: there is a collective in the loop
            expected = counted[names.term(name)]
            kind = (name, expected > 0)  # alike on the context-parallel ranks, which read the same batch
            if kind in self._agreed:
                continue
            self._agreed.add(kind)
            found = terms[name].count.detach().double().clone()
            if mimo.pg_collection.cp.size() > 1:
                dist.all_reduce(found, group=mimo.pg_collection.cp)
            if abs(found.item() - expected) > 1e-3 * max(expected, 1.0):
                raise ValueError(
                    f"loss term {name!r} counted {found.item():g} but {expected:g} were told ahead. A "
                    "decoder's loss_shape (or count), or a further loss's count, must say what its loss sums over."
                )


def _nothing(batch: Batch) -> Counts:
    return {}
