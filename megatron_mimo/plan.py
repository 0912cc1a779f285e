"""What a batch asks for, looked up once: where rows go, which positions are this rank's, what is padding.

A `Plan` is made after the batch was checked and before anything runs; every later stage reads it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self, cast

import torch
from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.check import BatchCheck
from megatron_mimo.check.tokens import check_counted
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.decoders.targets import Prepared
from megatron_mimo.deferred import Checks
from megatron_mimo.labels import default_loss_mask
from megatron_mimo.packed import boundaries_of, default_positions, padding_of
from megatron_mimo.placement import Placement, build_placement
from megatron_mimo.sharding import SequenceShard, sequence_shard
from megatron_mimo.tally import HostFacts
from megatron_mimo.token_loss import CountedLabels, counted_labels, rows_of_labels

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mimo.modality.submodules import ModalitySubmodules


@dataclass(frozen=True, eq=False)
class Plan:
    """One microbatch, as the stages need it.

    Attributes:
        batch_size: `B`.
        placement: which row fills which position, and which positions generate; on the device of the token ids.
            None on a stage that neither reads nor writes.
        shard: which positions of the sequence are this rank's.
        positions: int64 `[B, S]` or `[k, B, S]`, position ids, global.
        counted: int64 `[B, S]`, positions counted from 0 (or on from what is cached), in each packed sequence anew;
            global.
        padding: bool `[1 or B, S]`, positions that hold nothing; None where there are none.
        counts: modality -> its generation tokens in the batch; None where only the device knows. Empty on a stage
            that neither reads nor writes.
        host: what the batch's collator told the host, None where it made no placement.
    """

    batch_size: int
    placement: Placement | None
    shard: SequenceShard
    positions: Tensor
    counted: Tensor
    padding: Tensor | None
    counts: Mapping[str, int | None]
    host: HostFacts | None = None

    @property
    def placed(self) -> Placement:
        """The placement, on a stage that reads or writes."""
        return cast(Placement, self.placement)


class Learned(NamedTuple):
    """What a rank learns as text.

    Attributes:
        labels, loss_mask: `[B, S / CP]`, rank-local, or None.
        counted: which labels count, None where the loss runs on every position.
    """

    labels: Tensor | None
    loss_mask: Tensor | None
    counted: CountedLabels | None


@dataclass(frozen=True)
class Brought:
    """Which modalities have anything in a batch, and the rows that are known before anything runs.

    Attributes:
        reads: modalities with inputs.
        written: modality -> decoder -> rows of its targets.
        shown: modality -> rows of inputs of its generation input.
    """

    reads: frozenset[str]
    written: Mapping[str, Mapping[str, int]]
    shown: Mapping[str, int]

    @classmethod
    def of(
        cls,
        reads: frozenset[str],
        targets: Mapping[str, Mapping[str, Prepared]],
        shown: Mapping[str, Prepared],
    ) -> Self:
        """What modalities with inputs, prepared targets and prepared inputs of generation inputs bring."""
        written = {
            modality: {name: target.num_rows for name, target in of_decoders.items()}
            for modality, of_decoders in targets.items()
        }
        return cls(reads, written, {modality: given.num_rows for modality, given in shown.items()})

    @property
    def modalities(self) -> list[str]:
        """Every modality that has anything, in alphabetical order."""
        return sorted({*self.reads, *self.written, *self.shown})


class Planner:
    """Makes the plans of one stage's batches.

    Args:
        config: of the model.
        submodules: modality -> its `ModalitySubmodules` on this stage.
        first, last: whether rows are placed, whether hidden states are decoded on this stage.
        groups: process groups, of which `tp` and `cp` are used.
        check: what refuses batches.
        checks: who owns the checks that wait for the device.
    """

    def __init__(
        self,
        config: MimoModelConfig,
        submodules: Mapping[str, ModalitySubmodules],
        first: bool,
        last: bool,
        groups: ProcessGroupCollection,
        check: BatchCheck,
        checks: Checks,
    ) -> None:
        self._config, self._submodules, self._last = config, submodules, last
        self._uses_placement = first or (last and bool(config.generation_token_ids))
        self._groups = groups
        self._check, self._checks = check, checks

    def place(self, input_ids: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Placement:
        """Which row fills each position of `input_ids` `[B, S]`, and which positions generate."""
        return build_placement(
            input_ids,
            self._config.reading_tables,
            self._config.generation_token_ids,
            cu_seqlens=boundaries_of(packed_seq_params),
            vocabulary_size=self._config.language_model.params.get("vocab_size"),
            checks=self._checks,
        )

    def plan(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        padding_mask: Tensor | None,
        placement: Placement | None,
        brought: Brought,
        training: bool,
        start: int,
    ) -> Plan:
        """What the batch asks of this rank, every count held against the others.

        Args:
            input_ids, position_ids, packed_seq_params, padding_mask, placement: as `MimoModel.forward` takes them.
            brought: which modalities have anything in the batch, and how much.
            training: whether every generation token needs a target.
            start: positions that an inference context holds already, from which those left out go on.

        Raises:
            ValueError: counts that differ, naming modality, sample and both; on a device at the latest one step
                later.
        """
        shape, device, boundaries = input_ids.shape, input_ids.device, boundaries_of(packed_seq_params)
        shard = self._shard(shape[1], boundaries, device)
        padding = padding_of(packed_seq_params, shape[1], device, padding_mask)
        default = default_positions(input_ids, boundaries) + start
        position_ids = self._check.positions(position_ids, default, brought.modalities)
        host = placement.host if isinstance(placement, Placement) else None
        if not self._uses_placement:
            return Plan(shape[0], None, shard, position_ids, default, padding, {}, host)
        placement = self._adopted(placement, input_ids, packed_seq_params)
        if padding is not None:
            self._check.padding(placement, padding.expand(shape))
        counts = count_generation(placement, brought, self._config, self._submodules, training)
        self._check.unfed(brought.reads, placement, counts)
        return Plan(shape[0], placement, shard, position_ids, default, padding, counts, host)

    def settle(self, batch: Batch) -> Placement | None:
        """The placement of a batch that was checked here, on the host, so that nothing of it is checked on a device.

        Args:
            batch: tensors on the CPU, the whole sequence, with a placement that the host knows where the stage uses
                one.

        Returns:
            None for a batch without a placement. On a stage that uses none it was checked too.

        Raises:
            TypeError, ValueError: a bad batch; but for the number of encoded rows, which is compared when they come.
        """
        placement = batch.get("placement")
        if self._uses_placement and (placement is None or placement.host is None):
            return None
        before, self._checks.settled = self._checks.settled, False
        try:
            ids, packed, mask = batch["input_ids"], batch.get("packed_seq_params"), batch.get("padding_mask")
            positions, attention = batch.get("position_ids"), batch.get("attention_mask")
            labels, weights = batch.get("labels"), batch.get("loss_mask")
            self._check.tokens(ids, positions, attention, labels, weights, packed, mask, None)
            media = self._check.media(batch.get("modality_inputs"), batch.get("modality_targets"), None)
            written = {
                modality: self._submodules[modality].rows_of(of, modality) for modality, of in media.targets.items()
            }
            brought = Brought(frozenset(media.inputs), written, {})
            plan = self.plan(ids, positions, packed, mask, placement, brought, True, 0)
            if self._last:
                for modality, count in plan.counts.items():
                    plan.placed.generation_positions(modality, count or 0, self._submodules[modality].position_rule)
                self.learned(ids, labels, weights, brought.reads, plan)
        finally:
            self._checks.settled = before
        if placement is None or placement.host is None:
            return None
        return replace(placement, host=replace(placement.host, settled=True))

    def shapes(self, placement: Placement | None, device: torch.device) -> Hashable:
        """What a batch's numbers on the host make of this rank's shapes: equal for batches that run alike.

        Args:
            placement: that the host knows; None where the stage has none.
            device: where the batch runs.

        Returns:
            Rows of the language loss, None where it runs on every position, and generation tokens of each modality.
        """
        if placement is None or placement.host is None:
            return None
        rows = None
        if self._last and self._config.loss_where_counted and placement.host.counted is not None:
            mine = self._counted_here(placement.host)
            rows = rows_of_labels(int(mine.sum()), mine.numel(), device, placement.host.label_rows)
        return rows, tuple(placement.generation_count(modality) for modality in self._config.generation_token_ids)

    def learned(
        self, input_ids: Tensor, labels: Tensor | None, loss_mask: Tensor | None, reads: frozenset[str], plan: Plan
    ) -> Learned:
        """What this rank learns as text; without a mask every label that can be learned counts.

        Args:
            input_ids, labels, loss_mask: as `MimoModel.forward` takes them.
            reads: modalities with inputs.
            plan: of the batch.

        Raises:
            ValueError: labels outside the vocabulary that count, or a placement that counts others than the mask; on
                a device at the latest one step later.
        """
        if labels is None:
            return Learned(None, plan.shard.cut_if_given(loss_mask), None)
        if loss_mask is None:
            loss_mask = default_loss_mask(input_ids, labels, plan.padding, self._config, self._submodules, reads)
        self._check.labels(labels, loss_mask)
        mine = plan.shard.cut(loss_mask)
        return Learned(plan.shard.cut(labels), mine, self._counted(loss_mask, mine, plan))

    def _counted(self, loss_mask: Tensor, mine: Tensor, plan: Plan) -> CountedLabels | None:
        """Which labels count here, where this stage has a language loss and the host knows; None otherwise."""
        if not (self._last and self._config.loss_where_counted):
            return None
        device = loss_mask.device
        multiple = None if plan.host is None else plan.host.label_rows
        if device.type == "cpu":
            rows = rows_of_labels(int(mine.count_nonzero()), mine.numel(), device, multiple)
            return counted_labels(mine != 0, plan.shard, rows)
        if plan.host is None or plan.host.counted is None:
            return None
        told = int(self._counted_here(plan.host).sum())
        check_counted(mine, told, self._checks)
        return counted_labels(mine != 0, plan.shard, rows_of_labels(told, mine.numel(), device, multiple))

    def _counted_here(self, host: HostFacts) -> Tensor:
        """Which labels count on this context-parallel rank, bool `[B, S / CP]` on the CPU; of a host that was told."""
        counted = cast(Tensor, host.counted)
        boundaries = None if host.boundaries is None else torch.tensor(host.boundaries)
        return self._shard(counted.shape[1], boundaries, counted.device).cut(counted)

    def _shard(self, length: int, boundaries: Tensor | None, device: torch.device) -> SequenceShard:
        """Which positions of the sequence are this rank's."""
        groups = self._groups
        splits = self._config.language_config.sequence_parallel  # off while the model generates
        return sequence_shard(
            length,
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
            tp_rank=groups.tp.rank() if splits else 0,
            tp_size=groups.tp.size() if splits else 1,
            cu_seqlens=boundaries,
            device=device,
            checks=self._checks,
        )

    def _adopted(
        self, made: Placement | None, input_ids: Tensor, packed_seq_params: PackedSeqParams | None
    ) -> Placement:
        """The caller's placement, checked and on the ids' device, or a new one."""
        if made is None:
            return self.place(input_ids, packed_seq_params).bound()
        if isinstance(made, Placement) and made.device != input_ids.device:
            made = made.to(input_ids.device, non_blocking=True)
        self._check.placement(made, input_ids, packed=boundaries_of(packed_seq_params) is not None)
        return replace(made, checks=self._checks)


