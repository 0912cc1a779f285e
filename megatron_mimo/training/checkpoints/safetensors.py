"""A checkpoint's weights as one file of safetensors, which any program reads without this library and runs nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf.files import DTYPES, read_header
from megatron_mimo.launch import Run
from megatron_mimo.training.checkpoints import manifest
from megatron_mimo.training.checkpoints.directories import found_at
from megatron_mimo.training.checkpoints.inert import check_inert, description_of
from megatron_mimo.training.checkpoints.weights import write_weights
from megatron_mimo.training.ema import PREFIX, is_there

# Names of dtypes in the format's header.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_STATE = ("optimizer.", "chained_", PREFIX)


#: Of the file's metadata: where the model's configuration is read from.
SOURCE = "source"


def export_weights(path: Path | str, file: Path | str, *, ema: bool = False, source: str | None = None) -> list[str]:
    """Writes the weights of a checkpoint to `file`, whole, whatever layout saved them; gives their names.

    Names are those of the checkpoint: layers of one kind are one tensor, `[layers, ...]`. One tensor at a time is in
    memory. Rank-local: call it on one rank, or without any process group.

    Args:
        path: directory of the checkpoint, of a `Trainer` or of Megatron's loop.
        file: `model.safetensors`, which is replaced once the new one is whole.
        ema: the averages of weights that have one, float32, in their place.
        source: a directory or name that the model's configuration is read from, which the file keeps.

    Raises:
        ValueError: loading the checkpoint would run what it says, or it has a dtype that the format lacks, or no
            averages where they are asked for; `Damaged` where a file is not as it was written.

    Example:
        >>> export_weights("run/step_00001000", "model.safetensors")              # doctest: +SKIP
    """
    path, file = found_at(Path(path)), Path(file)
    check_inert(path)
    if (written := manifest.read(path)) is not None and (told := manifest.faults(path, written)):
        raise manifest.Damaged(f"{path} is not whole, expected its files as they were written: {'; '.join(told)}")
    described = description_of(path / ".metadata").state_dict_metadata
    tensors = {name: kind for name, kind in described.items() if isinstance(kind, TensorStorageMetadata)}
    if ema and not is_there(tensors):
        raise ValueError(f"{path} has no averages of weights; its run had no ema_decay. Export it without them.")
    read = {name: f"{PREFIX}{name}" if ema and f"{PREFIX}{name}" in tensors else name for name in tensors}
    stored = {name: tensors[read[name]] for name in sorted(tensors) if not name.startswith(_STATE)}
    names = list(stored)
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | ({} if source is None else {SOURCE: source})}
    end = 0
    for name in names:
        dtype, size = stored[name].properties.dtype, list(stored[name].size)
        if dtype not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {dtype}, which safetensors lacks; expected one of {[*_DTYPES.values()]}"
            )
        start, end = end, end + torch.Size(size).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = file.with_name(f"writing_{file.name}")
    with unfinished.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
            checkpoint.load({read[name]: tensor}, checkpoint_id=path, no_dist=True)
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)
    return names


def source_of(file: Path) -> str | None:
    """Where the configuration of the model in a file of `export_weights` is read from; None where it does not say.

    Raises:
        ValueError: no file of safetensors, or one that is not whole.
    """
    read_header(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        found = json.loads(stream.read(length)).get("__metadata__") or {}
    return found.get(SOURCE)


def import_weights(file: Path, path: Path, config: MimoModelConfig, run: Run) -> None:
    """Writes a file of `export_weights` as a checkpoint, which `load_parts` reads for any layout. Collective over all
    ranks, of which the first one reads the file; all of it is in memory meanwhile.

    Args:
        file: of safetensors.
        path: directory of the checkpoint.
        config: of the model.
        run: the layout and its process groups.

    Raises:
        ValueError: no file of safetensors, or one that is not whole.
        OSError: on every rank, where it cannot be written.
    """
    weights = {}
    for name, stored in read_header(file).items():
        # On other ranks no page of it is touched.
        tensor = stored.read() if run.rank == 0 else torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        weights[name] = ShardedTensor.from_rank_offsets(name, tensor, replica_id=run.rank)
    write_weights(path, weights, config)
