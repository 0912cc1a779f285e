"""Megatron Energon's data sets as a stream: WebDataset and blends of it, and where it stands as plain JSON.

Energon shuffles, blends and deals shards out to the data-parallel ranks; samples are made by this library's workers, so
that packs do not depend on how many there are.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_mimo.data.messages import SampleError
from megatron_mimo.data.progress import State
from megatron_mimo.data.sources import Columns, check_columns
from megatron_mimo.data.streams import Stream, Streamed

_FIELDS = ("worker_states", "next_worker_id", "micro_batch_size")
_PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
_SOUNDS = ("wav", "flac", "mp3", "ogg", "opus", "m4a")
_VIDEOS = ("mp4", "mkv", "webm", "mov", "avi")
_KINDS = {end: kind for kind, ends in (("image", _PICTURES), ("audio", _SOUNDS), ("video", _VIDEOS)) for end in ends}


class EnergonStream(Stream):
    """A data set that `energon prepare` made, or a blend of several (`MetadatasetV2`), read as encoded files.

    Each data-parallel rank reads its own shards, so a run goes on with as many ranks as it had.

    Args:
        path: the directory with `.nv-meta`, or the blend's `.yaml`.
        columns: whether media beside a text are "read" or to be learned to "write".
        record_of: Energon's sample -> record and files that it names; None: `energon_record`, which knows crude samples
            and Energon's own of captions, questions and text.
        split: of the data set.
        shuffle: samples of Energon's shuffle buffer; 0 keeps them as they stand.

    Raises:
        FileNotFoundError: no such data set.
        ImportError: Energon is not installed (extra `energon`).

    Example:
        >>> data = PackedData(EnergonStream("blend.yaml"), process, shape)        # doctest: +SKIP
    """

    shared = False

    def __init__(
        self,
        path: Path | str,
        *,
        columns: Columns = "read",
        record_of: Callable[[Any], tuple[Mapping[str, Any] | bytes, Mapping[str, bytes]]] | None = None,
        split: str = "train",
        shuffle: int = 100,
    ) -> None:
        check_columns(columns)
        self.path = Path(path)
        if not is_energon(self.path):
            raise FileNotFoundError(
                f"{self.path}: expected a directory with .nv-meta, as `energon prepare` makes it, or a blend's .yaml"
            )
        self._energon = _imported(self.path)
        self.name, self.columns = self.path.name, columns
        self._record_of = energon_record if record_of is None else record_of
        self._split, self._shuffle = split, shuffle
        self._loader: Any = None

    def identity(self) -> State:
        return {"energon": self.name, "split": self._split, "shuffle": self._shuffle}

    def start(self, state: State | None, rank: int, size: int) -> Iterator[Streamed]:
        energon = self._energon
        dataset = energon.get_train_dataset(
            self.path,
            split_part=self._split,
            worker_config=energon.WorkerConfig(rank=rank, world_size=size, num_workers=0),
            batch_size=1,
            shuffle_buffer_size=self._shuffle or None,
            max_samples_per_sequence=None,
            task_encoder=_encoder(energon),
        )
        # The watchdog is a thread of its own, beside which our workers would be forked.
        self._loader = energon.get_savable_loader(dataset, watchdog_timeout_seconds=None)
        if state is not None:
            self._loader.restore_state_rank(_state_of(state))
        return (self._streamed(sample) for sample in self._loader)

    def state(self) -> State:
        found = self._loader.save_state_rank()
        return {name: plain(getattr(found, name)) for name in _FIELDS}

    def _streamed(self, sample: Any) -> Streamed:
        name = f"sample {_part(sample, '__key__')} of {self.path}"
        try:
            record, files = self._record_of(sample)
        except SampleError as error:
            return Streamed(error, name=name)
        return Streamed(record, files, name)


def is_energon(path: Path) -> bool:
    """Whether a path is one that Energon reads.

    Example:
        >>> is_energon(Path("train.jsonl"))
        False
    """
    return (path / ".nv-meta").is_dir() or (path.suffix in (".yaml", ".yml") and path.is_file())


def energon_record(sample: Any) -> tuple[Mapping[str, Any] | bytes, dict[str, bytes]]:
    """The record of one of Energon's samples, and the files that it names.

    A crude sample is its files by their ends: `json` is a record whose media are named by their ends (`"image":
    "png"`), else `txt` is the text beside the media. Captions, questions and text of Energon's own types are records of
    columns.

    Args:
        sample: with its files as bytes.

    Raises:
        SampleError: a text that is no UTF-8.
        ValueError: none of these.

    Example:
        >>> energon_record({"__key__": "1", "txt": b"A cat", "png": b"..."})
        ({'text': 'A cat', 'image': 'png'}, {'png': b'...'})
    """
    if isinstance(sample, Mapping):
        files = {name: data for name, data in sample.items() if not name.startswith("__") and isinstance(data, bytes)}
        if "json" in files:
            return files.pop("json"), files
        named = {kind: end for end in files if (kind := _KINDS.get(end.rsplit(".", 1)[-1].lower())) is not None}
        if "txt" in files:
            return {"text": _text(files.pop("txt")), **named}, files
    image = _part(sample, "image")
    files = {"image": image} if isinstance(image, bytes) else {}
    named = dict.fromkeys(files, "image")
    for name in ("caption", "text"):
        if (text := _part(sample, name)) is not None:
            return {"text": _text(text), **named}, files
    if (question := _part(sample, "context")) is not None and (answers := _part(sample, "answers")):
        answer = answers if isinstance(answers, (str, bytes)) else answers[0]
        return {"question": _text(question), "answer": _text(answer), **named}, files
    raise ValueError(
        f"{type(sample).__name__}: expected json or txt among its files, or a sample of captions, questions or text, "
        f"found {sorted(name for name in _names(sample) if not name.startswith('__'))}. Give EnergonStream a record_of."
    )


def load_energon_state(path: Path | str, *, trusted: bool = False) -> State:
    """Where a loader of Energon stood that wrote its own state with `torch.save`, as a state of `EnergonStream`.

    Such a file is a pickle: reading it runs what it says. This library's own checkpoints hold none.

    Args:
        path: of the file.
        trusted: says that whoever could write the file may run code here.

    Raises:
        ValueError: it is not trusted, or holds no state of a loader without workers.
        ImportError: Energon is not installed (extra `energon`).
    """
    if not trusted:
        raise ValueError(
            f"{path}: Energon's own state is a pickle, and reading it runs what it says. Give trusted=True if nobody "
            "else could write it."
        )
    _imported(Path(path))
    import torch
    from megatron.energon.savable_loader import SavableDataLoaderState

    found = torch.load(path, weights_only=False)
    if not isinstance(found, SavableDataLoaderState) or len(found.worker_states) != 1:
        raise ValueError(f"{path}: expected the state of one rank's loader without workers, found {type(found)}")
    return {name: plain(getattr(found, name)) for name in _FIELDS}


def plain(node: Any) -> Any:
    """Nested dicts, lists, tuples, numbers, text and bytes as JSON; `lively` gives them back.

    Raises:
        TypeError: anything else.

    Example:
        >>> lively(plain({"keys": ("a", 1), "rng": b"123"}))
        {'keys': ('a', 1), 'rng': b'123'}
    """
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, bytes):
        return {"bytes": base64.b64encode(zlib.compress(node)).decode()}
    if isinstance(node, list):
        return [plain(one) for one in node]
    if isinstance(node, tuple):
        return {"tuple": [plain(one) for one in node]}
    if isinstance(node, Mapping):
        return {"dict": [[plain(name), plain(one)] for name, one in node.items()]}
    if type(node).__name__ == "SliceState":  # the one class of Energon's own in a state of it
        return {"slice": [node.index, node.current]}
    raise TypeError(f"expected a state of dicts, lists, numbers, text and bytes, found {type(node).__name__}")


def lively(node: Any) -> Any:
    """What `plain` made JSON of; nothing in it is run.

    Raises:
        ValueError: JSON that `plain` does not make.
    """
    if isinstance(node, list):
        return [lively(one) for one in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        ((kind, value),) = node.items()
        if kind == "bytes":
            return zlib.decompress(base64.b64decode(value))
        if kind == "tuple":
            return tuple(lively(one) for one in value)
        if kind == "slice":
            from megatron.energon.flavors.webdataset.sample_loader import SliceState

            return SliceState(index=value[0], current=value[1])
        if kind == "dict":
            return {lively(name): lively(one) for name, one in value}
    raise ValueError(f"expected a state as EnergonStream writes it, found {json.dumps(node)[:100]}")


def _state_of(state: State) -> Any:
    from megatron.energon.savable_loader import SavableDataLoaderState
    from megatron.energon.state import FlexState

    def flexible(node: Any) -> Any:
        """Energon tells its own dicts by their class."""
        if isinstance(node, dict):
            return FlexState({name: flexible(one) for name, one in node.items()})
        if isinstance(node, (list, tuple)):
            return type(node)(flexible(one) for one in node)
        return node

    return SavableDataLoaderState(**{name: flexible(lively(state[name])) for name in _FIELDS})


def _encoder(energon: Any) -> Any:
    """What leaves Energon's samples as they are, files as bytes."""

    class Untouched(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(_as_it_is(energon)),)

        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: list[Any]) -> Any:
            return samples[0]

    return Untouched()


def _as_it_is(energon: Any) -> Callable[[Any], Any]:
    @energon.stateless
    def cook(sample: Any) -> Any:
        return sample

    return cook


def _imported(path: Path) -> Any:
    try:
        import megatron.energon
    except ImportError as error:
        raise ImportError(f"{path} needs Megatron Energon: pip install 'megatron-mimo[energon]'") from error
    return megatron.energon


def _names(sample: Any) -> list[str]:
    return list(sample if isinstance(sample, Mapping) else vars(sample))


def _part(sample: Any, name: str) -> Any:
    return sample.get(name) if isinstance(sample, Mapping) else vars(sample).get(name)


def _text(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise SampleError("encoding", f"expected UTF-8 in the text: {error.reason} at byte {error.start}") from None
