"""What a checkpoint consists of: its model and its files, with the hash of each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.checkpoints.identity import differences, identity_of

#: In a checkpoint's directory: what it is, as JSON.
FILE = "mimo.json"
#: Written last, with the hash of `FILE`: a directory without it was cut short. Empty in checkpoints of release 0.1.
COMPLETE = "complete"
#: Of `FILE`. A higher one is refused; checkpoints of release 0.1 have no such file.
FORMAT = 1

_BLOCK = 1 << 22


class Damaged(ValueError):
    """A checkpoint that is not whole: a file is missing, cut, changed or of somewhere else."""


class LaterFormat(ValueError):
    """A checkpoint that a later release has written."""


@dataclass(frozen=True)
class Hashed:
    """A file of a checkpoint.

    Args:
        bytes: its size.
        sha256: its hash, in hexadecimal digits.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Args:
        model: what the model is, as `identity_of` has it.
        files: every file besides this one, by name.
        losses: of an evaluation at that step, by term.
    """

    model: Mapping[str, Any]
    files: Mapping[str, Hashed]
    losses: Mapping[str, float] = field(default_factory=dict)


def write(directory: Path, config: MimoModelConfig, files: Mapping[str, Hashed], losses: Mapping[str, float]) -> None:
    """Writes what a checkpoint consists of, and that it is complete.

    Args:
        directory: of the checkpoint, whole but for these two files.
        config: of the model.
        files: those that are hashed already; the others are hashed here.
        losses: of an evaluation at that step.
    """
    others = {path.name for path in directory.iterdir() if path.is_file()} - {*files, FILE, COMPLETE}
    files = {**files, **{name: hashed(directory / name) for name in others}}
    content = {
        "format": FORMAT,
        "model": identity_of(config),
        "files": {name: asdict(each) for name, each in sorted(files.items())},
        "losses": dict(losses),
    }
    text = json.dumps(content, indent=1, sort_keys=True).encode()
    write_durably(directory / FILE, text)
    write_durably(directory / COMPLETE, hashlib.sha256(text).hexdigest().encode())


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that outlives a crash of the machine."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> Manifest | None:
    """What a checkpoint consists of; None where it does not say, as those of release 0.1 and of other programs.

    Raises:
        Damaged: the file is not the one that was written.
        ValueError: it is of a later format.
    """
    file, complete = directory / FILE, directory / COMPLETE
    said = complete.read_bytes() if complete.is_file() else b""
    if not file.exists():
        if said:
            raise Damaged(f"{directory} has no {FILE}, which was written with it")
        return None
    text = file.read_bytes()
    if said != hashlib.sha256(text).hexdigest().encode():
        raise Damaged(f"{file} is not the file that was written with this checkpoint ({complete.name} has its hash)")
    try:
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise LaterFormat(
                f"{file} has format {content['format']}, expected at most {FORMAT}: a later release of megatron-mimo "
                "wrote it. Load it with that release."
            )
        differences(content["model"], content["model"])
        files = {name: Hashed(**each) for name, each in content["files"].items()}
        return Manifest(content["model"], files, content["losses"])
    except LaterFormat:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file} does not say what the checkpoint is: {error!r}") from error


def faults(directory: Path, manifest: Manifest, part: int = 0, parts: int = 1, *, contents: bool = True) -> list[str]:
    """What of a checkpoint is not as it was written, a line a file. Rank-local.

    Args:
        directory: of the checkpoint.
        manifest: what it consists of.
        part, parts: which share of the files to hash; every rank takes one.
        contents: False looks at names and sizes alone.
    """
    there = {path.name: path.stat().st_size for path in directory.iterdir()}
    found = [f"{name}: was not written with this checkpoint" for name in {*there} - {*manifest.files, FILE, COMPLETE}]
    for index, (name, expected) in enumerate(sorted(manifest.files.items())):
        if name not in there:
            found.append(f"{name}: missing")
        elif there[name] != expected.bytes:
            found.append(f"{name}: {there[name]} bytes, expected {expected.bytes}")
        elif contents and index % parts == part and hashed(directory / name) != expected:
            found.append(f"{name}: changed since it was written")
    return found


def hashed(path: Path) -> Hashed:
    """Size and hash of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return Hashed(size, digest.hexdigest())
