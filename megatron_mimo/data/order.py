"""Microbatches of a dataset in an order that depends on nothing but the number of samples consumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_mimo.batch import Batch


class ShuffledMicrobatches(Sampler[list[int]]):
    """Indices of this rank's microbatches, without end: each epoch is shuffled anew.

    Samples are numbered as they are consumed over all ranks, so another number of data-parallel ranks
    trains on the same global batches, and a resumed run goes on where it stopped.

    Args:
        length: of the dataset.
        start: samples consumed before, over all ranks.
        micro_batch_size: samples of a microbatch.
        rank, size: of the data-parallel group.
        seed: of the order.

    Example:
        >>> order = ShuffledMicrobatches(4, start=0, micro_batch_size=2, rank=0, size=1)
        >>> first, second, _ = (indices for indices, _ in zip(order, range(3)))
        >>> sorted(first + second)
        [0, 1, 2, 3]
    """

    def __init__(self, length: int, *, start: int, micro_batch_size: int, rank: int, size: int, seed: int = 0) -> None:
        if length < 1:
            raise ValueError("ShuffledMicrobatches: the dataset is empty; give one with samples")
        self._length, self._start, self._seed = length, start, seed
        self._micro_batch_size, self._rank, self._size = micro_batch_size, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        first = self._start + self._rank * self._micro_batch_size
        while True:
            yield [self._index(first + offset) for offset in range(self._micro_batch_size)]
            first += self._size * self._micro_batch_size

    def _index(self, consumed: int) -> int:
        """Which sample the `consumed`-th is."""
        epoch, position = divmod(consumed, self._length)
        return int(self._permutation(epoch)[position])

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._length, generator=draw)
        return self._order

    _epoch: int = -1
    _order: torch.Tensor


def microbatches_of(
    dataset: Sequence,
    collate: Callable[[Sequence], Batch],
    *,
    start: int,
    micro_batch_size: int,
    rank: int,
    size: int,
    workers: int,
) -> Iterator[Batch]:
    """Batches without end, collated in `workers` processes (0: in this one).

    Args:
        dataset: gives a sample for an index.
        collate: makes a batch of samples.
        start, micro_batch_size, rank, size: see `ShuffledMicrobatches`.
        workers: processes that read ahead.
    """
    order = ShuffledMicrobatches(len(dataset), start=start, micro_batch_size=micro_batch_size, rank=rank, size=size)
    loader: DataLoader[Any] = DataLoader(
        cast("Dataset[Any]", dataset),  # which asks of it no more than length and item
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return iter(loader)
