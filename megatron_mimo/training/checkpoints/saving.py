"""Checkpoints of a training run in `megatron.core.dist_checkpointing`'s format.

Weights can be read by another layout and with another optimizer. Optimizer state can be read by another
layout where the same parts train and the optimizer is distributed alike. The random numbers of dropout
are those of the same layout only, and start anew in another.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_mimo.compat.megatron import describe_momentum, writers_report_here
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.progress import State
from megatron_mimo.launch import Run
from megatron_mimo.model import MimoModel
from megatron_mimo.training.checkpoints import identity
from megatron_mimo.training.checkpoints.reading import agree, problems_of, read
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.sources import write_state

logger = logging.getLogger(__name__)

_WEIGHTS_ONLY = "Begin a run with the checkpoint's weights alone: load(path, weights_only=True)."
_COMPLETE = "complete"  # written last: a directory without it was cut short


@dataclass(frozen=True)
class Trained:
    """What trained in a run, so that its optimizer has a state of it, and how that state is stored.

    Args:
        frozen: what the names of parameters that did not train begin with.
        embedding_rows: rows of the embedding that trained; empty where the table trained like the rest.
        distributed_optimizer: whether it is that of Megatron's distributed optimizer; None where that is
            not known, and not compared.
    """

    frozen: tuple[str, ...]
    embedding_rows: tuple[int, ...]
    distributed_optimizer: bool | None = None

    @classmethod
    def by(
        cls, control: TrainingControl, config: MimoModelConfig, distributed_optimizer: bool | None = None
    ) -> Trained:
        """What `control` trains of the model that `config` describes."""
        return cls(
            frozen=control.frozen_prefixes(config),
            embedding_rows=tuple(sorted(control.embedding_rows)),
            distributed_optimizer=distributed_optimizer,
        )


def save(
    directory: Path,
    step: int,
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    run: Run,
    trained: Trained,
    data: State | None = None,
) -> Path:
    """Writes `directory/step_<step>` and gives its path. Collective over all ranks.

    A checkpoint of the same step that is there is replaced, once this one is whole. `data` says how far the run's data
    source is.
    """
    path = directory / f"step_{step:08d}"
    written = directory / f"writing_{path.name}"
    if run.rank == 0:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
    dist.barrier()
    # Before its first update an optimizer has no state to save.
    updated = schedule.num_steps > 0
    state = _state(chunks, optimizer if updated else None, run, loading=False)
    state |= {
        "step": step,
        "updated": updated,
        "layout": vars(run.layout),
        "schedule": schedule.state_dict(),
        "trained": vars(trained),
    }
    with writers_report_here():
        dist_checkpointing.save(state, str(written), content_metadata=_saved(_metadata(run)))
    dist.barrier()
    if run.rank == 0:
        identity.write(written, chunks[0].mimo_config)
        if data is not None:
            write_state(written, data)
        (written / _COMPLETE).touch()
        _replace(path, written)
        logger.info("saved step %d to %s", step, path)
    dist.barrier()  # from here on every rank finds it
    return path


def _replace(path: Path, written: Path) -> None:
    """Moves `written` to `path`; what was there goes last."""
    old = path.with_name(f"old_{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    written.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def load(
    path: Path,
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    run: Run,
    trained: Trained,
) -> int:
    """Reads a checkpoint into model, optimizer and schedule, and gives the number of steps it has behind it.

    Collective over all ranks.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
        ValueError: loading it would run what the file says, it is of another model, or the optimizer's state
            there is of other parameters than those that train now, or of an optimizer that is distributed
            otherwise. Nothing has changed then.
    """
    _check_complete(path)
    agree(problems_of(path, chunks[0].mimo_config))
    common = dist_checkpointing.load_common_state_dict(str(path))
    if common["updated"]:
        check_trained(path, Trained(**common["trained"]), trained, _WEIGHTS_ONLY)
    same_layout = common["layout"] == vars(run.layout)
    updated = common["updated"]
    wanted = _state(chunks, optimizer if updated else None, run, loading=True, random=same_layout)
    state = read(wanted, path, chunks[0].mimo_config)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])
    if updated:
        optimizer.load_state_dict(state["optimizer"])
    else:
        optimizer.reload_model_params()  # its own float32 copies of half-precision weights
    schedule.num_steps = 0  # it adds those of the checkpoint
    schedule.load_state_dict(state["schedule"])
    if same_layout:
        _set_random_state(state["random"])
    return state["step"]


def load_weights(path: Path, chunks: Sequence[MimoModel], optimizer: MegatronOptimizer, run: Run) -> None:
    """Reads a checkpoint's weights into the model, and nothing else. Collective over all ranks.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
        ValueError: loading it would run what the file says, or it is of another model. Nothing has changed then.
    """
    _check_complete(path)
    state = read(_state(chunks, None, run, loading=True, random=False), path, chunks[0].mimo_config)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])
    optimizer.reload_model_params()  # its own float32 copies of half-precision weights


def _check_complete(path: Path) -> None:
    if not (path / _COMPLETE).exists():
        raise FileNotFoundError(
            f"no complete checkpoint at {path}. Give the directory step_... that save() returned; one "
            f"without a file {_COMPLETE!r} was cut short while it was written."
        )


def check_trained(path: Path | str, theirs: Trained, ours: Trained, instead: str) -> None:
    """Refuses an optimizer state that this run cannot read, or that has momentum of rows that shall not move.

    Args:
        path: of the checkpoint, for the error.
        theirs: what trained in the run that wrote it.
        ours: what trains now.
        instead: what to do, the end of the error.

    Raises:
        ValueError: the two differ.
    """
    if tuple(theirs.frozen) != ours.frozen:
        raise ValueError(
            f"{path} was written with {list(theirs.frozen)} frozen, this run freezes {list(ours.frozen)}: the "
            f"optimizer's states do not match. {instead}"
        )
    rows = set(theirs.embedding_rows)
    if ours.embedding_rows and not (rows and rows <= set(ours.embedding_rows)):
        raise ValueError(
            f"{path} has momentum of embedding rows outside embedding_rows, which would go on moving. {instead}"
        )
    distributed = (theirs.distributed_optimizer, ours.distributed_optimizer)
    if None not in distributed and distributed[0] != distributed[1]:
        raise ValueError(
            f"{path} was written with use_distributed_optimizer={distributed[0]}, this run has {distributed[1]}: the "
            f"optimizer's state is stored in another form. {instead} To go on with that state, set "
            f"use_distributed_optimizer={distributed[0]} in OptimizerConfig and DistributedDataParallelConfig."
        )


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the most steps in `directory`, None if there is none."""
    complete = [path.parent for path in directory.glob(f"step_*/{_COMPLETE}")]
    return max(complete, default=None)


def _state(
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer | None,
    run: Run,
    *,
    loading: bool,
    random: bool = True,
) -> dict:
    """What is saved or wanted, as sharded tensors and objects."""
    metadata = _metadata(run)
    state: dict = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    if optimizer is not None:
        describe_momentum(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    if random:
        state["random"] = ShardedObject("random", _random_state(), (run.world_size,), (run.rank,))
    return state


def _metadata(run: Run) -> dict:
    # Fully reshardable: a checkpoint of one layout can be read by any other.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": run.groups.dp_cp,
    }


def _saved(metadata: dict) -> dict:
    return {name: value for name, value in metadata.items() if name != "dp_cp_group"}


def _random_state() -> dict:
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
