"""This rank's parameters -> a checkpoint: gathered tensor by tensor, written as they arrive."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mimo.hf.files import CODES, INDEX, SINGLE, Stored
from megatron_mimo.hf.reading import Place
from megatron_mimo.hf.table import Piece, Shape, Table

#: As transformers has it.
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Outgoing:
    """One tensor of a checkpoint, which the first rank writes.

    Args:
        name: in the checkpoint.
        shape, dtype: of it.
        tensor: gives it on the first rank, None elsewhere; every rank calls it, in the order of the list.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    tensor: Callable[[], Tensor | None]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Held:
    """What one rank has of one tensor: a piece of a parameter."""

    ours: str
    piece: Piece


def outgoing(
    parameters: Mapping[str, nn.Parameter],
    table: Table,
    place: Place,
    *,
    prefix: str = "",
    carried: Mapping[str, Stored] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Outgoing]:
    """The tensors of one part of a model. Collective over all ranks.

    Args:
        parameters: this rank's, by the table's names; none where another stage has the part.
        table: of the part.
        place: of this rank.
        prefix: before the table's names.
        carried: where the tensors are that the part does not compute with, by the table's names.
        dtype: to write; None for the parameters', and for the files' of tensors that are carried along.

    Raises:
        ValueError: a tensor of which no rank has a piece.
    """
    rules = {rule.ours: rule for rule in table.rules}
    mine: dict[str, list[tuple[Held, str]]] = {}
    for ours, parameter in parameters.items():
        for piece in [] if rules[ours].copy else rules[ours].pieces(*place.of(rules[ours]), parameter.shape[0]):
            code = CODES[dtype or parameter.dtype]
            mine.setdefault(piece.name, []).append((Held(ours, piece), code))
    holders = _gathered(mine)
    found, written = [], {name: shape for rule in table.rules if not rule.copy for name, shape in rule.theirs.items()}
    for name, shape in written.items():
        if name not in holders:
            raise ValueError(f"{prefix}{name}: expected a rank that holds it, found none; the model lacks the part.")
        found.append(_gatherable(prefix + name, name, shape, holders[name], parameters))
    for name, stored in (carried or {}).items():
        as_what = dtype or _dtype(stored.dtype)
        found.append(Outgoing(prefix + name, stored.shape, as_what, _read_on_first_rank(stored, as_what)))
    return found


def _dtype(code: str) -> torch.dtype:
    return next(dtype for dtype, known in CODES.items() if known == code)


def _read_on_first_rank(stored: Stored, dtype: torch.dtype) -> Callable[[], Tensor | None]:
    return lambda: stored.read().to(dtype) if _rank() == 0 else None


def _gathered(mine: Mapping[str, list[tuple[Held, str]]]) -> dict[str, list[tuple[int, Held, str]]]:
    """Name -> who sends which piece of it: of those that have the same one, the first rank."""
    of_all: list = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        of_all = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, mine)
    holders: dict[str, list[tuple[int, Held, str]]] = {}
    for rank, held in enumerate(of_all):
        for name, pieces in held.items():
            senders = holders.setdefault(name, [])
            known = {sender.piece for _, sender, _ in senders}
            senders += [(rank, one, code) for one, code in pieces if one.piece not in known]
    return {name: _one_cover(pieces) for name, pieces in holders.items()}


def _one_cover(pieces: list[tuple[int, Held, str]]) -> list[tuple[int, Held, str]]:
    """Pieces that fill a tensor once; stages that share an embedding each have all of it."""
    whole = [one for one in pieces if one[1].piece.dim is None]
    return whole[:1] or pieces


def _gatherable(
    name: str,
    theirs: str,
    shape: Shape,
    holders: Sequence[tuple[int, Held, str]],
    parameters: Mapping[str, nn.Parameter],
) -> Outgoing:
    dtype = _dtype(holders[0][2])

    def tensor() -> Tensor | None:
        whole = torch.zeros(shape, dtype=dtype) if _rank() == 0 else None
        for rank, held, _ in holders:
            part = _sent(rank, held, parameters, dtype, shape)
            if whole is None or part is None:
                continue
            piece = held.piece
            if piece.dim is None:
                whole.copy_(part.reshape(shape))
            else:
                whole.narrow(piece.dim, piece.start, piece.stop - piece.start).copy_(part)
        return whole

    return Outgoing(name, shape, dtype, tensor)


