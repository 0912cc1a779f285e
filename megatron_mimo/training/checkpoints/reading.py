"""Loading a checkpoint: looked at and compared first, then read beside the model, which changes last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mimo.compat.checkpoints import parallel_load
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.checkpoints import identity, manifest
from megatron_mimo.training.checkpoints.inert import check_inert, check_tensors, description_of, stored

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer.state."
# The optimizer's own copies of weights; the second name is that of a distributed one.
_MASTERS = (f"{_OPTIMIZER}fp32_param.", f"{_OPTIMIZER}param.")
# What a checkpoint has besides weights.
_STATE = ("optimizer.", "chained_")
_EMA = "ema."  # averages, which a run without them leaves where they are

Load = Callable[..., dict]


def read(
    wanted: dict,
    path: Path | str,
    load: Load = dist_checkpointing.load,
    *,
    whole: bool = True,
    **options: Any,
) -> dict:
    """What `wanted` describes, from a checkpoint that `check` has passed. Collective over all ranks.

    Tensors of the result lie on the host: the model has not changed yet.

    Args:
        wanted: sharded tensors and objects, as `dist_checkpointing.load` takes them.
        path: directory of the checkpoint.
        load: that function.
        whole: refuse a checkpoint that has more weights than `wanted`.
        options: its further arguments.

    Raises:
        ValueError: on every rank, before anything has changed: names or sizes differ, with every difference; or a
            file cannot be read (`Damaged`).
    """
    path = Path(path)
    everywhere = _keys_everywhere(wanted)
    agree(path, _differences(wanted, everywhere, path, whole))
    without_extra_state(wanted, path)
    beside = wanted if parallel_load(options.get("sharded_strategy")) else dict_list_map_outplace(_on_host, wanted)
    rows = list(_new_rows(wanted, beside, path))
    state, problems = {}, Problems()
    try:
        state = load(beside, str(path), **options)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        problems = Problems(damage=[f"cannot be read: {type(error).__name__}: {error}"])
    agree(path, problems)
    _fill(rows)
    return state


def check(path: Path, config: MimoModelConfig, *, whole: bool = True) -> None:
    """Refuses a checkpoint that is not whole, that would run something, or that is of another model.

    Collective over all ranks, each of which hashes its share of the files. Nothing is loaded.

    Args:
        path: directory of the checkpoint.
        config: of the model to load into.
        whole: whether it must be the same model; names and sizes of what is loaded are compared in any case.

    Raises:
        ValueError: on every rank; `Damaged` where it is not whole.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        found = manifest.read(path)
        damage = manifest.faults(path, found, rank, size) if found is not None else _cut_short(path)
        problems = Problems(damage=tuple(damage))
        if not problems.damage:
            problems = problems_of(path, config if whole else None)
        if problems == Problems():
            check_tensors(path, rank, size)
    except (manifest.Damaged, OSError) as error:
        problems = Problems(damage=[str(error)])
    except ValueError as error:
        problems = Problems(evil=[str(error)])
    agree(path, problems)


def _cut_short(path: Path) -> list[str]:
    """Files that a checkpoint without hashes lacks, or lacks the end of. Rank-local."""
    if dist.get_rank() == 0:
        logger.warning(
            "%s has no hashes of its files (release 0.1, or another program, wrote it): a changed file would not be "
            "noticed", path,
        )  # fmt: skip
    needed: dict[Path, int] = {}
    for each in stored(path / ".metadata"):
        needed[each.file] = max(needed.get(each.file, 0), each.offset + each.length)
    sizes = {file: file.stat().st_size if file.exists() else 0 for file in needed}
    return [
        f"{file.name}: {sizes[file]} bytes, expected at least {size}"
        for file, size in needed.items()
        if sizes[file] < size
    ]


@dataclass(frozen=True)
class Problems:
    """Why a checkpoint must not be loaded; nothing where it may.

    Args:
        evil: loading would run what the file says.
        damage: it is not as it was written, a line a file.
        differences: it is of another model, a line a difference.
    """

    evil: Sequence[str] = ()
    damage: Sequence[str] = ()
    differences: Sequence[str] = ()


def problems_of(path: Path, config: MimoModelConfig | None) -> Problems:
    """What is wrong with a checkpoint as far as its description, objects and manifest tell. Rank-local.

    Args:
        path: directory of the checkpoint.
        config: of the model to load into; None where another model's will do.
    """
    try:
        check_inert(path)
        found = manifest.read(path)
    except (manifest.Damaged, OSError) as error:
        return Problems(damage=[str(error)])
    except ValueError as error:
        return Problems(evil=[str(error)])
    if found is None or config is None:
        return Problems()
    return Problems(differences=tuple(identity.differences(found.model, identity.identity_of(config))))


def _differences(wanted: dict, everywhere: set[str], path: Path, whole: bool) -> Problems:
    """Names and sizes that differ, as this rank finds them."""
    try:
        return Problems(differences=_other_tensors(wanted, everywhere, description_of(path / ".metadata"), whole))
    except ValueError as error:
        return Problems(evil=[str(error)])


def agree(path: Path, problems: Problems) -> None:
    """Refuses on every rank what any of them has found. Collective over all ranks once there are process groups.

    Raises:
        Damaged: the checkpoint is not whole.
        ValueError: any other problem; with the lines of every rank, each once.
    """
    everywhere = [problems]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, problems)
        everywhere = gathered
    evil, damage, differences = (
        list(dict.fromkeys(line for of_rank in everywhere for line in getattr(of_rank, kind)))
        for kind in ("evil", "damage", "differences")
    )
    if evil:
        raise ValueError("\n  ".join(evil))
    if damage:
        raise manifest.Damaged(
            "\n  ".join([f"{path} is not whole, and nothing was loaded. Load the checkpoint before it:", *damage])
        )
    if differences:
        raise ValueError("\n  ".join([f"{path} is of another model, or of other options:", *differences]))


