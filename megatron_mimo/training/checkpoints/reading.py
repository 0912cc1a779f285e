"""Loading a checkpoint: looked at and compared first, then read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.checkpoints import identity
from megatron_mimo.training.checkpoints.inert import check_inert, check_tensors, description_of

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer.state."
# The optimizer's own copies of weights; the second name is that of a distributed one.
_MASTERS = (f"{_OPTIMIZER}fp32_param.", f"{_OPTIMIZER}param.")

Load = Callable[..., dict]


def read(
    wanted: dict, path: Path | str, config: MimoModelConfig, load: Load = dist_checkpointing.load, **options: Any
) -> dict:
    """What `wanted` describes, from a checkpoint of the same model. Collective over all ranks.

    Args:
        wanted: sharded tensors and objects, as `dist_checkpointing.load` takes them.
        path: directory of the checkpoint.
        config: of the model to load into.
        load: that function.
        options: its further arguments.

    Raises:
        ValueError: on every rank, before anything has changed: loading would run what the file says, or the
            checkpoint is of another model.
    """
    path = Path(path)
    agree(problems_of(path, config, wanted))
    rows = list(_new_rows(wanted, path))
    state = load(wanted, str(path), **options)
    _restore(rows)
    return state


def problems_of(path: Path, config: MimoModelConfig, wanted: dict | None = None) -> list[str]:
    """Why this rank must not load a checkpoint, a line each. Rank-local.

    Args:
        path: directory of the checkpoint.
        config: of the model to load into.
        wanted: what would be loaded, where that is known already.
    """
    try:
        check_inert(path)
        theirs = identity.read(path)
        found = [] if theirs is None else identity.differences(theirs, identity.identity_of(config))
        if wanted is not None:
            check_tensors(path, dist.get_rank(), dist.get_world_size())
            found += list(_rows_too_many(wanted, path))
    except ValueError as error:
        return [str(error)]
    return [f"{path} is of another model:", *found] if found else []


def agree(problems: list[str]) -> None:
    """Refuses on every rank what any of them has found. Collective over all ranks.

    Raises:
        ValueError: with the lines of every rank, each once.
    """
    everywhere: list[list[str]] = [problems]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everywhere = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, problems)
    told = list(dict.fromkeys(line for of_rank in everywhere for line in of_rank))
    if told:
        raise ValueError("\n  ".join(told))


# Rows of tokens that a checkpoint does not have ------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Rows of a table that are not in the checkpoint.

    Args:
        table: this rank's shard.
        first: of the rows, in the shard.
        before: what the rows held before anything was loaded.
    """

    table: Tensor
    first: int
    before: Tensor


def _tables(wanted: dict, path: Path) -> Iterator[tuple[ShardedTensor, int]]:
    """Tables whose rows are tokens, with the rows that the checkpoint has of each."""
    stored = description_of(path / ".metadata").state_dict_metadata
    for each in nested_values(wanted):
        if isinstance(each, ShardedTensor) and each.allow_shape_mismatch and each.key in stored:
            yield each, stored[each.key].size[0]


def _rows_too_many(wanted: dict, path: Path) -> Iterator[str]:
    for table, rows in _tables(wanted, path):
        if rows > table.global_shape[0]:
            yield f"{table.key}: {rows} rows there, {table.global_shape[0]} here; a smaller vocabulary cannot hold them"


def _new_rows(wanted: dict, path: Path) -> Iterator[_Rows]:
    """Rows to keep as they are: of weights, and of the optimizer's own copies of weights.

    Momenta of rows that the checkpoint does not have begin at 0, as Megatron has them.
    """
    weights: dict[str, Tensor] = {}
    tables = sorted(_tables(wanted, path), key=lambda found: found[0].key.startswith(_OPTIMIZER))
    for table, rows in tables:
        first = max(rows - table.global_offset[0], 0)
        weight = next((table.key.removeprefix(each) for each in _MASTERS if table.key.startswith(each)), table.key)
        if first >= table.local_shape[0] or weight.startswith(_OPTIMIZER):
            continue
        if weight == table.key:
            weights[weight] = table.data[first:].detach().clone()
            logger.info(
                "%s: the checkpoint has rows 0 to %d, rows %d to %d keep their initialisation",
                table.key, rows - 1, rows, table.global_shape[0] - 1,
            )  # fmt: skip
        # The optimizer's description holds no values yet; its copies begin as the weights do.
        yield _Rows(table.data, first, weights[weight])


@torch.no_grad()
def _restore(rows: list[_Rows]) -> None:
    for each in rows:
        each.table[each.first :] = each.before
