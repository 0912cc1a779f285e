"""Records in order -> samples in that order, made by workers: of sources by number, or of a stream."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_mimo.data.blend import Order, Place
from megatron_mimo.data.messages import Conversation, SampleError, conversation_of
from megatron_mimo.data.packing import PackShape, RowShape
from megatron_mimo.data.progress import Progress, State
from megatron_mimo.data.samples import Policy, Sample, SampleProcessor, fitted
from megatron_mimo.data.sources import Source
from megatron_mimo.data.transfer import from_bytes, to_bytes

#: A conversation, the sample that it makes, and where its media lie.
Made = tuple[Conversation, Sample, Path | None]


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, with the kind it is counted under and the reason."""

    kind: str
    reason: str


@dataclass(frozen=True, eq=False)
class Read:
    """A sample that came back, at its position."""

    position: int
    sample: Sample

    @property
    def tokens(self) -> int:
        """Of the sample."""
        return len(self.sample)

    @property
    def cost(self) -> float:
        """Of its media."""
        return self.sample.cost


@dataclass(frozen=True)
class Left:
    """A position whose sample was left out."""

    position: int
    skipped: Skipped


@dataclass(frozen=True)
class Making:
    """How samples of a run are made.

    Args:
        process: of conversations.
        shape: of packs or rows.
        policy: see `fitted`.
    """

    process: SampleProcessor
    shape: PackShape | RowShape
    policy: Policy

    def sample(self, conversation: Conversation, root: Path | None, name: str) -> Sample:
        """The sample of a conversation, as it fits a pack.

        Raises:
            SampleError: it cannot be used.
        """
        return fitted(self.process(conversation, root, name), self.shape.length, self.shape.budget, self.policy)


class Feed(ABC):
    """Samples in the order of a run, from anywhere in it."""

    @abstractmethod
    def reads(self, progress: Progress, workers: int, prefetch: int) -> Iterator[Read | Left]:
        """Samples that are ready and that wait, then the backlog, then what comes next."""

    @abstractmethod
    def identity(self) -> State:
        """What the positions stand for, in JSON."""

    @abstractmethod
    def state(self, progress: Progress) -> State:
        """Where the run stands, in JSON; `Progress.of` reads it."""

    @property
    def records(self) -> int | None:
        """Of one pass over the data; None where it is not known."""
        return None

    def source_of(self, position: int) -> int:
        """Which source stands at a position."""
        return 0

    @abstractmethod
    def made(self, position: int) -> Made:
        """What stands at a position.

        Raises:
            SampleError: it cannot be used.
        """


def loaded(dataset: Dataset, asked: object, workers: int, prefetch: int) -> Iterator[Read | Left]:
    """What `dataset` makes of each thing asked for, in that order.

    Workers start now, in the caller's thread: a fork from another one may not end well.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        sampler=cast("Sampler[Any]", asked),  # of which torch wants an iterator alone
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_quiet_tokenizers,
    )
    read = iter(loader)
    return (_read(position, found) for position, found in read)


def sent(sample: Sample) -> object:
    """A sample as a worker sends it: one flat buffer, since each tensor would hold a file open until it is let go."""
    return to_bytes(sample)


def _read(position: int, found: Any) -> Read | Left:
    if isinstance(found, Skipped):
        return Left(position, found)
    return Read(position, cast(Sample, from_bytes(*found)))


def _as_it_is(item: Any) -> Any:
    return item


def _quiet_tokenizers(worker: int) -> None:
    """A forked worker tokenises in one thread, and need not be told so for every sample."""
    del worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


# Sources by number -----------------------------------------------------------------------------------------


class _Samples(Dataset):
    """Samples by place; what workers run."""

    def __init__(self, sources: Sequence[Source], making: Making) -> None:
        self._sources, self._making = sources, making

    def __getitem__(self, asked: tuple[int, Place]) -> tuple[int, Any]:
        position, place = asked
        try:
            _, sample, _ = self.made(place)
        except SampleError as error:
            where = self._sources[place.source].where(place.index)
            return position, Skipped(error.kind, f"{where}: {error}")
        return position, sent(sample)

    def made(self, place: Place) -> Made:
        """What stands at a place."""
        source = self._sources[place.source]
        conversation = conversation_of(source.record(place.index), columns=source.columns)
        sample = self._making.sample(conversation, source.media_root, source.where(place.index))
        return conversation, sample, source.media_root


class IndexedFeed(Feed):
    """Samples of sources, whose records have numbers.

    Args:
        sources: in the order that `lengths` and `weights` go by.
        making: of samples.
        lengths, weights, seed, shuffle: see `Order`.
        size: of the data-parallel group.
        limit: end after so many positions; None: never.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        making: Making,
        *,
        weights: Sequence[float] | None,
        seed: int,
        shuffle: bool,
        size: int,
        limit: int | None,
    ) -> None:
        lengths = [len(source) for source in sources]
        weights = None if weights is None else [float(weight) for weight in weights]
        self._order = Order(lengths, weights=weights, seed=seed, shuffle=shuffle)
        self._samples, self._size, self._limit = _Samples(sources, making), size, limit
        self._identity: State = {
            "lengths": lengths,
            "weights": weights,
            "seed": seed,
            "shuffle": shuffle,
            "limit": limit,
        }

    def reads(self, progress: Progress, workers: int, prefetch: int) -> Iterator[Read | Left]:
        first = [*progress.pending(), *progress.backlog]
        return loaded(
            self._samples, _Asked(self._order, first, progress.next, self._size, self._limit), workers, prefetch
        )

    def identity(self) -> State:
        return dict(self._identity)

    def state(self, progress: Progress) -> State:
        return progress.state()

    @property
    def records(self) -> int:
        return sum(self._identity["lengths"])

    def source_of(self, position: int) -> int:
        return self._order.at(position).source

    def made(self, position: int) -> Made:
        return self._samples.made(self._order.at(position))


@dataclass(frozen=True)
class _Asked:
    """Positions in the order in which they are read, each with its place."""

    order: Order
    first: Sequence[int]
    start: int
    size: int
    limit: int | None

    def __iter__(self) -> Iterator[tuple[int, Place]]:
        for position in self.first:
            yield position, self.order.at(position)
        position = self.start
        while self.limit is None or position < self.limit:
            yield position, self.order.at(position)
            position += self.size
