"""Which positions of the sequence this rank holds: context parallelism, packing, sequence parallelism.

Integers only. Context parallelism cuts a sequence in `2 * cp_size` chunks and gives rank `r` the chunks `r` and
`2 * cp_size - 1 - r`, which balances causal attention (Megatron's zigzag). Packed sequences (THD) are cut the
same way one by one, each at its padded length. Sequence parallelism then cuts what a context-parallel rank holds
in `tp_size` contiguous slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import lcm

import torch
from torch import Tensor

from megatron_mimo.deferred import Checks
from megatron_mimo.tally import verify_boundaries


@dataclass(frozen=True)
class SequenceShard:
    """One rank's part of every sequence in the batch.

    Attributes:
        sequence_length: S, the global length.
        cp_positions: int64 [S / cp_size], the global position of each row this context-parallel rank holds, in
            the order it holds them; None where it holds all of them in order.
        tp_rank, tp_size: the sequence-parallel slice; 0 and 1 without sequence parallelism.
        device: where the positions live.
    """

    sequence_length: int
    cp_positions: Tensor | None
    tp_rank: int
    tp_size: int
    device: torch.device

    @property
    def cp_length(self) -> int:
        """How many positions this context-parallel rank holds: S / cp_size."""
        return self.sequence_length if self.cp_positions is None else self.cp_positions.numel()

    @property
    def length(self) -> int:
        """How many rows of the language model this rank holds: S_local = S / (cp_size * tp_size)."""
        return self.cp_length // self.tp_size

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds every position, in order."""
        return self.cp_positions is None and self.tp_size == 1

    @cached_property
    def whole_cp(self) -> SequenceShard:
        """The same shard before sequence parallelism cuts it: what the tensor-parallel group holds together."""
        if self.tp_size == 1:
            return self
        return SequenceShard(self.sequence_length, self.cp_positions, 0, 1, self.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [S_local]: the global position of each of this rank's rows."""
        held = self.cp_positions
        if held is None:
            held = torch.arange(self.sequence_length, device=self.device)
        return held[self.tp_rank * self.length : (self.tp_rank + 1) * self.length]

    @cached_property
    def local_row(self) -> Tensor:
        """int32 [S]: this rank's row for each global position, -1 where another rank holds it."""
        local = torch.full((self.sequence_length,), -1, dtype=torch.int32, device=self.device)
        rows = torch.arange(self.length, dtype=torch.int32, device=self.device)
        return local.index_copy_(0, self.positions, rows)

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """`x` at the positions this context-parallel rank holds; sequence parallelism cuts none of these.

        Args:
            x: [B, S, ...] labels, loss mask, position ids; global.
            dim: the dim of the sequence.

        Returns:
            [B, S / cp_size, ...], rank-local. `x` itself where nothing is cut.

        Raises:
            ValueError: if the dim is not as long as the sequence.

        Example:
            >>> shard = sequence_shard(8, cp_rank=0, cp_size=2)
            >>> shard.cut(torch.arange(8).unsqueeze(0))
            tensor([[0, 1, 6, 7]])
        """
        if x.size(dim) != self.sequence_length:
            raise ValueError(
                f"cannot cut a tensor of shape {tuple(x.shape)}: its dim {dim} should be the sequence length "
                f"{self.sequence_length}. Pass the whole sequence; each rank takes its part here."
            )
        return x if self.cp_positions is None else x.index_select(dim, self.cp_positions)

    def cut_if_given(self, x: Tensor | None) -> Tensor | None:
        """`cut(x)`, or None for None."""
        return None if x is None else self.cut(x)

    def local_index(self, positions: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Where this rank keeps the given positions.

        Args:
            positions: int64 [N], flat global positions `b * S + s`.
            batch_size: B.

        Returns:
            `(index, owned)`: int64 [N] row of the flattened local [S_local * B] hidden states, 0 where another rank
            holds the position; and bool [N], which of them this rank holds.
        """
        sample = positions.div(self.sequence_length, rounding_mode="floor")
        position = positions - sample * self.sequence_length
        if self.is_whole:
            return position * batch_size + sample, torch.ones_like(positions, dtype=torch.bool)
        row = self.local_row[position].long()
        owned = row >= 0
        return (row * batch_size + sample) * owned, owned


def sequence_shard(
    sequence_length: int,
    *,
    cp_rank: int = 0,
    cp_size: int = 1,
    tp_rank: int = 0,
    tp_size: int = 1,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str = "cpu",
    checks: Checks | None = None,
) -> SequenceShard:
    """The positions one rank holds.

    Args:
        sequence_length: S, the global (padded) length.
        cp_rank, cp_size: this rank in its context-parallel group.
        tp_rank, tp_size: this rank in its tensor-parallel group under sequence parallelism; 0 and 1 without it.
        cu_seqlens: int32 [number of sequences + 1], the padded boundaries of packed sequences (Megatron's
            `PackedSeqParams.cu_seqlens_q_padded`); the batch size is then 1. On the device they are used without
            a host sync, where `checks` owns theirs.
        device: where the positions shall live.
        checks: who owns the check of boundaries on the device; None waits for it here.

    Returns:
        The rank's `SequenceShard`. Without `cu_seqlens` it is the same object for the same arguments.

    Raises:
        ValueError: if a rank lies outside its group or a length cannot be divided.

    Example:
        >>> sequence_shard(8, cp_rank=1, cp_size=2).positions
        tensor([2, 3, 4, 5])
        >>> sequence_shard(8, tp_rank=1, tp_size=2).positions
        tensor([4, 5, 6, 7])
    """
    for axis, rank, size in (("context-parallel", cp_rank, cp_size), ("sequence-parallel", tp_rank, tp_size)):
        if not 0 <= rank < size:
            raise ValueError(f"{axis} rank {rank} lies outside its group of {size}: expected 0 to {size - 1}.")
    multiple = sequence_multiple(context_parallel=cp_size, sequence_parallel=tp_size)
    if sequence_length % multiple:
        raise ValueError(
            f"expected a sequence length that is a multiple of {multiple} (context-parallel size {cp_size}, "
            f"sequence-parallel size {tp_size}), found {sequence_length}. Pad it to one."
        )
    device = torch.device(device)
    if cu_seqlens is not None:
        _check_boundaries(cu_seqlens, sequence_length, packed_multiple(cp_size), checks)
    if cu_seqlens is None or cp_size == 1:
        return _unpacked_shard(sequence_length, cp_rank, cp_size, tp_rank, tp_size, device)
    positions = _packed_positions(cu_seqlens.to(device, non_blocking=True), sequence_length, cp_rank, cp_size)
    return SequenceShard(sequence_length, positions, tp_rank, tp_size, device)


def sequence_multiple(*, context_parallel: int = 1, sequence_parallel: int = 1) -> int:
    """What every (padded) sequence length is a multiple of: the one rule for models, loops and packers.

    Context parallelism cuts `2 * context_parallel` chunks, sequence parallelism cuts what a context-parallel rank
    holds in `sequence_parallel` slices: `lcm(2 * CP if CP > 1 else 1, CP * SP)`.

    Args:
        context_parallel: size of the context-parallel group.
        sequence_parallel: size of the tensor-parallel group with sequence parallelism, 1 without.

    Example:
        >>> sequence_multiple(context_parallel=2, sequence_parallel=2)
        4
    """
    return lcm(packed_multiple(context_parallel), context_parallel * sequence_parallel)


def packed_multiple(context_parallel: int) -> int:
    """What the padded length of each packed sequence is a multiple of: `2 * CP` chunks, or 1 without."""
    return 2 * context_parallel if context_parallel > 1 else 1


@lru_cache(maxsize=64)
def _unpacked_shard(
    sequence_length: int, cp_rank: int, cp_size: int, tp_rank: int, tp_size: int, device: torch.device
) -> SequenceShard:
    """Cached: one run sees few lengths, and building the positions costs more launches than aligning."""
    if cp_size == 1:
        return SequenceShard(sequence_length, None, tp_rank, tp_size, device)
    chunk = sequence_length // (2 * cp_size)
    low = torch.arange(cp_rank * chunk, (cp_rank + 1) * chunk, device=device)
    positions = torch.cat([low, low + (2 * cp_size - 1 - 2 * cp_rank) * chunk])
    return SequenceShard(sequence_length, positions, tp_rank, tp_size, device)


def _packed_positions(cu_seqlens: Tensor, sequence_length: int, cp_rank: int, cp_size: int) -> Tensor:
    """int64 [S / cp_size]: the zigzag within every packed sequence, without a host sync.

    Row `i` of this rank lies in the sequence whose local boundaries `cu_seqlens / cp_size` enclose it; its first
    half comes from chunk `cp_rank`, its second from chunk `2 * cp_size - 1 - cp_rank`.
    """
    boundaries = cu_seqlens.long().div(cp_size, rounding_mode="floor")
    row = torch.arange(sequence_length // cp_size, device=cu_seqlens.device)
    last = max(cu_seqlens.numel() - 2, 0)
    sequence = (torch.searchsorted(boundaries, row, right=True) - 1).clamp(0, last)
    start = boundaries[sequence]
    chunk = (boundaries[sequence + 1] - start).div(2, rounding_mode="floor")
    within = row - start
    skipped = torch.where(within < chunk, cp_rank, 2 * cp_size - 2 - cp_rank)
    # Wrong boundaries are reported by the check; until then they must not lead outside the sequence.
    return (start * cp_size + skipped * chunk + within).clamp(0, sequence_length - 1)


def _check_boundaries(cu_seqlens: Tensor, sequence_length: int, chunks: int, checks: Checks | None) -> None:
    """Raises `ValueError` now on the CPU, deferred on the device, if the packing cannot be cut."""

    def verify(boundaries: Tensor) -> None:
        verify_boundaries("cu_seqlens", boundaries.tolist(), sequence_length, chunks)

    if checks is None:
        verify(cu_seqlens)
    else:
        checks.look(lambda: cu_seqlens, verify, "cu_seqlens")
