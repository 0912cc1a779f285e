"""Whether a checkpoint is data alone: loading runs nothing that is written in it.

`torch.distributed.checkpoint` unpickles the description of a checkpoint (`.metadata`) and every object in it that is no
tensor, and unpickling runs what the file says. So each of these is read here first, with names allowed one by one and
classes that can do nothing, before anything is loaded.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_mimo.compat.checkpoints import (
    DESCRIPTION_NAMES,
    EXTRA_STATE_NAMES,
    STORAGE_OF_BYTES,
    TENSOR_NAMES,
    megatron_globals,
)

_NOT_LOADED = (
    "Loading it would run what the file says, so nothing was loaded. Take the checkpoint from somebody you trust, or "
    "its weights from a file that holds tensors alone, such as safetensors."
)


class _Still:
    """Stands for an allowed class while a pickle is looked at: holds what it is given, does nothing."""

    def __init__(self, *given: object) -> None:
        self.given = given

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.state = (key, value)


class _Looking(pickle.Unpickler):
    """Unpickles allowed names alone, each as a class that does nothing."""

    def __init__(self, file: io.BufferedIOBase, names: Mapping[str, Set[str]]) -> None:
        super().__init__(file)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for an allowed name.

        Raises:
            UnpicklingError: the name is not allowed.
        """
        if name not in self._names.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        if (module, name) in STORAGE_OF_BYTES:
            return _look_into_bytes
        return type(name, (_Still,), {})

    def persistent_load(self, key: object) -> Any:
        """A tensor's values, which are not read."""
        return None


class _Describing(pickle.Unpickler):
    """Unpickles torch's description of a checkpoint with its own classes, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """The class.

        Raises:
            UnpicklingError: the name is not allowed.
        """
        if name not in DESCRIPTION_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Stored:
    """A tensor's chunk, or another object, in a checkpoint.

    Args:
        name: of the tensor or object.
        file: that holds it, in the checkpoint's directory.
        offset, length: where, in bytes.
        is_tensor: whether it is a tensor.
    """

    name: str
    file: Path
    offset: int
    length: int
    is_tensor: bool

    def read(self) -> bytes:
        """Its bytes."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def __str__(self) -> str:
        return f"{self.file}, object {self.name!r}"


def check_inert(path: Path | str) -> None:
    """Refuses a checkpoint whose loading would run what is written in it. Rank-local; nothing is executed.

    Looked at are the description, each object that is no tensor, files of `torch.save` that lie beside them, and the
    pickles that TransformerEngine keeps in tensors of bytes. torch reads tensors without running anything; see
    `check_tensors`.

    Args:
        path: directory of the checkpoint. One without a description is left to whoever loads it.

    Raises:
        ValueError: naming the file, the object in it and what it would run; or a file that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return
    for other in sorted((*path.glob("*.pt"), *path.glob("*.pth"))):
        _look(other.read_bytes(), str(other), other.name)
    for description in sorted(path.glob("*.metadata")):
        for each in stored(description):
            if not each.is_tensor:
                _look(each.read(), str(each), each.name)


def check_tensors(path: Path | str, part: int = 0, parts: int = 1) -> None:
    """Refuses a checkpoint with a tensor that torch would refuse to read. Rank-local; values are not read.

    torch refuses it too, once the tensors before it are loaded.

    Args:
        path: directory of the checkpoint.
        part, parts: which share of the tensors to look at; every rank takes one.

    Raises:
        ValueError: naming the file, the tensor and what it would run; or one that is cut short.
    """
    tensors = [each for each in stored(Path(path) / ".metadata") if each.is_tensor]
    for each in tensors[part::parts]:
        try:
            with each.file.open("rb") as file, zipfile.ZipFile(_Slice(file, each.offset, each.length)) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                _Looking(io.BytesIO(archive.read(name)), TENSOR_NAMES).load()
        except Exception as error:
            raise ValueError(f"{each} is not a tensor: {_first_sentence(error)}. {_NOT_LOADED}") from error


class _Slice(io.RawIOBase):
    """A part of a file, as a file to read."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new place, which `offset` is counted to from the start, from here or from the end."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next bytes, all that are left without a size."""
        left = max(self._length - self._at, 0)
        self._file.seek(self._offset + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def description_of(file: Path) -> Metadata:
    """What `.metadata` says: names, sizes and places of what a checkpoint holds. Runs nothing of it.

    Raises:
        ValueError: the file is no such description, or names what a description has no need of.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    try:
        _Looking(io.BytesIO(content), DESCRIPTION_NAMES).load()
        found = _Describing(io.BytesIO(content)).load()
    except Exception as error:
        raise ValueError(
            f"{file} is not the description of a checkpoint: {error}, expected torch's own records. {_NOT_LOADED}"
        ) from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected torch's Metadata. {_NOT_LOADED}")
    return found


def stored(file: Path) -> Iterator[Stored]:
    """Everything in the checkpoint that `file` describes.

    Raises:
        ValueError: as `description_of`; or an object outside the directory or in another form than it was written in.
    """
    found = description_of(file)
    for index, place in found.storage_data.items():
        name, where = index.fqn, place.relative_path
        if Path(where).name != where:
            raise ValueError(f"{file} keeps {name!r} in {where!r}, expected a file of its directory. {_NOT_LOADED}")
        if place.transform_descriptors:
            raise ValueError(
                f"{file} has {name!r} transformed by {place.transform_descriptors}, expected none. {_NOT_LOADED}"
            )
        is_tensor = not isinstance(found.state_dict_metadata.get(name), BytesStorageMetadata)
        if is_tensor and "_extra_state" in name:
            raise ValueError(f"{file} has {name!r} as a tensor, expected an object. {_NOT_LOADED}")
        yield Stored(name, file.parent / where, place.offset, place.length, is_tensor)


def _look(content: bytes, where: str, name: str) -> None:
    """Refuses bytes of `torch.save` that are more than data.

    Raises:
        ValueError: naming `where`.
    """
    try:
        with megatron_globals():
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            _look_into(found, "_extra_state" in name)
    except Exception as error:
        raise ValueError(f"{where} is not data alone: {_first_sentence(error)}. {_NOT_LOADED}") from error


def _look_into(value: object, extra: bool) -> None:
    """Looks at what will be unpickled a second time: bytes, and a tensor that is an `_extra_state` (`extra`)."""
    if isinstance(value, io.BytesIO):
        _look_into(_look_into_bytes(value.getvalue()), extra=False)
    elif isinstance(value, Tensor):
        if extra and value.numel():
            _Looking(io.BytesIO(value.contiguous().view(torch.uint8).numpy().tobytes()), EXTRA_STATE_NAMES).load()
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _look_into(each, "_extra_state" in str(key))
    elif isinstance(value, (list, tuple)):
        for each in value:
            _look_into(each, extra)


def _look_into_bytes(content: bytes) -> object:
    """A file of `torch.save` within another; empty where there is nothing in it."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) if content else None


def _first_sentence(error: Exception) -> str:
    """The point of torch's messages, which go on with advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    told = next((line for line in lines if "GLOBAL" in line or "WeightsUnpickler" in line), lines[0])
    return told.removeprefix("WeightsUnpickler error: ").partition(". ")[0].rstrip(".")
