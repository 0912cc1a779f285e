"""Checkpoints of Megatron's own loop: looked at before they are loaded, written and hashed as a `Trainer`'s are."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_mimo.compat.checkpoints import (
    Planned,
    background_saves_by,
    checkpoints_by,
    deleting_by_threads,
    directory_to_load,
    planned,
    with_steps_of_all,
)
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.progress import State
from megatron_mimo.training.agreement import gathered
from megatron_mimo.training.checkpoints import manifest
from megatron_mimo.training.checkpoints.directories import (
    is_complete,
    iterations_before,
    newest_first,
    recover,
    step_of,
)
from megatron_mimo.training.checkpoints.inert import check_inert, description_of
from megatron_mimo.training.checkpoints.reading import agree, check, problems_of, read
from megatron_mimo.training.checkpoints.writing import Saver
from megatron_mimo.training.ema import Ema, is_there
from megatron_mimo.training.sources import write_state

logger = logging.getLogger(__name__)


class Reads(Protocol):
    """Knows where a run's data is."""

    def loaded(self, checkpoint: Path) -> None:
        """Takes note of a checkpoint that is loaded."""

    def beside(self) -> State | None:
        """Where the data of all ranks is, to be written into a checkpoint; None for nothing. Every rank calls it."""


@contextmanager
def adapted(
    model: Callable[[], MimoModelConfig],
    data: Callable[[], Reads] | None = None,
    ema: Callable[[], Ema | None] = lambda: None,
) -> Iterator[None]:
    """Within it, Megatron's loop loads and saves by `functions`.

    Args:
        model: gives the configuration of the run's model, once Megatron has its arguments.
        data: gives what knows where the run's data is; None where nothing does.
        ema: gives the averages of the weights, where there are any; begin anew where weights alone are read.
    """
    saver = Saver()
    with ExitStack() as until_trained:
        until_trained.enter_context(checkpoints_by(**functions(model, saver, data, ema)))
        until_trained.enter_context(background_saves_by(Background(saver)))
        yield


@dataclass
class Deferred:
    """A checkpoint to write in the background, as Megatron asks for it.

    Args:
        plan: gives what this rank writes to a directory.
        target: where it goes.
        config: of the model.
        beside: writes other files to its directory, on rank 0.
        finalize_fns: what Megatron calls once it is whole.
    """

    plan: Callable[[Path], Planned]
    target: Path
    config: MimoModelConfig
    beside: Callable[[Path], None]
    finalize_fns: list[Callable[[], None]] = field(default_factory=list)

    def add_finalize_fn(self, finalize: Callable[[], None]) -> None:
        """One more, called after those before it."""
        self.finalize_fns.append(finalize)

    def finish(self) -> None:
        """Calls them all."""
        with deleting_by_threads():
            for finalize in self.finalize_fns:
                finalize()


@dataclass
class Background:
    """What Megatron's loop hands its background checkpoints to, and asks at step boundaries.

    Args:
        saver: of the run.
    """

    saver: Saver

    def schedule_async_request(self, request: Deferred) -> None:
        """Copies the state to the host and goes on writing."""
        self.saver.save(
            request.plan, request.target, request.config, background=True, beside=request.beside, after=request.finish
        )

    def maybe_finalize_async_calls(self, blocking: bool = False, no_dist: bool = False) -> list[int]:
        """Finishes what every rank has written, or waits for it."""
        del no_dist
        self.saver.wait() if blocking else self.saver.poll()
        return []

    def get_num_unfinalized_calls(self) -> int:
        """How many are in progress."""
        return int(self.saver.busy)

    def close(self, abort: bool = False) -> None:
        """Gives the host memory back."""
        del abort
        self.saver.buffer.free()


def functions(
    model: Callable[[], MimoModelConfig],
    saver: Saver,
    data: Callable[[], Reads] | None = None,
    ema: Callable[[], Ema | None] = lambda: None,
) -> dict[str, Callable[..., Any]]:
    """What Megatron's loop shall load and save by, by the name of its own function.

    Args:
        model: gives the configuration of the run's model, once Megatron has its arguments.
        saver: of the run.
        data, ema: as `adapted` takes them.
    """
    load, load_common, save = (
        dist_checkpointing.load,
        dist_checkpointing.load_common_state_dict,
        dist_checkpointing.save,
    )

    def read_checked(
        wanted: dict,
        directory: str,
        sharded_strategy: Any = None,
        *,
        strict: Any = StrictHandling.ASSUME_OK_UNEXPECTED,
        verify_integrity: bool = False,
        **options: Any,
    ) -> Any:
        path = Path(directory)
        try:
            check(path, model())
        except manifest.Damaged as error:
            raise manifest.Damaged(f"{error}{_instead(path)}") from error
        if data is not None:
            data().loaded(path)
        # Our own hashes are compared already.
        options |= {"verify_integrity": verify_integrity and manifest.read(path) is None, "strict": strict}
        averages = ema()
        goes_on = averages is not None and "optimizer" in wanted
        if averages is None or not goes_on or not is_there(description_of(path / ".metadata").state_dict_metadata):
            return read(wanted, path, load, sharded_strategy=sharded_strategy, **options)
        wanted = {**wanted, **averages.sharded_state_dict(_weights_metadata(averages))}
        found = read(wanted, path, load, sharded_strategy=sharded_strategy, **options)
        averages.take(found, found["ema_updates"])
        return found

    def read_common(directory: str) -> dict:
        check_inert(directory)
        return load_common(directory)

    def write(
        state: dict,
        directory: str,
        sharded_strategy: Any = None,
        *,
        async_sharded_save: bool = False,
        async_strategy: str | None = None,
        verify_integrity: bool = False,
        **options: Any,
    ) -> Any:
        if (averages := ema()) is not None:
            beside_weights = averages.sharded_state_dict(_weights_metadata(averages))
            state = {**state, **beside_weights, "ema_updates": averages.updates}
        if "optimizer" in state:
            with_steps_of_all(state["optimizer"], gathered)
        del async_strategy, verify_integrity  # written by a thread of ours, and hashed in any case

        def plan(written: Path):
            return planned(save, state, written, sharded_strategy, **options)

        state_of_data = None if data is None else data().beside()

        def beside(written: Path) -> None:
            if state_of_data is not None:
                write_state(written, state_of_data)

        if async_sharded_save:
            return Deferred(plan, Path(directory), model(), beside)
        saver.save(plan, Path(directory), model(), background=False, beside=beside)
        return None

    return {"load": read_checked, "load_common_state_dict": read_common, "save": write}


