"""A checkpoint's weights as one file of safetensors, which any program reads without this library and runs nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mimo.training.checkpoints import manifest
from megatron_mimo.training.checkpoints.directories import found_at
from megatron_mimo.training.checkpoints.inert import check_inert, description_of
from megatron_mimo.training.ema import PREFIX, is_there

# Names of dtypes in the format's header.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_STATE = ("optimizer.", "chained_", PREFIX)


def export_weights(path: Path | str, file: Path | str, *, ema: bool = False) -> list[str]:
    """Writes the weights of a checkpoint to `file`, whole, whatever layout saved them; gives their names.

    Names are those of the checkpoint: layers of one kind are one tensor, `[layers, ...]`. One tensor at a time is in
    memory. Rank-local: call it on one rank, or without any process group.

    Args:
        path: directory of the checkpoint, of a `Trainer` or of Megatron's loop.
        file: `model.safetensors`, which is replaced once the new one is whole.
        ema: the averages of weights that have one, float32, in their place.

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
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
