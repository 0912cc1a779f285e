"""Records that come one after another and have no numbers: streams, and where one stands in them.

A stream is read in one place of each data-parallel rank, in its own order; workers make samples of what was read. What
it says of its position goes into the checkpoint as JSON.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from megatron_mimo.compat.datasets import shuffles
from megatron_mimo.data.messages import Conversation, Medium, Part, SampleError, Turn, conversation_of
from megatron_mimo.data.progress import State
from megatron_mimo.data.sources import Columns, check_columns, encoded, parsed


@dataclass(frozen=True)
class Streamed:
    """One record of a stream.

    Args:
        record: of any spelling that `conversation_of` knows, the bytes of its JSON, or why there is none.
        files: media that came along, by the names that the record has for them.
        name: how errors call it; "" for its number in the run.
    """

    record: Mapping[str, Any] | bytes | SampleError
    files: Mapping[str, bytes] = field(default_factory=dict)
    name: str = ""

    def conversation(self, columns: Columns) -> Conversation:
        """The conversation, media that came along in their places.

        Raises:
            SampleError: the record cannot be used.

        Example:
            >>> streamed = Streamed(b'{"image": "png", "text": "A cat"}', {"png": b"..."})
            >>> streamed.conversation("read").media()[0][1].medium.data
            b'...'
        """
        if isinstance(self.record, SampleError):
            raise self.record
        record = parsed(self.record) if isinstance(self.record, bytes) else self.record
        conversation = conversation_of(record, columns=columns)
        if not self.files:
            return conversation
        return Conversation(tuple(replace(turn, parts=self._parts(turn)) for turn in conversation.turns))

    def _parts(self, turn: Turn) -> tuple[Part, ...]:
        def found(part: Part) -> Part:
            data = None if part.medium is None or part.medium.path is None else self.files.get(part.medium.path)
            return part if data is None else replace(part, medium=Medium(data=data))

        return tuple(found(part) for part in turn.parts)

    def digest(self) -> int:
        """A number that another record is unlikely to have."""
        record = self.record if isinstance(self.record, bytes) else repr(self.record).encode()
        found = crc32(record)
        for name, data in self.files.items():
            found = crc32(data, crc32(name.encode(), found))
        return found


class Stream(ABC):
    """Records one after another, without end.

    Attributes:
        name: what it reads, for messages.
        columns: see `Source`.
        media_root: the directory that paths of media must lie in; None takes no paths.
        shared: whether it gives every data-parallel rank the same records, of which each takes its own; else it deals
            them out itself, and a run goes on with as many ranks alone.
    """

    name: str
    columns: Columns = "read"
    media_root: Path | None = None
    shared: bool = True

    @abstractmethod
    def identity(self) -> State:
        """What tells it from others, in JSON."""

    @abstractmethod
    def start(self, state: State | None, rank: int, size: int) -> Iterator[Streamed]:
        """The records from where `state` says; None: from the first.

        Args:
            state: of `state`, in this process or another.
            rank, size: of the data-parallel group.

        Raises:
            ValueError: a state of another stream.
        """

    @abstractmethod
    def state(self) -> State:
        """Where the records that were started last stand, in JSON."""


class DatasetsStream(Stream):
    """An `IterableDataset` of `datasets`, such as `load_dataset(..., streaming=True)`, from its first to its last
    record and again.

    Every data-parallel rank reads all of it and makes samples of its own share.

    Args:
        dataset: unshuffled: a shuffle buffer does not come back after a crash.
        media_root: None takes no paths; images and sounds of the dataset come as bytes.
        columns: see `Source`.
        name: what tells it from other streams, in checkpoints.

    Raises:
        ValueError: a shuffled dataset.
        ImportError: `datasets` is not installed (extra `data`).

    Example:
        >>> stream = DatasetsStream(load_dataset("parquet", data_files="*.parquet", split="train", streaming=True))
        ...                                                                        # doctest: +SKIP
    """

    def __init__(
        self, dataset: Any, *, media_root: Path | str | None = None, columns: Columns = "read", name: str = "datasets"
    ) -> None:
        check_columns(columns)
        if shuffles(dataset):
            raise ValueError(
                f"{name}: expected a dataset without shuffle(), found one whose buffer would not come back after a "
                "crash: a run would go on with other records. Shuffle the files, or save the dataset to disk and open "
                "it with open_source, which shuffles exactly."
            )
        self.name, self.columns = name, columns
        self.media_root = None if media_root is None else Path(media_root)
        self._dataset = encoded(dataset) if dataset.features else dataset
        self._first = self._dataset.state_dict()
        self._epoch = 0

    def identity(self) -> State:
        return {"stream": self.name}

    def start(self, state: State | None, rank: int, size: int) -> Iterator[Streamed]:
        self._epoch = 0 if state is None else int(state["epoch"])
        self._dataset.load_state_dict(self._first if state is None else state["dataset"])
        return self._records()

    def state(self) -> State:
        # A copy: what datasets gives is counted on in place.
        return {"epoch": self._epoch, "dataset": json.loads(json.dumps(self._dataset.state_dict()))}

    def _records(self) -> Iterator[Streamed]:
        empty = 0
        while True:
            empty += 1
            for record in self._dataset:
                empty = 0
                yield Streamed(record)
            # A run may go on behind the last record of an epoch, but no two passes in a row give nothing.
            if empty == 2:
                raise ValueError(f"{self.name}: expected at least one record, found none")
            self._epoch += 1
            self._dataset.load_state_dict(self._first)