def count_generation(
    placement: Placement,
    brought: Brought,
    config: MimoModelConfig,
    submodules: Mapping[str, ModalitySubmodules],
    training: bool,
) -> dict[str, int | None]:
    """Generation tokens of each modality as the host knows them, held against the rows that the batch brings.

    Args:
        placement: of the batch.
        brought: rows of targets and of shown inputs.
        config: of the model.
        submodules: modality -> its `ModalitySubmodules` on this stage.
        training: whether every generation token needs a target. Without, a count that only the device knows is
            waited for.

    Raises:
        ValueError: targets or shown inputs of another number, or tokens that are no whole number of media items,
            naming modality, sample and both counts.
    """
    special = config.special_token_ids
    counts: dict[str, int | None] = {}
    for modality, token_id in config.generation_token_ids.items():
        submodule = submodules[modality]
        known: int | None = None
        # Where reading and generating share a token, inputs say that this batch reads.
        reads = modality in brought.reads and special.get(modality) == token_id
        for name, known in brought.written.get(modality, {}).items():
            placement.check_generation(modality, known, submodule.span_of(name), submodule.medium_of(name))
        if modality in brought.shown:
            known = brought.shown[modality]
            placement.check_generation(modality, known)
        if known is None:
            known = placement.generation_count(modality)
            if training and submodule.decoders and not reads:
                placement.check_generation(modality, 0)
        if known is None and not training:
            known = int(placement.generation_total(modality))  # inference waits for the device here
        if known is not None and not reads and submodule.rows_shown_together > 1:
            placement.check_generation(modality, known, medium=submodule.rows_shown_together)
        counts[modality] = known
    return counts