# What differs ----------------------------------------------------------------------------------------------------


def leaves(wanted: dict) -> Iterator[ShardedTensor | ShardedObject]:
    """Sharded tensors and objects of a state, with those that factories make."""
    for each in nested_values(wanted):
        if isinstance(each, ShardedTensorFactory):
            yield from nested_values(each.build())
        elif isinstance(each, ShardedTensor | ShardedObject):
            yield each


def _keys_everywhere(wanted: dict) -> set[str]:
    """Names of the tensors that any rank wants. Collective over all ranks."""
    mine = {each.key for each in leaves(wanted) if isinstance(each, ShardedTensor)}
    if dist.get_world_size() == 1:
        return mine
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return set().union(*gathered)


def _other_tensors(wanted: dict, everywhere: set[str], found: Metadata, whole: bool) -> list[str]:
    """Names and sizes that differ."""
    stored, lines = found.state_dict_metadata, {}
    for each in leaves(wanted):
        if isinstance(each, ShardedObject):
            if each.unique_key not in stored and not _is_extra_state(each):
                lines[each.key] = f"{each.key}: not there"
        elif each.key not in stored:
            lines[each.key] = f"{each.key}: not there"
        elif problem := _other_size(each, tuple(cast(TensorStorageMetadata, stored[each.key]).size)):
            lines[each.key] = f"{each.key}: {problem}"
    with_state = any(name.startswith(_STATE) for name in everywhere)
    if whole:
        lines |= {
            name: f"{name}: there, not here"
            for name, kind in stored.items()
            if isinstance(kind, TensorStorageMetadata)
            and name not in everywhere
            and (with_state or not name.startswith(_STATE))
            and not name.startswith(_EMA)
        }
    return [lines[name] for name in sorted(lines)]


def _other_size(each: ShardedTensor, there: tuple[int, ...]) -> str | None:
    here = tuple(each.global_shape)
    if there == here:
        return None
    if each.allow_shape_mismatch and len(there) == len(here) and there[1:] == here[1:]:
        # The rows of a table of tokens.
        return f"{there[0]} rows there, {here[0]} here; a smaller vocabulary cannot hold them" * (there[0] > here[0])
    return f"{list(there)} there, {list(here)} here"


def _is_extra_state(each: object) -> bool:
    return isinstance(each, ShardedObject) and "_extra_state" in each.key


def without_extra_state(wanted: dict, path: Path) -> None:
    """Takes out of `wanted` what TransformerEngine's layers keep besides weights, where a checkpoint has none of it.

    As those of torch's layers, which load into TransformerEngine's; these then begin with scales of their own.
    """
    stored = description_of(path / ".metadata").state_dict_metadata
    nested = [wanted]
    while nested:
        here = nested.pop()
        for name, each in list(here.items()):
            if isinstance(each, dict):
                nested.append(each)
            elif isinstance(each, ShardedObject) and _is_extra_state(each) and each.unique_key not in stored:
                del here[name]


# Reading beside the model ----------------------------------------------------------------------------------------


def _on_host(leaf: Any) -> Any:
    """A sharded tensor like `leaf` with memory of its own, on the host; anything else as it is."""
    if not isinstance(leaf, ShardedTensor | ShardedTensorFactory) or leaf.data is None:
        return leaf
    return replace(leaf, data=torch.empty_like(leaf.data, device="cpu", requires_grad=False).contiguous())


@dataclass(frozen=True)
class _Rows:
    """Rows of a table that are not in the checkpoint.

    Args:
        table: what is read, this rank's shard.
        first: of the rows, in the shard.
        values: that they keep.
    """

    table: Tensor
    first: int
    values: Tensor


def _new_rows(wanted: dict, beside: dict, path: Path) -> Iterator[_Rows]:
    """Rows to keep as they are: of weights, and of the optimizer's own copies of weights.

    Momenta of rows that the checkpoint does not have begin at 0, as Megatron has them.

    Args:
        wanted: the model's own tensors.
        beside: those that are read.
        path: directory of the checkpoint.
    """
    stored: Mapping[str, Any] = description_of(path / ".metadata").state_dict_metadata
    weights: dict[str, Tensor] = {}
    pairs = sorted(
        (
            (ours, read)
            for ours, read in zip(nested_values(wanted), nested_values(beside))
            if isinstance(ours, ShardedTensor) and ours.allow_shape_mismatch and ours.key in stored
        ),
        key=lambda pair: pair[0].key.startswith(_OPTIMIZER),
    )
    for ours, table in pairs:
        rows = stored[ours.key].size[0]
        first = max(rows - ours.global_offset[0], 0)
        weight = next((ours.key.removeprefix(each) for each in _MASTERS if ours.key.startswith(each)), ours.key)
        if first >= ours.local_shape[0] or weight.startswith(_OPTIMIZER):
            continue
        if weight == ours.key:
            weights[weight] = ours.data[first:].detach().cpu().clone()
            logger.info(
                "%s: the checkpoint has rows 0 to %d, rows %d to %d keep their initialisation",
                ours.key, rows - 1, rows, ours.global_shape[0] - 1,
            )  # fmt: skip
        # The optimizer's description holds no values yet; its copies begin as the weights do.
        yield _Rows(table.data, first, weights[weight])


@torch.no_grad()
def _fill(rows: list[_Rows]) -> None:
    for each in rows:
        each.table[each.first :] = each.values
