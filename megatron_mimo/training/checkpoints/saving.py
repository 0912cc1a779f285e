"""Checkpoints of a training run in `megatron.core.dist_checkpointing`'s format.

Weights can be read by another layout and with another optimizer. Optimizer state can be read by another
layout where the same parts train and the optimizer is distributed alike. The random numbers of dropout
are those of the same layout only, and start anew in another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mimo.compat.checkpoints import other_groups, planned, with_steps_of_all
from megatron_mimo.compat.megatron import describe_momentum
from megatron_mimo.data.progress import State
from megatron_mimo.launch import Run
from megatron_mimo.model import MimoModel
from megatron_mimo.training.agreement import gathered
from megatron_mimo.training.checkpoints.directories import found_at, is_complete, newest_first
from megatron_mimo.training.checkpoints.inert import description_of
from megatron_mimo.training.checkpoints.manifest import COMPLETE, Damaged
from megatron_mimo.training.checkpoints.random_state import random_state, set_random_state
from megatron_mimo.training.checkpoints.reading import Problems, agree, check, read
from megatron_mimo.training.checkpoints.trained import Trained, check_trained
from megatron_mimo.training.checkpoints.writing import Saver
from megatron_mimo.training.ema import Ema, is_there
from megatron_mimo.training.sources import read_state, write_state

logger = logging.getLogger(__name__)

_WEIGHTS_ONLY = "Begin a run with the checkpoint's weights alone: load(path, weights_only=True)."
# Fully reshardable: a checkpoint of one layout can be read by any other, and every rank of a distributed optimizer is
# asked for its part. The other is written without asking anybody, and read by the same layout but for data parallelism.
_ANY_LAYOUT, _OWN_PARTS = "fully_reshardable", "dp_reshardable"


@dataclass(frozen=True)
class Loaded:
    """How far the run of a checkpoint was.

    Args:
        step: that it had behind it.
        data: where its data source was; None where it had none.
        evaluations: what compares its evaluations -> its state; empty where nothing did.
    """

    step: int
    data: State | None
    evaluations: Mapping[str, Any] = field(default_factory=dict)


def save(
    directory: Path,
    step: int,
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    run: Run,
    trained: Trained,
    data: State | None = None,
    *,
    saver: Saver | None = None,
    background: bool = False,
    losses: Mapping[str, float] | None = None,
    evaluations: Mapping[str, Any] | None = None,
    ema: Ema | None = None,
) -> Path:
    """Writes `directory/step_<step>` and gives its path. Collective over all ranks.

    A checkpoint of the same step that is there is replaced, once this one is whole.

    Args:
        directory: of the run's checkpoints.
        step: that the run has behind it.
        chunks, optimizer, schedule, run: whose state is saved.
        trained: what trained.
        data: how far the run's data source is.
        saver: of the run; one that writes in the background is asked later whether it has. None for one of this call.
        background: write while the run goes on; the optimizer's state is then in the form that needs no gathering.
        losses: of an evaluation at this step.
        evaluations: what compares evaluations -> its state, plain numbers.
        ema: averages of the weights; None where there are none.

    Raises:
        OSError: on every rank, where one of them could not write. The checkpoints before it stay.
    """
    # Before its first update an optimizer has no state to save.
    updated = schedule.num_steps > 0
    metadata = _metadata(run, _OWN_PARTS if background else _ANY_LAYOUT)

    def plan(written: Path):
        state = _state(chunks, optimizer if updated else None, run, metadata, loading=False)
        state |= {
            "step": step,
            "iteration": step,
            # Of Megatron's order of a query, key and value; its own loop asks for it.
            "checkpoint_version": 3.0,
            "updated": updated,
            "layout": vars(run.layout),
            "schedule": schedule.state_dict(),
            "trained": vars(trained),
            "evaluations": dict(evaluations or {}),
        }
        if ema is not None:
            state |= {**ema.sharded_state_dict(metadata), "ema_updates": ema.updates}
        return planned(dist_checkpointing.save, state, written, content_metadata=_saved(metadata))

    path = directory / f"step_{step:08d}"

    def beside(written: Path) -> None:
        if data is not None:
            write_state(written, data)

    (saver or Saver()).save(plan, path, chunks[0].mimo_config, background=background, losses=losses, beside=beside)
    return path


def load(
    path: Path | str | None,
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    run: Run,
    trained: Trained,
    *,
    directory: Path | str | None = None,
    ema: Ema | None = None,
) -> Loaded | None:
    """Reads a checkpoint into model, optimizer and schedule, and gives how far it is.

    Collective over all ranks.

    Args:
        path: of the checkpoint; None for the newest whole one in `directory`: one that is not whole is left aside with
            a warning, and the one before it is read.
        chunks, optimizer, schedule, run: what is read into.
        trained: what trains now.
        directory: of a run's checkpoints.
        ema: averages of the weights, which begin anew where the checkpoint has none.

    Returns:
        None where there is no checkpoint in `directory`.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
        ValueError: loading it would run what the file says, it is not whole (`Damaged`), of another model, or the
            optimizer's state there is of other parameters than those that train now, or of an optimizer that is
            distributed otherwise. Nothing has changed then, on any rank.
    """

    def from_one(found: Path) -> Loaded:
        return _load(found, chunks, optimizer, schedule, run, trained, ema)

    return from_one(Path(path)) if path is not None else _newest_whole(directory, from_one)


def _newest_whole[Read](directory: Path | str | None, load: Callable[[Path], Read]) -> Read | None:
    """What `load` gives of the newest checkpoint that is whole; those before it are told. None where there is none.

    Raises:
        Damaged: there are some, and none is whole.
    """
    problem = None
    for found in newest_first(Path(directory)) if directory is not None else ():
        try:
            return load(found)
        except Damaged as error:
            logger.warning("%s", error)
            problem = error
    if problem is not None:
        raise problem
    return None


def _load(
    path: Path,
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    run: Run,
    trained: Trained,
    ema: Ema | None,
) -> Loaded:
    path = _complete(path)
    check(path, chunks[0].mimo_config)
    common = dist_checkpointing.load_common_state_dict(str(path))
    if "trained" not in common:
        raise ValueError(f"{path} is not a Trainer's: it has another loop's optimizer state. {_WEIGHTS_ONLY}")
    updated = common["updated"]
    same_layout = common["layout"] == vars(run.layout)
    metadata = _metadata(run, common["content_metadata"]["distrib_optim_sharding_type"])
    if updated:
        check_trained(path, Trained(**common["trained"]), trained, _WEIGHTS_ONLY)
        _check_layout(path, common, run, trained)
    wanted = _state(chunks, optimizer if updated else None, run, metadata, loading=True, random=same_layout)
    averaged = ema is not None and is_there(description_of(path / ".metadata").state_dict_metadata)
    if ema is not None and averaged:
        wanted |= ema.sharded_state_dict(metadata)
    state = read(wanted, path)
    problem = other_groups(optimizer, state["optimizer"]) if updated else None
    if problem is not None:
        problem = f"optimizer: {problem} {_WEIGHTS_ONLY}"
    agree(path, Problems(differences=() if problem is None else (problem,)))
    _put(chunks, state)
    if updated:
        optimizer.load_state_dict(state["optimizer"])
    else:
        optimizer.reload_model_params()  # its own float32 copies of half-precision weights
    if ema is not None:
        ema.take(state, common["ema_updates"]) if averaged else ema.restart()
    schedule.num_steps = 0  # it adds those of the checkpoint
    schedule.load_state_dict(state["schedule"])
    if same_layout:
        set_random_state(state["random"])
    return Loaded(state["step"], read_state(path), state.get("evaluations", {}))


def load_weights(
    path: Path | str | None,
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer,
    run: Run,
    *,
    directory: Path | str | None = None,
) -> None:
    """Reads a checkpoint's weights into the model, and nothing else. Collective over all ranks.

    Args:
        path: of the checkpoint; None for the newest whole one in `directory`, if there is any, as `load` finds it.
        chunks, optimizer, run: what is read into.
        directory: of a run's checkpoints.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
        ValueError: as `load`, but for the optimizer. Nothing has changed then.
    """

    def from_one(found: Path) -> None:
        whole = _complete(found)
        check(whole, chunks[0].mimo_config)
        _put(chunks, read(_state(chunks, None, run, _metadata(run, _ANY_LAYOUT), loading=True, random=False), whole))
        optimizer.reload_model_params()  # its own float32 copies of half-precision weights

    if path is not None:
        from_one(Path(path))
    else:
        _newest_whole(directory, from_one)


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the most steps in `directory`, None if there is none."""
    return next(iter(newest_first(directory)), None)


