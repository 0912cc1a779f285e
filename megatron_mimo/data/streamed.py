"""Samples of a stream, and the same ones after a crash: from a place before all that was not given out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any
from zlib import crc32

from torch.utils.data import Dataset

from megatron_mimo.data.feeds import Feed, Left, Made, Making, Read, Skipped, loaded, sent
from megatron_mimo.data.messages import SampleError
from megatron_mimo.data.progress import Progress, State
from megatron_mimo.data.sources import Columns
from megatron_mimo.data.streams import Stream, Streamed

# Records between two places that a run may go on from. What waits was read up to so many records before the buffer's
# oldest sample, and is read again; its state of some kilobytes is asked for as rarely.
EVERY = 64


class _Making(Dataset):
    """Samples of records; what workers run."""

    def __init__(self, making: Making, stream: Stream) -> None:
        # Not the stream itself: what it holds open stays with the process that reads it.
        self._making, self._root, self._stream = making, stream.media_root, stream.name
        self._columns: Columns = stream.columns

    def __getitem__(self, asked: tuple[int, Streamed]) -> tuple[int, Any]:
        position, record = asked
        name = record.name or f"record {position} of {self._stream}"
        try:
            sample = self._making.sample(record.conversation(self._columns), self._root, name)
        except SampleError as error:
            return position, Skipped(error.kind, f"{name}: {error}")
        return position, sent(sample)


class StreamFeed(Feed):
    """Samples of a stream, each at its position: how many records came before it.

    Args:
        stream: of records.
        making: of samples.
        rank, size: of the data-parallel group.
        limit: end before this position; None: never.
    """

    def __init__(self, stream: Stream, making: Making, *, rank: int, size: int, limit: int | None) -> None:
        self._stream, self._making, self._limit = stream, making, limit
        self._rank, self._size = rank, size
        self._stride = size if stream.shared else 1
        self._records: _Records | None = None

    def reads(self, progress: Progress, workers: int, prefetch: int) -> Iterator[Read | Left]:
        self._records = _Records(self, progress)
        pending = progress.pending()
        found = loaded(_Making(self._making, self._stream), self._records, workers, prefetch)
        return _reordered(found, pending) if pending else found

    def identity(self) -> State:
        return {**self._stream.identity(), "limit": self._limit}

    def state(self, progress: Progress) -> State:
        if self._records is None:
            return progress.state()
        return {**progress.state(), "stream": self._records.place(progress)}

    def made(self, position: int) -> Made:
        raise ValueError(
            f"{self._stream.name}: a stream has no sample by number, found {position}. Look at a file of its records."
        )

    # What `_Records` asks ---------------------------------------------------------------------------------

    def started(self, state: State | None) -> Iterator[Streamed]:
        """The stream's records from a state on."""
        return self._stream.start(state, self._rank, self._size)

    def where(self) -> State:
        """Where the stream stands."""
        return self._stream.state()

    def wanted(self, position: int, again: set[int], start: int) -> bool:
        """Whether this rank makes a sample of the record."""
        return position in again or (position >= start and (position - start) % self._stride == 0)

    def ended(self, position: int) -> bool:
        """Whether the run is to end before a position."""
        return self._limit is not None and position >= self._limit


def _reordered(found: Iterator[Read | Left], pending: list[int]) -> Iterator[Read | Left]:
    """Those that are pending in their own order, then the others as they come."""
    waiting = []
    again = {read.position: read for _, read in zip(pending, found)}  # which takes no more than these
    for position in pending:
        if position not in again:
            raise ValueError(
                f"this state is of another stream: record {position} was in it, and did not come again before "
                f"{sorted(again)[-1:]}"
            )
        waiting.append(again[position])
    following = next(found, None)  # by then it is known whether the stream is the same
    yield from waiting
    if following is not None:
        yield following
        yield from found


class _Records:
    """Records of a stream with their positions, from a run's place on, and the places to go on from."""

    def __init__(self, feed: StreamFeed, progress: Progress) -> None:
        self._feed, self._start = feed, progress.next
        self._again = {*progress.pending(), *progress.backlog}
        self._from = progress.stream
        self._places: deque[tuple[int, State]] = deque()
        self._digests: deque[tuple[int, int]] = deque()

    def __iter__(self) -> Iterator[tuple[int, Streamed]]:
        feed, place = self._feed, self._from
        position = 0 if place is None else int(place["at"])
        first = position
        records = feed.started(None if place is None else place["state"])
        while True:
            if (position - first) % EVERY == 0:
                self._places.append((position, feed.where()))
            if place is not None and position == place["until"]:
                self._check(place)
            record = None if feed.ended(position) else next(records, None)
            if record is None:
                return
            self._digests.append((position, record.digest()))
            if feed.wanted(position, self._again, self._start):
                yield position, record
            position += 1

    def place(self, progress: Progress) -> State:
        """The last place that all come after which a run at `progress` has not given out."""
        left = min([*progress.pending(), *progress.backlog, progress.next])
        while len(self._places) > 1 and self._places[1][0] <= left:
            self._places.popleft()
        at, state = self._places[0]
        while self._digests and self._digests[0][0] < at:
            self._digests.popleft()
        until = min(progress.next, self._digests[-1][0] + 1 if self._digests else at)
        return {"at": at, "state": state, "until": until, "digest": self._digest(until)}

    def _digest(self, until: int) -> int:
        """Of the records from the first place on and before `until`."""
        found = 0
        for position, digest in self._digests:
            if position < until:
                found = crc32(digest.to_bytes(4, "little"), found)
        return found

    def _check(self, place: State) -> None:
        if self._digest(place["until"]) != place["digest"]:
            raise ValueError(
                f"the stream does not go on as it was: its records {place['at']} to {place['until']} are others than "
                "in the run that wrote this state. Expected the same files in the same order, and no shuffling within."
            )