@torch.no_grad()
def _sent(
    rank: int, held: Held, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, shape: Shape
) -> Tensor | None:
    """A piece on the first rank, None on the others."""
    piece, me = held.piece, _rank()
    part = torch.empty(0)
    if me == rank:
        parameter = parameters[held.ours].detach()
        if piece.dim is None:
            part = parameter.reshape(-1)
        else:
            part = parameter.narrow(piece.dim, piece.at, piece.stop - piece.start)
        part = part.to(dtype).contiguous()
    if rank == 0:
        return part
    if me == rank:
        dist.send(part, 0)
        return None
    if me == 0:
        sizes = list(shape)
        if piece.dim is None:
            sizes = [torch.Size(shape).numel()]
        else:
            sizes[piece.dim] = piece.stop - piece.start
        received = torch.empty(sizes, dtype=dtype, device=_device())
        dist.recv(received, rank)
        return received.cpu()
    return None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


# Files --------------------------------------------------------------------------------------------------------------


def write(directory: Path, tensors: Sequence[Outgoing], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `tensors` into safetensors files, and an index where there is more than one. Collective over all ranks.

    Args:
        directory: that is there.
        tensors: in any order, the same on every rank.
        max_shard_bytes: of a file; one tensor may be larger.
    """
    shards = list(_sharded(sorted(tensors, key=lambda one: one.name), max_shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        if _rank() == 0:
            with File(directory / name, shard) as file:
                for one in shard:
                    file.write(one.tensor())
        else:
            for one in shard:
                one.tensor()
    if _rank() == 0 and len(shards) > 1:
        weight_map = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        index = {"metadata": {"total_size": sum(one.size for one in tensors)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _sharded(tensors: Sequence[Outgoing], limit: int) -> Iterator[list[Outgoing]]:
    shard, size = list[Outgoing](), 0
    for one in tensors:
        if shard and size + one.size > limit:
            yield shard
            shard, size = [], 0
        shard.append(one)
        size += one.size
    if shard:
        yield shard


class File:
    """A safetensors file that is written tensor after tensor, so that no two of them are in memory.

    Args:
        path: of the file, which is complete when the `with` block ends.
        tensors: that will be written, in that order.
    """

    def __init__(self, path: Path, tensors: Sequence[Outgoing]) -> None:
        self._path, self._tensors, self._written = path, tensors, 0

    def __enter__(self) -> Self:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for one in self._tensors:
            code, start = CODES[one.dtype], end
            end += one.size
            header[one.name] = {"dtype": code, "shape": list(one.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        self._file = open(self._partial, "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    @property
    def _partial(self) -> Path:
        return self._path.with_name(self._path.name + ".partial")

    def write(self, tensor: Tensor | None) -> None:
        """Appends the next tensor.

        Raises:
            ValueError: it is not what was announced.
        """
        announced = self._tensors[self._written]
        if tensor is None or (tensor.shape, tensor.dtype) != (torch.Size(announced.shape), announced.dtype):
            found = None if tensor is None else (tensor.dtype, list(tensor.shape))
            raise ValueError(f"{announced.name}: expected {announced.dtype} {list(announced.shape)}, found {found}.")
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink()


# A directory that comes whole or not at all --------------------------------------------------------------------------

#: In a directory that `save_pretrained` has not finished; a broken save may be written again.
_OURS = ".being_written"


def begin(directory: Path, unfinished: Path) -> None:
    """Makes the directory that becomes `directory` once it is whole; one that an earlier save left is thrown away.

    Raises:
        FileExistsError: one of the two holds something of somebody else's.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory}: expected no file and no directory with files, found one. Choose another.")
    if unfinished.exists() and not (unfinished / _OURS).is_file():
        raise FileExistsError(f"{unfinished}: expected none, which is written first, found one of somebody else.")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / _OURS).touch()


def finish(unfinished: Path, directory: Path) -> None:
    """Puts what is whole in its place."""
    if directory.exists():
        directory.rmdir()
    (unfinished / _OURS).unlink()
    os.replace(unfinished, directory)