def _put(chunks: Sequence[MimoModel], state: dict) -> None:
    """Copies weights that were read into the model."""
    for index, chunk in enumerate(chunks):
        # Names were compared before; what TransformerEngine's layers keep besides weights may be missing.
        chunk.load_state_dict(state[f"model{index}"], strict=False)


def _complete(path: Path) -> Path:
    """Where the checkpoint of that name is.

    Raises:
        FileNotFoundError: there is none, or it was cut short.
    """
    found = found_at(path)
    if not is_complete(found):
        raise FileNotFoundError(
            f"no complete checkpoint at {path}. Give the directory step_... that save() returned; one "
            f"without a file {COMPLETE!r} was cut short while it was written."
        )
    return found


def _check_layout(path: Path, common: dict, run: Run, trained: Trained) -> None:
    """Refuses an optimizer state that another layout has written for itself.

    Raises:
        ValueError: naming what differs.
    """
    if common["content_metadata"]["distrib_optim_sharding_type"] != _OWN_PARTS or not trained.distributed_optimizer:
        return
    there, here = common["layout"], vars(run.layout)
    other = [f"{name} {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
    other = [line for line in other if not line.startswith("world_size")]  # data parallelism may differ
    if other:
        raise ValueError(
            f"{path} was written in the background, and its optimizer state is read by its own layout alone: "
            f"{', '.join(other)}. {_WEIGHTS_ONLY} To go on with that state, load it in its own layout and call "
            "save(): that checkpoint is read by any."
        )


def _state(
    chunks: Sequence[MimoModel],
    optimizer: MegatronOptimizer | None,
    run: Run,
    metadata: dict,
    *,
    loading: bool,
    random: bool = True,
) -> dict:
    """What is saved or wanted, as sharded tensors and objects."""
    state: dict = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    if optimizer is not None:
        describe_momentum(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
        if not loading:
            with_steps_of_all(state["optimizer"], partial(gathered, group=run.hosts.world))
    if random:
        state["random"] = ShardedObject("random", random_state(), (run.world_size,), (run.rank,))
    return state


def _metadata(run: Run, form: str) -> dict:
    """Options of the state's form, the optimizer's being `form`."""
    return {
        "distrib_optim_sharding_type": form,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": run.groups.dp_cp,
    }


def _saved(metadata: dict) -> dict:
    return {name: value for name, value in metadata.items() if name != "dp_cp_group"}
