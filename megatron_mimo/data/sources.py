"""Files -> records by number: JSON lines, a folder, Parquet and `datasets` on disk.

A source is map-style: `source.record(index)` is the same record in every process, every run and for every number of
workers, so a run resumes from an integer. A source opens no media; it says below which directory they lie.
"""

from __future__ import annotations

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_mimo.data.messages import SampleError

Columns = Literal["read", "write"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_KIND_OF = {suffix: kind for kind, all in (("image", IMAGES), ("audio", SOUNDS), ("video", VIDEOS)) for suffix in all}


class Source(ABC):
    """Records by number.

    Args:
        path: what it reads.
        media_root: the directory that paths of media are relative to and must lie in.
        columns: whether media beside a text are "read" or to be learned to "write".

    Attributes:
        alone: files of media that are no records, since they have no text.
    """

    alone: tuple[str, ...] = ()

    def __init__(self, path: Path | str, media_root: Path | str | None, columns: Columns) -> None:
        check_columns(columns)
        self.path = Path(path)
        self.media_root = None if media_root is None else Path(media_root)
        self.columns: Columns = columns

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abstractmethod
    def record(self, index: int) -> Mapping[str, Any]:
        """Record `index`, from 0.

        Raises:
            SampleError: that record cannot be read.
        """

    def where(self, index: int) -> str:
        """How an error names record `index`."""
        return f"record {index} of {self.path}"


def names_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """A short name of each path, that no other has.

    Example:
        >>> names_of([Path("a/train.jsonl"), Path("b/train.jsonl"), Path("pictures")])
        ('a-train', 'b-train', 'pictures')
    """
    parts = [path.with_suffix("").parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(part for part in each[-length:] if part != "/") for each in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{name}-{index}" for index, name in enumerate("-".join(each[-1:]) for each in parts))


def check_columns(columns: Columns) -> None:
    """Refuses anything but "read" and "write".

    Raises:
        ValueError: naming both.
    """
    if columns not in ("read", "write"):
        raise ValueError(f"columns: expected 'read' or 'write', found {columns!r}")


class JsonLines(Source):
    """A record a line. The file stays where it is: lines are found by byte offsets.

    Args:
        path: of the file.
        media_root: default: the file's directory.
        columns: see `Source`.
        max_line_bytes: a longer line is refused unread; media as `data:` URLs make lines long.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "train.jsonl")
        ...     _ = path.write_text('{"text": "one"}\\n\\n{"text": "two"}\\n')
        ...     source = JsonLines(path)
        ...     len(source), source.record(1)
        (2, {'text': 'two'})
    """

    def __init__(
        self,
        path: Path | str,
        *,
        media_root: Path | str | None = None,
        columns: Columns = "read",
        max_line_bytes: int = 64 * 2**20,
    ) -> None:
        super().__init__(path, Path(path).parent if media_root is None else media_root, columns)
        self.max_line_bytes = max_line_bytes
        self._spans = _line_spans(self.path)
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def record(self, index: int) -> Mapping[str, Any]:
        start, stop = self._spans[index].tolist()
        if stop - start > self.max_line_bytes:
            raise SampleError(
                "huge_line",
                f"expected a line of at most {self.max_line_bytes} bytes (max_line_bytes), found {stop - start}",
            )
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        # pread has no position, so forked workers may share the open file.
        return parsed(os.pread(self._file, stop - start, start))

    def where(self, index: int) -> str:
        return f"line at byte {int(self._spans[index][0])} of {self.path}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        opened = self.__dict__.get("_file")
        if opened is not None:
            os.close(opened)


def _line_spans(path: Path) -> np.ndarray:
    """int64 `[lines, 2]`: first byte and end of every line that is not blank."""
    starts, at = [0], 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            starts += (np.flatnonzero(np.frombuffer(block, np.uint8) == 0x0A) + at + 1).tolist()
            at += len(block)
        bounds = np.array([*starts, at] if starts[-1] != at else starts, dtype=np.int64)
        spans = np.stack([bounds[:-1], bounds[1:]], axis=1)
        # A blank line holds its end, perhaps after a few spaces; anything longer is a record.
        short = np.flatnonzero(spans[:, 1] - spans[:, 0] <= 4)
        blank = [
            index
            for index in short.tolist()
            if not os.pread(file.fileno(), 4, spans[index, 0])[: _size(spans, index)].strip()
        ]
    return np.delete(spans, blank, axis=0)


def _size(spans: np.ndarray, index: int) -> int:
    return int(spans[index, 1] - spans[index, 0])


def parsed(line: bytes) -> Mapping[str, Any]:
    """The record that the bytes of a line or file of JSON hold.

    Raises:
        SampleError: no UTF-8, no JSON, or no object.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(
            "encoding", f"expected UTF-8, found byte 0x{line[error.start]:02x} at {error.start}"
        ) from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("json", f"expected a line of JSON: {str(error)[:200]}") from None
    if not isinstance(record, dict):
        raise SampleError("form", f"expected an object with names in a line, found a {type(record).__name__}")
    return record


class Records(Source):
    """Records in memory, such as those of one JSON list.

    Args:
        records: mappings.
        path: what errors call it.
        media_root: None takes no paths.
        columns: see `Source`.

    Example:
        >>> Records([{"text": "one"}]).record(0)
        {'text': 'one'}
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        path: Path | str = "memory",
        media_root: Path | str | None = None,
        columns: Columns = "read",
    ) -> None:
        super().__init__(path, media_root, columns)
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Mapping[str, Any]:
        return self._records[index]


class Folder(Source):
    """Media with their texts in a directory: `name.png` beside `name.txt`, or `metadata.jsonl` / `metadata.csv`.

    Metadata name each record's file in `file_name`; without them every medium that has a text of its name is a record.

    Args:
        path: of the directory.
        media_root: default: the directory itself.
        columns: see `Source`.
        unanswered: whether media without a text are records too: questions without an answer.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        media_root: Path | str | None = None,
        columns: Columns = "read",
        unanswered: bool = False,
    ) -> None:
        super().__init__(path, path if media_root is None else media_root, columns)
        self._unanswered = unanswered
        self._lines = JsonLines(self.path / "metadata.jsonl") if (self.path / "metadata.jsonl").exists() else None
        self._rows = _rows(self.path / "metadata.csv") if self._lines is None else []
        media = {} if self._lines is not None or self._rows else _media(self.path)
        self._pairs = [name for name, told in media.items() if told or unanswered]
        alone = [name for name, told in media.items() if not told and not unanswered]
        if not len(self):
            none = f"none (media end with {', '.join(_KIND_OF)})"
            found = f"{len(alone)} without, such as {alone[0]}" if alone else none
            raise ValueError(
                f"{self.path}: expected metadata.jsonl, metadata.csv, or media with a .txt of their name, found {found}"
            )
        self.alone = tuple(alone)

    def __len__(self) -> int:
        return len(self._rows or self._pairs) if self._lines is None else len(self._lines)

    def record(self, index: int) -> Mapping[str, Any]:
        if self._lines is not None:
            return _with_file(self._lines.record(index))
        if self._rows:
            return _with_file(self._rows[index])
        medium = self._pairs[index]
        kind = _KIND_OF[Path(medium).suffix.lower()]
        file = (self.path / medium).with_suffix(".txt")
        if self._unanswered and not file.exists():
            return {kind: medium}
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError("encoding", f"expected UTF-8 in the text: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise SampleError("missing", f"the text of {medium} cannot be opened: {error.strerror}") from None
        return {kind: medium, "text": text.strip()}


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _media(root: Path) -> dict[str, bool]:
    """Media below a directory, and whether a text of its name lies beside each."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders.sort()
        texts = {name for name in names if name.endswith(".txt")}
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in _KIND_OF:
                found[os.path.relpath(os.path.join(folder, name), root)] = f"{stem}.txt" in texts
    return found


def _with_file(record: Mapping[str, Any]) -> Mapping[str, Any]:
    name = record.get("file_name")
    if name is None:
        return record
    kind = _KIND_OF.get(Path(str(name)).suffix.lower())
    if kind is None:
        raise SampleError("form", f"file_name: expected an image, a sound or a video, found {name!r}")
    return {**{key: value for key, value in record.items() if key != "file_name"}, kind: name}


class Table(Source):
    """Rows of Parquet files or of a data set that `datasets` saved; images and sounds stay encoded until needed.

    Args:
        path: a `.parquet` file, a directory of them, or one made by `Dataset.save_to_disk`.
        media_root: default: the directory.
        columns: see `Source`.

    Raises:
        ImportError: `datasets` is not installed (extra `data`).
    """

    def __init__(self, path: Path | str, *, media_root: Path | str | None = None, columns: Columns = "read") -> None:
        path = Path(path)
        super().__init__(path, (path if path.is_dir() else path.parent) if media_root is None else media_root, columns)
        self._rows = encoded(_opened(path))

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Mapping[str, Any]:
        return self._rows[index]


def _opened(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{path} needs datasets: pip install 'megatron-mimo[data]'") from error
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    return datasets.Dataset.from_parquet([str(file) for file in files])


def encoded(table: Any) -> Any:
    """A table or stream of `datasets`, images and sounds as bytes or paths: a broken one is then one sample's fault."""
    import datasets

    features = table.features
    for name, feature in features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
            table = table.cast_column(name, type(feature)(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, (datasets.Image, datasets.Audio)):
            table = table.cast_column(name, datasets.List(type(feature.feature)(decode=False)))
    return table


def open_source(
    path: Path | str,
    *,
    media_root: Path | str | None = None,
    columns: Columns = "read",
    unanswered: bool = False,
) -> Source:
    """The source that a path stands for, by its suffix or by what the directory holds.

    Args:
        path: `.jsonl`, `.json` (one list), `.parquet`, a directory saved by `datasets`, of Parquet files, or of media.
        media_root: default: the file's directory, or the directory itself.
        columns: where a record has a text and media alone, whether these are "read" or to be learned to "write".

        unanswered: whether media of a folder that have no text are records too, to be asked about.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: nothing that can be read as records.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file or directory of training data, found nothing")
    if path.is_dir():
        tabled = (path / "state.json").exists() or next(path.rglob("*.parquet"), None) is not None
        if tabled:
            return Table(path, media_root=media_root, columns=columns)
        return Folder(path, media_root=media_root, columns=columns, unanswered=unanswered)
    if path.suffix == ".jsonl":
        return JsonLines(path, media_root=media_root, columns=columns)
    if path.suffix == ".parquet":
        return Table(path, media_root=media_root, columns=columns)
    if path.suffix == ".json":
        records = json.loads(path.read_text("utf-8"))
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a JSON list of records, found a {type(records).__name__}")
        return Records(
            records, path=path, media_root=path.parent if media_root is None else media_root, columns=columns
        )
    raise ValueError(f"{path}: expected .jsonl, .json, .parquet or a directory, found {path.suffix or 'no suffix'!r}")
