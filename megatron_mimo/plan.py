"""What a batch asks for, looked up once: where rows go, which positions are this rank's, what is padding.

A `Plan` is made after the batch was checked and before anything runs; every later stage reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        padding: bool `[1 or B, S]`, positions that hold nothing; None where there are none.
        counts: modality -> its generation tokens in the batch; None where only the device knows. Empty on a stage
            that neither reads nor writes.
        host: what the batch's collator told the host, None where it made no placement.
    """

    batch_size: int
    placement: Placement | None
    shard: SequenceShard
    positions: Tensor
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
            return Plan(shape[0], None, shard, position_ids, padding, {}, host)
        placement = self._adopted(placement, input_ids, packed_seq_params)
        if padding is not None:
            self._check.padding(placement, padding.expand(shape))
        counts = count_generation(placement, brought, self._config, self._submodules, training)
        self._check.unfed(brought.reads, placement, counts)
        return Plan(shape[0], placement, shard, position_ids, padding, counts, host)

    def settle(self, batch: Batch) -> Placement | None:
        """The placement of a batch that was checked here, on the host, so that nothing of it is checked on a device.

        Args:
            batch: tensors on the CPU, the whole sequence, with a placement that the host knows.

        Returns:
            None for a model that writes: its targets are prepared, with draws, where they are learned.

        Raises:
            TypeError, ValueError: a bad batch; but for the number of encoded rows, which is compared when they come.
        """
        placement = batch.get("placement")
        if self._config.generation_token_ids or placement is None or placement.host is None:
            return None
        before, self._checks.settled = self._checks.settled, False
        try:
            ids, packed, mask = batch["input_ids"], batch.get("packed_seq_params"), batch.get("padding_mask")
            positions, attention = batch.get("position_ids"), batch.get("attention_mask")
            labels, weights = batch.get("labels"), batch.get("loss_mask")
            self._check.tokens(ids, positions, attention, labels, weights, packed, mask, None)
            media = self._check.media(batch.get("modality_inputs"), None, None)
            brought = Brought.of(frozenset(media.inputs), {}, {})
            plan = self.plan(ids, positions, packed, mask, placement, brought, True, 0)
            self.learned(ids, labels, weights, brought.reads, plan)
        finally:
            self._checks.settled = before
        return replace(placement, host=replace(placement.host, settled=True))

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
        if device.type == "cpu":
            rows = rows_of_labels(int(mine.count_nonzero()), mine.numel(), device)
            return counted_labels(mine != 0, plan.shard, rows)
        if plan.host is None or plan.host.counted is None:
            return None
        boundaries = None if plan.host.boundaries is None else torch.tensor(plan.host.boundaries)
        shard = self._shard(loss_mask.shape[1], boundaries, torch.device("cpu"))
        told = int(shard.cut(plan.host.counted).sum())
        check_counted(mine, told, self._checks)
        return counted_labels(mine != 0, plan.shard, rows_of_labels(told, mine.numel(), device))

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


def default_positions(input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Positions `[B, S]` int64 that count from 0, anew in each packed sequence.

    Args:
        input_ids: `[B, S]`.
        cu_seqlens: `[sequences + 1]` boundaries of packed sequences, B = 1.

    Example:
        >>> default_positions(torch.zeros(1, 5, dtype=torch.long), torch.tensor([0, 3, 5]))
        tensor([[0, 1, 2, 0, 1]])
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.to(positions), positions, right=True) - 1
        positions = positions - cu_seqlens.to(positions)[sequence]
    return positions.expand_as(input_ids)


def padding_of(
    packed_seq_params: PackedSeqParams | None,
    length: int,
    device: torch.device | str = "cpu",
    padding_mask: Tensor | None = None,
) -> Tensor | None:
    """Positions that hold nothing, bool `[1 or B, S]`, or None where there are none.

    Args:
        packed_seq_params: of the batch, whose sequences may have padding between them.
        length: `S`.
        device: where the answer is wanted.
        padding_mask: bool `[B, S]`, or None.
    """
    padded = boundaries_of(packed_seq_params)
    own = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
    if padded is None or own is None or own is padded:
        return padding_mask
    between = packed_padding(length, own, padded.to(device))
    return between if padding_mask is None else between | padding_mask


def packed_padding(length: int, cu_seqlens: Tensor, cu_seqlens_padded: Tensor) -> Tensor:
    """Which positions are padding between packed sequences, bool `[1, S]`.

    Args:
        length: `S`.
        cu_seqlens: int `[sequences + 1]`, boundaries of the sequences themselves.
        cu_seqlens_padded: int `[sequences + 1]`, where each starts in the packed sequence; on the wanted device.

    Raises:
        ValueError: boundaries of unequal number.

    Example:
        >>> packed_padding(6, torch.tensor([0, 2, 4]), torch.tensor([0, 3, 6])).long()
        tensor([[0, 0, 1, 0, 0, 1]])
    """
    if cu_seqlens.shape != cu_seqlens_padded.shape:
        raise ValueError(
            f"cu_seqlens_q has shape {list(cu_seqlens.shape)} but cu_seqlens_q_padded "
            f"{list(cu_seqlens_padded.shape)}: both need one boundary a packed sequence, and one more."
        )
    starts = cu_seqlens_padded.long()
    lengths = cu_seqlens.to(starts).diff()
    positions = torch.arange(length, device=starts.device)
    # Wrong boundaries are reported where the sequence is cut; until then they must not lead outside.
    sequence = (torch.searchsorted(starts, positions, right=True) - 1).clamp(0, len(lengths) - 1)
    return (positions - starts[sequence] >= lengths[sequence])[None]


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


def boundaries_of(packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """Padded boundaries `[sequences + 1]` of packed sequences, None where nothing is packed."""
    if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
        return None
    if packed_seq_params.cu_seqlens_q_padded is not None:
        return packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q
