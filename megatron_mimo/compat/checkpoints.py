"""Private and undocumented names behind a checkpoint: version, reason, and what to do when they go.

Checked by `tests/unit/test_compat.py` on the installed versions; last read in Megatron-Core 0.19.2 and torch 2.11.
Nothing is imported from Megatron until a function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_mimo.compat.megatron import single_optimizers, writers_report_here

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
    `io.BytesIO`, which TransformerEngine's layers had without fp8, is written by the name `bytes`. A run that stops at
    a NaN adds the calls that found it: `rerun_state_machine.Call` and `Caller`, named tuples of strings and numbers.
    When it goes: look at what `megatron.training.initialize` registers.
    """
    from megatron.core.rerun_state_machine import Call, Caller
    from megatron.core.safe_globals import SAFE_GLOBALS

    with torch.serialization.safe_globals([*SAFE_GLOBALS, bytes, Call, Caller]):
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
    """The directory of the step that `megatron.training` would load from `load`; None where nothing names a step.

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
    return Path(get_checkpoint_name(load, step or 0, release=step is None, return_base_dir=True))


@contextmanager
def background_saves_by(queue: Any) -> Iterator[None]:
    """Within it, `megatron.training` hands its ``--async-save`` checkpoints to `queue`, and starts no process for them.

    Private: `megatron.training.async_utils._async_calls_queue`, with the methods `schedule_async_request`,
    `maybe_finalize_async_calls`, `get_num_unfinalized_calls` and `close`; and
    `megatron.training.initialize.init_persistent_async_worker`, which starts the process.
    Reason: a thread of this process writes; a process of Megatron's outlives a killed rank.
    When it goes: see what `schedule_async_save` and `maybe_finalize_async_save` call.
    """
    from megatron.training import async_utils, initialize

    before, async_utils._async_calls_queue = async_utils._async_calls_queue, queue
    start, initialize.init_persistent_async_worker = initialize.init_persistent_async_worker, lambda *_: None
    try:
        yield
    finally:
        async_utils._async_calls_queue, initialize.init_persistent_async_worker = before, start


@contextmanager
def deleting_by_threads() -> Iterator[None]:
    """Within it, `megatron.training` deletes checkpoints (``--save-retain-interval``) in threads.

    Undocumented: that the functions that end a save ask `args.async_save` whether to fork a process for that.
    Reason: a process that is forked beside threads of gloo, NCCL and CUDA may hang.
    When it goes: see what `save_checkpoint` does with `save_retain_interval`.
    """
    from megatron.training import get_args

    args = get_args()
    before, args.async_save = args.async_save, False
    try:
        yield
    finally:
        args.async_save = before


# Writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Planned:
    """What a rank writes of a checkpoint, planned by Megatron and written by us.

    Args:
        directory: of the checkpoint.
        writer: torch's, which describes the checkpoint at the end.
        metadata: of the whole checkpoint, on rank 0.
        finalize_fns: what Megatron would call at the end; `describe` does that work.
    """

    directory: Path
    writer: Any
    metadata: Any
    finalize_fns: list[Any] = field(default_factory=list)

    @property
    def files(self) -> list[tuple[str, list[tuple[Any, Any]]]]:
        """Name and content of each file: items, with the bytes or the tensor of each."""
        return [(name, [*objects, *tensors]) for _, name, (objects, tensors) in self.writer.write_buckets]

    def replace(self, stage: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts what `stage` gives for each tensor in its place."""
        self.writer.write_buckets = [
            (path, name, (objects, [(item, stage(tensor)) for item, tensor in tensors]))
            for path, name, (objects, tensors) in self.writer.write_buckets
        ]


def planned(
    save: Callable[..., Any], state: dict, directory: Path | str, strategy: Any = None, **options: Any
) -> Planned:
    """What this rank would write by ``save(state, directory, strategy, **options)``; nothing is written.

    Collective over all ranks.

    Private: `TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks(writer, result, async_strategy)`, called
    last by `async_save`; `FullyParallelSaveStrategyWrapper.base_strategy`; and `FileSystemWriterAsync.write_buckets`, a
    list of `(path, name, (objects, tensors))`.
    Reason: Megatron writes in a process that it forks or spawns, hashes on one rank, and leaves the other ranks waiting
    where one fails.
    When it goes: see what `TorchDistSaveShardedStrategy.async_save` does after `save_state_dict_async_plan`.

    Args:
        save: `dist_checkpointing.save`.
        state: sharded tensors and objects.
        directory: of the checkpoint, which exists.
        strategy: Megatron's, None for its default.
        options: as `save` takes them.
    """
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    strategy = strategy or TorchDistSaveShardedStrategy()
    base = strategy.base_strategy if isinstance(strategy, FullyParallelSaveStrategyWrapper) else strategy
    base._get_save_and_finalize_callbacks = lambda writer, result, _: Planned(Path(directory), writer, result[1])
    try:
        with writers_report_here():
            return save(
                state, str(directory), strategy, async_sharded_save=True, async_strategy="mcore",
                verify_integrity=False, **options,
            )  # fmt: skip
    finally:
        del base._get_save_and_finalize_callbacks


def write_item(plan: Planned, stream: Any, item: Any, data: Any, name: str) -> Any:
    """Writes one item of a plan to `stream`, and gives torch's note of its place.

    Private: `torch.distributed.checkpoint.filesystem._write_item(transforms, stream, data, item, name, format)`, since
    torch 2.1, with `transforms` since 2.7 and `format` since 2.8; `FileSystemWriter.transforms` likewise.
    Reason: the same file as Megatron writes, through a stream of ours.
    When it goes: bytes are written as they are, a tensor by `torch.save`; the note has offset and length.
    """
    from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

    if isinstance(data, torch.Tensor):
        data = data.cpu()
    return _write_item(plan.writer.transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)


