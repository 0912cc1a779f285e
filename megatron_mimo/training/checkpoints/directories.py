"""Where checkpoints of a run lie: which are whole, how one takes another's place, and which are kept."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mimo.training.checkpoints import manifest
from megatron_mimo.training.settings import check_whole

logger = logging.getLogger(__name__)

_OLD = "old_"
_WRITING = "writing_"
# A Trainer's, and those of Megatron's loop.
_STEP = re.compile(r"(?:step_|iter_)(\d+)")


@dataclass(frozen=True)
class CheckpointSettings:
    """How checkpoints are written and which of them are kept.

    Args:
        background: write while the run goes on; a step waits only until the state is copied to the host. The last
            checkpoint of a run is written at once.
        keep_last: how many of the newest are kept; None keeps all.
        keep_every: besides these, those whose steps are a multiple of it.
        keep_best: besides these, the one with the lowest evaluation loss of this term (`"loss"` for the weighted sum),
            evaluated at the step that was saved.
        texts: name -> content of further files of each checkpoint, such as the recipe that it was trained with.

    Raises:
        TypeError: a number that is not whole.
        ValueError: a number below 1, something to keep besides all, or a name in `texts` that is a path or one of a
            checkpoint's own.

    Example:
        >>> CheckpointSettings(background=True, keep_last=2, keep_every=1000)
        CheckpointSettings(background=True, keep_last=2, keep_every=1000, keep_best=None)
    """

    background: bool = False
    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None:
                check_whole(f"CheckpointSettings: {name}", value, least=1)
        if self.keep_last is None and (self.keep_every is not None or self.keep_best is not None):
            raise ValueError("CheckpointSettings: keep_every and keep_best need keep_last; without it all are kept")
        for name in self.texts:
            if Path(name).name != name or name.startswith(".") or Path(name).suffix not in (".yaml", ".txt", ".md"):
                raise ValueError(
                    f"CheckpointSettings: texts: expected names that end with .yaml, .txt or .md, found {name!r}"
                )


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (path / manifest.COMPLETE).is_file()


def found_at(path: Path) -> Path:
    """`path`, or where the checkpoint of that name lies while another takes its place."""
    old = path.with_name(f"{_OLD}{path.name}")
    return old if not is_complete(path) and is_complete(old) else path


def newest_first(directory: Path) -> list[Path]:
    """The complete checkpoints of a `Trainer` in `directory`; warns of those that were cut short."""
    found: dict[int, Path] = {}
    if not directory.is_dir():
        return []
    for path in directory.iterdir():
        step = _STEP.fullmatch(path.name.removeprefix(_OLD))
        if step is None or not path.name.removeprefix(_OLD).startswith("step_"):
            continue
        if not is_complete(path):
            logger.warning("%s was cut short while it was written, and is left aside", path)
        elif not path.name.startswith(_OLD) or int(step[1]) not in found:
            found[int(step[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def iterations_before(path: Path) -> list[Path]:
    """The complete checkpoints of Megatron's loop beside `path` and older than it, newest first."""
    if not path.name.startswith("iter_") or not path.parent.is_dir():
        return []
    older = [
        each for each in path.parent.iterdir()
        if each.name.startswith("iter_") and _STEP.fullmatch(each.name) and step_of(each) < step_of(path)
    ]  # fmt: skip
    return sorted(filter(is_complete, older), key=step_of, reverse=True)


def begin(target: Path) -> Path:
    """An empty directory to write a checkpoint to, beside `target`."""
    written = target.with_name(f"{_WRITING}{target.name}")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    return written


def publish(written: Path, target: Path) -> None:
    """Moves `written` to `target`. What was there goes last, and `found_at` finds it meanwhile."""
    old = target.with_name(f"{_OLD}{target.name}")
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    written.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Puts a checkpoint back that was to make room for one of its step, where the run ended in between."""
    old = target.with_name(f"{_OLD}{target.name}")
    if found_at(target) != target:
        with suppress(OSError):  # another rank was first
            target.rmdir()
        with suppress(OSError):
            old.rename(target)


@contextmanager
def writing_alone(directory: Path) -> Iterator[None]:
    """Within it, no other job saves to `directory`.

    Raises:
        OSError: another does.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(
                    error.errno,
                    "another job is saving to this directory. Give each job a directory of its own",
                    str(directory),
                ) from error
            logger.debug("%s cannot be locked: %s", directory, error)  # as on some network file systems
        yield
    finally:
        os.close(descriptor)


def check_space(directory: Path, needed: int) -> None:
    """Refuses to begin a checkpoint that would not fit.

    Raises:
        OSError: there is less room than `needed` bytes.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"a checkpoint needs {needed:,} bytes, and {free:,} are free. Make room, or keep fewer",
            str(directory),
        )  # fmt: skip


def clean_up(directory: Path, settings: CheckpointSettings) -> list[Path]:
    """Deletes the checkpoints that are not to be kept, and gives them; the newest complete one always stays.

    Only complete checkpoints beside which a newer complete one lies are deleted.
    """
    if settings.keep_last is None:
        return []
    whole = newest_first(directory)
    kept = set(whole[: settings.keep_last])
    if settings.keep_every is not None:
        kept |= {path for path in whole if step_of(path) % settings.keep_every == 0}
    if settings.keep_best is not None:
        best = best_of(whole, settings.keep_best)
        kept |= {best} if best is not None else set()
    gone = [path for path in whole if path not in kept]
    for path in gone:
        # Without this file it is no checkpoint any more, whatever happens to the others.
        (path / manifest.COMPLETE).unlink()
        shutil.rmtree(path, ignore_errors=True)
    return gone


def best_of(paths: Sequence[Path], term: str) -> Path | None:
    """The checkpoint with the lowest evaluation loss of a term; None where none has been evaluated.

    Args:
        paths: of whole checkpoints; of equals the earliest is taken, as `Best` does.
        term: `"loss"` for the weighted sum.
    """
    losses = {path: _losses(path).get(term, math.nan) for path in paths}
    losses = {path: loss for path, loss in losses.items() if not math.isnan(loss)}
    return min(losses, key=lambda path: (losses[path], step_of(path))) if losses else None


def keep_linked(path: Path, directory: Path) -> None:
    """Keeps a whole checkpoint of Megatron's loop in a directory of its own, which `--load` takes, and none before it.

    Its files are those of `path` (hard links), or copies where the file system has none: they stay when `path` goes.
    """
    unfinished = directory / f"{_WRITING}{path.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(path, unfinished, copy_function=_linked)
    shutil.rmtree(directory / path.name, ignore_errors=True)
    unfinished.rename(directory / path.name)
    tracker = directory / "latest_checkpointed_iteration.txt"
    written = directory / f"{_WRITING}tracker"
    written.write_text(path.name.removeprefix("iter_").lstrip("0"))
    written.replace(tracker)
    for other in directory.glob("iter_*"):
        if other.name != path.name:
            shutil.rmtree(other, ignore_errors=True)


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def step_of(path: Path) -> int:
    """The step of a checkpoint, by the name of its directory."""
    return int(path.name.rpartition("_")[2])


def _losses(path: Path) -> Mapping[str, float]:
    try:
        found = manifest.read(path)
    except ValueError:
        return {}
    return {} if found is None else found.losses
