"""Private and undocumented names behind a checkpoint: version, reason, and what to do when they go.

Checked by `tests/unit/test_compat.py` on the installed versions; last read in Megatron-Core 0.19.2 and torch 2.11.
Nothing is imported from Megatron until a function is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

#: Names that torch's description of a checkpoint (`.metadata`) may hold, by module. Classes without behaviour of their
#: own, written by `torch.distributed.checkpoint` 2.1 to 2.11; the last three modules are in files of Megatron-Core up
#: to 0.15 and of its cached plans.
#:
#: Private among them: `_StorageInfo`, `_MEM_FORMAT_ENCODING` and `torch.serialization._get_layout`, by which torch
#: spells a file's place, a memory format and a layout.
#: When one goes: see what `find_class` is asked for while `FileSystemReader.read_metadata` reads a file of that
#: version, and add names that run nothing.
DESCRIPTION_NAMES = {
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
}  # fmt: skip

#: Names that TransformerEngine's `_extra_state` may hold, which it unpickles from a tensor of bytes: numbers, and the
#: recipes of its low precisions, which are records.
#:
#: Undocumented: what `TransformerEngineBaseModule.get_extra_state` writes, versions 1.0 to 2.9.
#: When one goes: an fp8 checkpoint of that version is refused by the name that is missing here.
EXTRA_STATE_NAMES = {
    "builtins": {"bool", "bytes", "dict", "float", "int", "list", "str", "tuple"},
    "collections": {"OrderedDict"},
    "torch": {"Size", "BFloat16Storage", "ByteStorage", "FloatStorage", "HalfStorage", "IntStorage", "LongStorage"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"UntypedStorage", "TypedStorage", "_load_from_bytes"},
    "transformer_engine.common.recipe": {
        "DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MMParams", "MXFP8BlockScaling",
        "NVFP4BlockScaling", "QParams", "_FormatHelper",
    },
    "megatron.core.safe_globals": {"safe_load_from_bytes"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct"},
    "numpy._core.multiarray": {"_reconstruct"},
}  # fmt: skip

#: Names that the pickle in a file of `torch.save(tensor)` may hold; torch's own ``weights_only=True`` takes more.
#:
#: Private: `torch._utils._rebuild_tensor_v2` (since torch 0.4) and `_rebuild_tensor_v3` (since 1.13).
#: When one goes: see what `find_class` is asked for while a tensor's `data.pkl` is read.
TENSOR_NAMES = {
    "collections": {"OrderedDict"},
    "torch": DESCRIPTION_NAMES["torch"] | {name for name in vars(torch) if name.endswith("Storage")},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor_v3"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
}

#: Names by which a pickled storage brings its bytes along: they are another file of `torch.save`, which torch loads
#: with ``weights_only=False``. Megatron puts its own function in the place of torch's.
STORAGE_OF_BYTES = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))


@contextmanager
def megatron_globals() -> Iterator[None]:
    """Within it, ``torch.load(weights_only=True)`` takes what Megatron's checkpoints hold besides tensors.

    Undocumented: `megatron.core.safe_globals.SAFE_GLOBALS`, the classes that Megatron registers with torch for its own
    ``torch.load``.
    Reason: the common state of a run of `megatron.training` holds its arguments, enumerations and counters. An empty
    `io.BytesIO`, which TransformerEngine's layers had without fp8, is written by the name `bytes`.
    When it goes: look at what `megatron.training.initialize` registers.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals([*SAFE_GLOBALS, bytes]):
        yield


@contextmanager
def checkpoints_by(**replacements: Any) -> Iterator[None]:
    """Within it, `megatron.training` loads and saves by the given functions.

    Undocumented: that `megatron.training.checkpointing` looks up `load`, `load_common_state_dict` and `save` in the
    package `megatron.core.dist_checkpointing` whenever it calls them.
    Reason: Megatron's own loader executes what a file says, and neither keeps nor compares what the model is.
    When it goes: see what `load_checkpoint` and `save_checkpoint` call.

    Args:
        replacements: a function of `megatron.core.dist_checkpointing` by its name.
    """
    from megatron.core import dist_checkpointing

    before = {name: getattr(dist_checkpointing, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(dist_checkpointing, name, replacement)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist_checkpointing, name, function)


def directory_to_load(args: Any, load: str) -> Path | None:
    """The directory of the step that `megatron.training` would load from `load`; None where it finds none.

    Undocumented: `megatron.training.checkpointing.get_checkpoint_tracker_filename`, `get_checkpoint_name` and the
    option `ckpt_step`, which wins over the tracker.
    Reason: what is there is looked at before Megatron reads any of it.
    When it goes: `load/latest_checkpointed_iteration.txt` names the step, `load/iter_0000001` is its directory.
    """
    from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

    tracker = Path(get_checkpoint_tracker_filename(load))
    said = tracker.read_text().strip() if tracker.is_file() else ""
    step = args.ckpt_step or (int(said) if said.isdecimal() else None)
    if step is None and said != "release":
        return None
    path = Path(get_checkpoint_name(load, step or 0, release=step is None, return_base_dir=True))
    return path if path.is_dir() else None
