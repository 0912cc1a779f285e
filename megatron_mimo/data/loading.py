"""A data source for training: samples in order, read ahead by workers, packed, and back after a crash.

What a run has behind it is a few integers: the next position in the order, the positions whose samples wait in the
packing buffer, and those of packs that are made and not taken. They go into the checkpoint as JSON. Samples come back
from workers in the order they were asked for, so packs do not depend on how many workers there are.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_mimo.data.ahead import Ahead
from megatron_mimo.data.feeds import Feed, IndexedFeed, Left, Made, Making, Read, Skipped
from megatron_mimo.data.messages import SampleError
from megatron_mimo.data.packing import Packer, PackShape, Rows, RowShape
from megatron_mimo.data.packs import Pack, packed, padded, sources_of
from megatron_mimo.data.progress import Progress, State, redealt
from megatron_mimo.data.samples import Policy, SampleProcessor
from megatron_mimo.data.sources import Source, names_of
from megatron_mimo.data.streamed import StreamFeed
from megatron_mimo.data.streams import Stream

logger = logging.getLogger(__name__)

# Records of a stream, whose number is not known, that may be left out in a row. One whose media no reader takes is left
# out in a tenth of a millisecond, one whose file cannot be decoded in some.
_IN_A_ROW = 10_000


@dataclass(frozen=True)
class ReadingOptions:
    """How samples are read.

    Args:
        corrupt: "skip" leaves an unusable sample out and counts it, "stop" ends the run with its error.
        too_long: "drop" treats a sample that fits no pack as an unusable one, "refuse" ends the run, "cut" shortens its
            text.
        workers: processes that read ahead; 0 reads in this one.
        prefetch: samples that each worker is ahead, and packs that are made ahead.
        seed: of the order.
        shuffle: False keeps records as they stand.

    Raises:
        ValueError: a word or number that is none of these.
    """

    corrupt: Literal["skip", "stop"] = "skip"
    too_long: Policy = "drop"
    workers: int = 0
    prefetch: int = 4
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.corrupt not in ("skip", "stop"):
            raise ValueError(f"corrupt: expected 'skip' or 'stop', found {self.corrupt!r}")
        if self.too_long not in ("drop", "refuse", "cut"):
            raise ValueError(f"too_long: expected 'drop', 'refuse' or 'cut', found {self.too_long!r}")
        if self.workers < 0 or self.prefetch < 1:
            raise ValueError(f"expected workers >= 0 and prefetch >= 1, found {self.workers} and {self.prefetch}")


class PackedData:
    """Packs of one data-parallel rank, without end or for a number of samples.

    Args:
        sources: one or more, or a stream, whose records come in its own order whatever `options` say.
        process: makes samples of conversations.
        shape: of the packs; a `RowShape` makes batches of rows in place of packs.
        weights: share of each source; None: one after another as one, each record once an epoch.
        rank, size: of the data-parallel group. Ranks of one data-parallel rank share one `PackedData`.
        options: how samples are read.
        samples: end after so many of the order, over all ranks; None: never.
        pad_id: token between samples.

    Attributes:
        source_names: of a blend, by which a step tells its sources apart; empty of one source or a stream.

    Raises:
        ValueError: sources, weights or a rank that do not fit.

    Example:
        >>> data = PackedData([source], processor, PackShape(length=4096))        # doctest: +SKIP
        >>> pack = next(data)                                                     # doctest: +SKIP
        >>> data.load_state_dict(state)                                           # doctest: +SKIP
    """

    def __init__(
        self,
        sources: Sequence[Source] | Stream,
        process: SampleProcessor,
        shape: PackShape | RowShape,
        *,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        size: int = 1,
        options: ReadingOptions = ReadingOptions(),
        samples: int | None = None,
        pad_id: int = 0,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"expected a rank below the size of its group, found rank {rank} of {size}")
        making = Making(process, shape, options.too_long)
        if isinstance(sources, Stream):
            if weights is not None:
                raise ValueError(
                    f"{sources.name}: a stream is one source, expected weights=None, found {list(weights)}"
                )
            self._feed: Feed = StreamFeed(sources, making, rank=rank, size=size, limit=samples)
            self.source_names: tuple[str, ...] = ()
        else:
            self._feed = IndexedFeed(
                sources, making, weights=weights, seed=options.seed, shuffle=options.shuffle, size=size, limit=samples
            )
            self.source_names = names_of([source.path for source in sources]) if len(sources) > 1 else ()
        self._process, self._shape, self._options = process, shape, options
        self._limit, self._pad_id, self._rank, self._size = samples, pad_id, rank, size
        # A stream that deals its records out itself counts them on each rank.
        apart = isinstance(sources, Stream) and not sources.shared
        self._first, self._stride, self._apart = (0, 1, True) if apart else (rank, size, False)
        self._progress = Progress(next=self._first)
        self._taken = self._progress.state()
        self._running: Iterator[tuple[Pack, State]] | None = None

    def __iter__(self) -> PackedData:
        return self

    def __next__(self) -> Pack:
        """The next pack.

        Raises:
            StopIteration: `samples` are through.
            SampleError: a sample cannot be used and the options say to stop.
            ValueError: without end, and two passes over the data gave nothing that can be used.
        """
        if self._running is None:
            progress = Progress.of(self._progress.state())
            reads = self._feed.reads(progress, self._options.workers, self._options.prefetch)
            made = self._made(progress, reads)
            self._running = Ahead(made, self._options.prefetch) if self._options.workers else made
        pack, self._taken = next(self._running)
        return pack

    @property
    def skipped(self) -> dict[str, int]:
        """Samples that were left out up to the last pack taken, by kind."""
        return dict(self._taken["skipped"])

    def state_dict(self) -> State:
        """What this rank has behind it, as plain JSON: the order it stands for, and where in it."""
        return {"order": self._feed.identity(), "size": self._size, "ranks": {str(self._rank): self._taken}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of all ranks, of as many ranks as now or of another number.

        Args:
            state: from `joined_states` of every rank's `state_dict`; with one rank from `state_dict` itself.

        Raises:
            ValueError: the state is of other data or of another order, or lacks a rank.
        """
        found = state["order"]
        if found != self._feed.identity():
            raise ValueError(
                f"this state is of other data: expected {self._feed.identity()}, found {found}. Sources, weights, seed "
                "and shuffling must be those of the run that wrote it."
            )
        ranks = {int(rank): one for rank, one in state["ranks"].items()}
        if sorted(ranks) != list(range(state["size"])):
            raise ValueError(f"expected the states of {state['size']} ranks, found {sorted(ranks)}; see joined_states")
        same = state["size"] == self._size
        if self._apart and not same:
            raise ValueError(
                f"this state is of {state['size']} data-parallel ranks, expected {self._size}: the stream deals its "
                "records out to the ranks itself. Go on with as many."
            )
        mine = ranks[self._rank] if same else redealt(ranks, self._rank, self._size, self._limit)
        self.restore(mine)

    def sample_at(self, position: int) -> Made:
        """The conversation at a position of the order, the sample that it makes, and where its media lie.

        Raises:
            SampleError: it cannot be used.
        """
        return self._feed.made(position)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._process.chat.decode(ids)

    def state(self) -> State:
        """Where this rank stands, for `restore`."""
        return self._taken

    def restore(self, state: State) -> None:
        """Goes back to where this rank stood."""
        self.close()
        self._progress, self._taken = Progress.of(state), state

    def close(self) -> None:
        """Ends workers and what was read ahead."""
        if isinstance(self._running, Ahead):
            self._running.stop()
        self._running = None

    # Below: reading and packing -------------------------------------------------------------------

    def _made(self, progress: Progress, reads: Iterator[Read | Left]) -> Iterator[tuple[Pack, State]]:
        """Packs, each with the state of a run that has taken it."""
        shape = self._shape
        packer: Packer | Rows = Packer(shape) if isinstance(shape, PackShape) else Rows(shape)
        ready: deque[list[Read]] = deque()
        for positions in progress.ready:
            if known := self._again(reads, positions, progress):
                ready.append(known)
        packer.waiting = self._again(reads, progress.waiting, progress)
        in_a_row: list[Skipped] = []
        while True:
            while ready:
                samples = ready.popleft()
                progress.ready = [[read.position for read in pack] for pack in ready]
                yield self._packed(samples), self._feed.state(progress)
            read = next(reads, None)
            if read is None:
                break
            progress.passed(read.position, self._stride)
            if isinstance(read, Left):
                self._leave_out(read.skipped, progress)
                in_a_row.append(read.skipped)
                self._check_some_can_be_used(in_a_row)
                continue
            in_a_row.clear()
            ready.extend(packer.add(read))
            progress.waiting = [one.position for one in packer.waiting]
        for samples in packer.flush():
            ready.append(samples)
        while ready:
            samples = ready.popleft()
            progress.waiting, progress.ready = [], [[read.position for read in pack] for pack in ready]
            yield self._packed(samples), self._feed.state(progress)

    def _again(self, reads: Iterator[Read | Left], positions: Sequence[int], progress: Progress) -> list[Read]:
        """Samples that were read before the run was resumed; one whose file is gone since is left out now."""
        found = [next(reads) for _ in positions]
        for read in found:
            if isinstance(read, Left):
                self._leave_out(read.skipped, progress)
        return [read for read in found if isinstance(read, Read)]

    def _packed(self, reads: Sequence[Read]) -> Pack:
        samples, positions = [read.sample for read in reads], [read.position for read in reads]
        if isinstance(self._shape, RowShape):
            pack = padded(samples, self._shape.length, pad_id=self._pad_id, positions=positions)
        else:
            pack = packed(samples, self._shape, pad_id=self._pad_id, positions=positions)
        if len(self.source_names) < 2:
            return pack
        return replace(pack, sources=sources_of(pack, [self._feed.source_of(position) for position in positions]))

    def _check_some_can_be_used(self, left: Sequence[Skipped]) -> None:
        """Refuses to go on without end where two whole passes gave nothing."""
        known = self._feed.records
        # Two orders one after the other have up to two passes between the same record.
        if self._limit is not None or len(left) < (_IN_A_ROW if known is None else 2 * known):
            return
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(one.kind for one in left).items()))
        raise ValueError(
            f"data: expected records that this model can use, found none among {len(left)} in a row ({kinds}), such as "
            f"{left[-1].reason.rstrip('.')}. Mend the data, or give a model that takes it"
        )

    def _leave_out(self, skipped: Skipped, progress: Progress) -> None:
        stops = self._options.corrupt == "stop" and skipped.kind not in ("too_long", "too_costly")
        if stops or (skipped.kind in ("too_long", "too_costly") and self._options.too_long == "refuse"):
            raise SampleError(skipped.kind, skipped.reason)
        if progress.skipped[skipped.kind] == 0:
            logger.warning("data: left out as %s, and counted from now on: %s", skipped.kind, skipped.reason)
        progress.skipped[skipped.kind] += 1