def _weights_metadata(averages: Ema) -> dict[str, Any]:
    """Of the form in which Megatron's loop describes weights."""
    return {"singleton_local_shards": False, "dp_cp_group": averages.groups.dp_cp}


def check_loadable(args: Namespace, config: MimoModelConfig) -> None:
    """Refuses a checkpoint that Megatron's loop shall not load, or cannot. Rank-local, before any process group.

    A `Trainer`'s directory, or one of its checkpoints, is loaded too: its weights, and steps are counted from 0. Where
    files of a run's newest checkpoint are missing or cut, the newest before it that has all of its own is taken.

    Args:
        args: Megatron's, which name the checkpoint. They name another directory of the same checkpoint afterwards,
            where it is a `Trainer`'s, and a step, where an older one is taken.
        config: of the model to load into.

    Raises:
        ValueError: loading it would run what the file says, it is of another model, or there is no checkpoint where
            one is asked for, and training would begin with random weights.
    """
    for option in ("load", "pretrained_checkpoint"):
        given = getattr(args, option)
        if given is None:
            continue
        path = directory_to_load(args, given)
        if path is None and (of_a_trainer := _of_a_trainer(Path(given))) is not None:
            setattr(args, option, _as_release(of_a_trainer))
            path = of_a_trainer
        if path is None:
            _check_begins(args, option, Path(given))
            continue
        recover(path)
        if option == "load" and args.ckpt_step is None and (older := _older(path)) is not None:
            path, args.ckpt_step = older, step_of(older)
        if not path.is_dir():
            raise ValueError(f"--{option.replace('_', '-')} {given} names {path.name}, which is not there.")
        agree(path, problems_of(path, config))


def _of_a_trainer(given: Path) -> Path | None:
    """The checkpoint of a `Trainer` that a directory is, or the newest whole one in it; warns of newer ones.

    Files are hashed only where an older checkpoint can take the place. The oldest is given as it is: whoever loads it
    refuses it if it has changed.
    """
    if is_complete(given):
        return given
    found = newest_first(given)
    for path in found[:-1]:
        if not (told := _damage(path)):
            return path
        logger.warning("%s is not whole, and the one before it is taken: %s", path, "; ".join(told))
    return found[-1] if found else None


def _older(named: Path) -> Path | None:
    """The checkpoint of Megatron's loop to take for one that was cut short, with a warning; None where it is whole.

    None too where no older one is whole: whoever loads the named one refuses it. Names and sizes are looked at: no
    rank hashes all files alone, and changed ones are refused when each has hashed its share.
    """
    told = _damage(named, contents=False) if named.is_dir() else ["it is not there"]
    if not told:
        return None
    for path in iterations_before(named):
        if not _damage(path, contents=False):
            logger.warning("%s is not whole, and %s is taken: %s", named, path.name, "; ".join(told))
            return path
    return None


def _instead(path: Path) -> str:
    older = iterations_before(path)
    return f"\n--ckpt-step {step_of(older[0])} loads {older[0].name}." if older else ""


def _damage(path: Path, *, contents: bool = True) -> list[str]:
    """What of a checkpoint is not as it was written, a line a file. Rank-local: all of it is hashed by `contents`."""
    try:
        written = manifest.read(path)
    except manifest.Damaged as error:
        return [str(error)]
    return [] if written is None else manifest.faults(path, written, contents=contents)


def _as_release(path: Path) -> str:
    """A directory in which Megatron's loop finds a checkpoint's weights; it goes with this process."""
    view = Path(tempfile.mkdtemp(prefix="megatron-mimo-"))
    atexit.register(shutil.rmtree, view, ignore_errors=True)
    (view / "release").symlink_to(path.resolve(), target_is_directory=True)
    (view / "latest_checkpointed_iteration.txt").write_text("release")
    return str(view)


def _check_begins(args: Namespace, option: str, given: Path) -> None:
    """Refuses to begin with random weights where a checkpoint was asked for.

    A run that saves to the directory that it loads from begins there.

    Raises:
        ValueError: naming the directory and what is in it.
    """
    there = sorted(path.name for path in given.iterdir()) if given.is_dir() else []
    begins = args.save is not None and Path(args.save).resolve() == given.resolve()
    checkpoints = [name for name in there if name.startswith(("iter_", "step_", "release"))]
    if option == "load" and args.pretrained_checkpoint is not None and not checkpoints:
        return  # Megatron takes the weights of that one
    if not begins or [name for name in checkpoints if any((given / name).iterdir())]:
        raise ValueError(
            f"--{option.replace('_', '-')} {given}: no checkpoint to load there, and training would begin with random "
            f"weights. Expected latest_checkpointed_iteration.txt or a Trainer's step_..., found {there or 'nothing'}. "
            "Correct the directory, or leave the option out."
        )