def describe(plan: Planned, results: list[list[Any]]) -> None:
    """Writes the description of a checkpoint, once all ranks have written; called on rank 0.

    Undocumented: `dist_checkpointing.core.save_config` and `CheckpointingConfig`, which write `metadata.json`.
    Reason: Megatron does it in a function that waits for every rank, also where rank 0 fails.
    When it goes: the file is ``{"sharded_backend": "torch_dist", "sharded_backend_version": 1}``.

    Args:
        plan: of rank 0.
        results: what `write_item` gave, by rank.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    plan.writer.finish(plan.metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(plan.directory))


def parallel_load(strategy: object) -> bool:
    """Whether a strategy of Megatron's exchanges what it reads between ranks.

    Undocumented: `FullyParallelLoadStrategyWrapper`, made by ``--ckpt-fully-parallel-load``.
    Reason: it exchanges tensors where they are to be, on the device; others can be read to the host first.
    When it goes: read in place wherever a strategy is given.
    """
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    return isinstance(strategy, FullyParallelLoadStrategyWrapper)


def with_steps_of_all(state: Any, gathered: Callable[[Any], list[Any]]) -> None:
    """Has an optimizer's state say how many steps were taken on each rank, also on one of whose weights none train.

    Undocumented: `sharded_state_dict` of Megatron's optimizers: ``["state"]["common_step"]`` of Adam of torch, and
    ``["param_groups"][i]["step"]`` of TransformerEngine's and of a distributed one, where the rank has a weight.
    Reason: the first rank's is what the file says of all. A first pipeline stage that is frozen says nothing: loading
    then fails for the one (seen), and by their code the others would begin to count anew (not tried).
    When it goes: leave the call out, if a checkpoint of a frozen first stage keeps the steps of the second.

    Args:
        state: as `sharded_state_dict` gives it; changed in place.
        gathered: gives every rank's value on every rank.

    Example:
        >>> state = {"optimizer": {"param_groups": [{"lr": 1.0}]}}
        >>> with_steps_of_all(state, lambda own: [own, [(None, 7)]])
        >>> state
        {'optimizer': {'param_groups': [{'lr': 1.0, 'step': 7}]}}
    """
    nodes = list(_nodes_with_groups(state))
    own = [(_plain(node.get("state", {}).get("common_step")), _step_of_groups(node["param_groups"])) for node in nodes]
    for ranks, node in zip(zip(*gathered(own)), nodes):
        common, of_groups = (next((each[i] for each in ranks if each[i] is not None), None) for i in range(2))
        if common is not None and isinstance(node.get("state"), dict):
            node["state"].setdefault("common_step", common)
        for group in node["param_groups"] if of_groups is not None else ():
            if group.get("step") is None:
                group["step"] = of_groups


def _step_of_groups(groups: Sequence[Mapping[str, Any]]) -> Any:
    return _plain(next((group["step"] for group in groups if group.get("step") is not None), None))


def _plain(step: Any) -> Any:
    """A step as another rank can take it: a tensor of a device would come to it with the device."""
    return step.cpu() if isinstance(step, torch.Tensor) else step


def _nodes_with_groups(state: Any) -> Iterator[dict]:
    """The states of single optimizers within one, in the order of every rank."""
    if not isinstance(state, dict):
        return
    if isinstance(state.get("param_groups"), list):
        yield state
        return
    for value in state.values():
        yield from _nodes_with_groups(value)


def other_groups(optimizer: Any, state: Any) -> str | None:
    """Why the parameter groups of a loaded state are not those of an optimizer; None where they are.

    Private: `MegatronOptimizer._filter_and_reorder_param_groups(current, saved)`, which raises ValueError.
    Reason: Megatron asks it while it loads, when the weights, and other optimizers of the chain, are loaded already.
    When it goes: leave the call out, if `load_state_dict` then takes groups of other options.

    Args:
        optimizer: Megatron's.
        state: for its `load_state_dict`; changes nothing in it.
    """
    single = single_optimizers(optimizer)
    numbered = [(key, own) for key, own in state.items() if isinstance(key, int)]
    # What was asked for of the tensors stands beside what the file says of the groups, in whichever form each has.
    states = [state] if _groups_of(state) else [own for _, own in sorted(numbered) if _groups_of(own)]
    if len(states) != len(single):
        return (
            f"expected the state of {len(single)} optimizers, found that of {len(states)}: with expert parallelism "
            "experts have one of their own, without it they share the other parameters'."
        )
    for each, own in zip(single, states):
        groups = _groups_of(own)
        try:
            each._filter_and_reorder_param_groups(
                [dict(group) for group in each.optimizer.param_groups],
                [{"params": [], **group} for group in groups],  # a distributed one adds its own
            )
        except ValueError as error:
            return " ".join(str(error).split())
    return None


def _groups_of(state: Any) -> list[dict]:
    return state.get("optimizer", state).get("param_groups", [])


def registered(buffer: torch.Tensor) -> bool:
    """Tells CUDA of a host buffer, so that copies from a GPU run beside the host; whether that worked.

    Undocumented: `torch.cuda.cudart().cudaHostRegister(address, bytes, flags)`, since torch 1.9.
    Reason: torch's own allocator of pinned memory rounds up to a power of two, and keeps what it had.
    When it goes: ``torch.empty(..., pin_memory=True)``.
    """
    if not torch.cuda.is_available():
        return False
    return int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0


def unregistered(buffer: torch.Tensor) -> None:
    """Undoes `registered`.

    Undocumented, reason, when it goes: see `registered`.
    """
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
