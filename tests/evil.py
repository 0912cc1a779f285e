"""Checkpoints that run what is written in them where they are loaded unlooked at: each leaves a marker behind."""

import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_mimo.training.checkpoints import manifest


class Evil:
    """Unpickled, it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def described(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def describe(path: Path, description: object) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(description))


def put(path: Path, name: str, content: bytes, file: str = "__9_0.distcp", **place) -> None:
    """Puts bytes into a checkpoint, under the name of an object that it has or has not."""
    (path / file).write_bytes(content)
    description = described(path)
    index = next((each for each in description.storage_data if each.fqn == name), MetadataIndex(name))
    description.state_dict_metadata.setdefault(name, BytesStorageMetadata())
    description.storage_data[index] = _StorageInfo(file, 0, len(content), **place)
    describe(path, description)


def seal(path: Path, **changes) -> None:
    """Makes the hashes of a checkpoint fit its files, as one does who means harm; `changes` go into `mimo.json`."""
    content = json.loads((path / manifest.FILE).read_bytes()) | changes
    others = [each for each in path.iterdir() if each.is_file() and each.name not in (manifest.FILE, manifest.COMPLETE)]
    content["files"] = {each.name: asdict(manifest.hashed(each)) for each in others}
    (path / manifest.FILE).write_text(json.dumps(content))
    (path / manifest.COMPLETE).write_text(manifest.hashed(path / manifest.FILE).sha256)


def name_of(path: Path, word: str, kind: type = BytesStorageMetadata) -> str:
    """The first object of a kind whose name has `word` in it."""
    stored = described(path).state_dict_metadata
    return next(name for name, each in stored.items() if word in name and isinstance(each, kind))


def in_the_description(path: Path, marker: Path) -> None:
    description = described(path)
    description.planner_data = Evil(marker)
    describe(path, description)


def in_place_of_the_description(path: Path, marker: Path) -> None:
    describe(path, Evil(marker))


def in_the_description_of_a_rank(path: Path, marker: Path) -> None:
    (path / "__0.metadata").write_bytes(pickle.dumps(Evil(marker)))


def in_an_object(path: Path, marker: Path) -> None:
    word = "random" if any("random" in each for each in described(path).state_dict_metadata) else "rng_state"
    put(path, name_of(path, word), saved([Evil(marker)]))


def in_the_common_state(path: Path, marker: Path) -> None:
    put(path, name_of(path, "common_state"), saved([{"step": Evil(marker)}]))


def in_a_common_file(path: Path, marker: Path) -> None:
    (path / "common.pt").write_bytes(saved({"args": Evil(marker)}))


def in_a_tensor_of_bytes(path: Path, marker: Path) -> None:
    content = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": Evil(marker)})), dtype=torch.uint8)
    put(path, name_of(path, "_extra_state"), saved([content]))


def in_a_storage_of_a_tensor_of_bytes(path: Path, marker: Path) -> None:
    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (saved(Evil(marker)),)

    content = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": Storage()})), dtype=torch.uint8)
    put(path, name_of(path, "_extra_state"), saved([content]))


def in_a_tensor(path: Path, marker: Path) -> None:
    put(path, name_of(path, "output_layer", TensorStorageMetadata), saved(Evil(marker)))


def in_a_class(path: Path, marker: Path) -> None:
    """Sets an attribute of torch's own class, which every later checkpoint would have."""
    good = (path / ".metadata").read_bytes()
    assert good.endswith(b".")
    setting = b"ctorch.distributed.checkpoint.metadata\nStorageMeta\n(N}X\x07\x00\x00\x00modulesX\x04\x00\x00\x00evilst"
    (path / ".metadata").write_bytes(good[:-1] + setting + b"b0.")


def outside_the_directory(path: Path, marker: Path) -> None:
    (path.parent / "other").mkdir(exist_ok=True)
    put(path, name_of(path, "common_state"), saved([{}]), file="../other/file")


def under_a_transform(path: Path, marker: Path) -> None:
    put(path, name_of(path, "common_state"), saved([{}]), transform_descriptors=["stream.rot13"])


def sealed(make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """`make`, and the hashes fit what it made."""

    def made(path: Path, marker: Path) -> None:
        make(path, marker)
        if (path / manifest.FILE).exists():
            seal(path)

    return made


#: Kind -> what makes a checkpoint one of it.
KINDS: dict[str, Callable[[Path, Path], None]] = {
    kind.__name__: sealed(kind)
    for kind in (
        in_the_description,
        in_place_of_the_description,
        in_the_description_of_a_rank,
        in_an_object,
        in_the_common_state,
        in_a_common_file,
        in_a_tensor_of_bytes,
        in_a_storage_of_a_tensor_of_bytes,
        in_a_tensor,
        in_a_class,
        outside_the_directory,
        under_a_transform,
    )
}
#: Those that Megatron's `dist_checkpointing.load` runs.
RUN_BY_MEGATRON = ("in_the_description", "in_place_of_the_description", "in_an_object", "in_the_common_state")
