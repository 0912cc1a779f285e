"""Writing a checkpoint: each rank writes and hashes its files, at once or in one thread while the run goes on."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.compat.checkpoints import Planned, describe, registered, unregistered, write_item
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.checkpoints import directories, manifest
from megatron_mimo.training.checkpoints.manifest import Hashed

logger = logging.getLogger(__name__)

# Tensors begin at multiples of it in the host buffer: copies from a GPU are fastest so.
_ALIGNED = 512
# Beside tensors and objects there are torch's headers, about 1.2 kB a tensor, and the description.
_OVERHEAD = 4096


class _HashedFile(io.RawIOBase):
    """A file to write, which hashes what is written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._digest, self._size = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        """The number of bytes written: all."""
        view = memoryview(content).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def sync(self) -> Hashed:
        """Size and hash, once the file is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return Hashed(self._size, self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass
class Outcome:
    """What a rank wrote.

    Args:
        results: torch's notes of the places of what was written.
        files: by name.
        error: why it could not, None where it could.
    """

    results: list[Any] = field(default_factory=list)
    files: dict[str, Hashed] = field(default_factory=dict)
    error: str | None = None


def write(plan: Planned) -> Outcome:
    """Writes this rank's files, and gives what came of it; raises nothing."""
    outcome = Outcome()
    name = str(plan.directory)
    try:
        for name, content in plan.files:
            with _HashedFile(plan.directory / name) as stream:
                for item, data in content:
                    outcome.results.append(write_item(plan, stream, item, data, name))
                outcome.files[name] = stream.sync()
    except Exception as error:
        outcome.error = f"{name}: {type(error).__name__}: {error}"
    return outcome


def size_of(plan: Planned) -> int:
    """Bytes that this rank writes, about."""
    items = [data for _, content in plan.files for _, data in content]
    return sum((data.nbytes if isinstance(data, Tensor) else len(data.getbuffer())) + _OVERHEAD for data in items)


class HostBuffer:
    """Host memory that the state of a rank is copied to, kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._registered = False
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._bytes.nbytes

    def copy(self, plan: Planned) -> None:
        """Copies every tensor of a plan, which refers to the copies then. Waits for the copies from a GPU."""
        tensors = [data for _, content in plan.files for _, data in content if isinstance(data, Tensor)]
        self._grow(sum(_aligned(tensor.nbytes) for tensor in tensors))
        self._used = 0
        plan.replace(self._take)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _take(self, tensor: Tensor) -> Tensor:
        start, self._used = self._used, self._used + _aligned(tensor.nbytes)
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        # A tensor with a storage of its own: `torch.save` would write all of the buffer for a view of it.
        taken = torch.frombuffer(self._bytes.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return taken.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

    def _grow(self, nbytes: int) -> None:
        if nbytes <= self._bytes.nbytes:
            return
        self.free()
        self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        self._registered = registered(self._bytes)

    def free(self) -> None:
        """Gives the memory back."""
        if self._registered:
            unregistered(self._bytes)
        self._bytes, self._registered = torch.empty(0, dtype=torch.uint8), False


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


@dataclass
class _Job:
    """A checkpoint in progress.

    Args:
        plan: of this rank.
        target: where it goes.
        config: of the model.
        losses: of an evaluation at that step.
        beside: writes other files to its directory, on rank 0.
        after: what to do on every rank once it is in its place.
        lock: held by rank 0 until then.
        thread: that writes; None where it is written at once.
        outcome: of this rank, once it has written.
    """

    plan: Planned
    target: Path
    config: MimoModelConfig
    losses: Mapping[str, float]
    beside: Callable[[Path], None]
    after: Callable[[], None]
    lock: ExitStack
    thread: threading.Thread | None = None
    outcome: Outcome | None = None

    def run(self) -> None:
        """Writes this rank's files."""
        self.outcome = write(self.plan)


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Every rank calls each method alike. A failure on one rank is raised on all of them, and the checkpoints that are
    whole stay.

    Args:
        settings: whether in the background, and what is kept.
    """

    def __init__(self, settings: directories.CheckpointSettings | None = None) -> None:
        self.settings = settings or directories.CheckpointSettings()
        self.buffer = HostBuffer()
        self._group: dist.ProcessGroup | None = None
        self._job: _Job | None = None
        self._at_work = 0  # of the main thread

    def save(
        self,
        plan: Callable[[Path], Planned],
        target: Path,
        config: MimoModelConfig,
        *,
        background: bool,
        losses: Mapping[str, float] | None = None,
        beside: Callable[[Path], None] = lambda written: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes a checkpoint to `target`, where it takes the place of what is there once it is whole.

        In the background the call returns once the state is copied to the host; `poll` at step boundaries finishes it.

        Args:
            plan: gives what this rank writes to a directory; collective.
            target: directory of the checkpoint.
            config: of the model.
            background: whether to write while the run goes on.
            losses: of an evaluation at that step.
            beside: writes other files of the checkpoint to its directory, on rank 0.
            after: what to do on every rank once the checkpoint is in its place.

        Raises:
            OSError: on every rank: no room, no permission, another job that saves there, or a rank that could not
                write.
        """
        with self._working():
            self._save(plan, target, config, background, losses, beside, after)

    def _save(
        self,
        plan: Callable[[Path], Planned],
        target: Path,
        config: MimoModelConfig,
        background: bool,
        losses: Mapping[str, float] | None,
        beside: Callable[[Path], None],
        after: Callable[[], None],
    ) -> None:
        self.wait()
        if self._group is None:
            # Of its own: what goes on in the run's groups meanwhile does not come between.
            self._group = dist.new_group(backend="gloo")
        lock = ExitStack()
        written = self._on_rank_0(lambda: self._begin(target, lock), lock)
        try:
            planned = plan(Path(written))
        except BaseException:
            lock.close()
            raise
        sizes = self._gather(size_of(planned))
        self._on_rank_0(lambda: directories.check_space(target.parent, sum(sizes)), lock)
        self._job = _Job(planned, target, config, losses or {}, beside, after, lock)
        if background:
            self.buffer.copy(planned)
            self._job.thread = threading.Thread(target=self._job.run, name=f"saving {target.name}", daemon=True)
            self._job.thread.start()
        else:
            self._job.run()
            self._finish(self._job)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is in progress."""
        return self._job is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is writing a checkpoint, or puts one in its place; asked by any thread."""
        job = self._job
        return self._at_work > 0 or (job is not None and job.thread is not None and job.thread.is_alive())

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    def poll(self) -> None:
        """Finishes a checkpoint in the background that every rank has written. Called at step boundaries.

        Raises:
            OSError: on every rank, where one of them could not write it.
        """
        if self._job is None:
            return
        writing = torch.tensor([int(self._job.thread is not None and self._job.thread.is_alive())])
        dist.all_reduce(writing, op=dist.ReduceOp.MAX, group=self._group)
        if not writing.item():
            self._finish(self._job)

    def wait(self) -> None:
        """Waits for a checkpoint in the background, and finishes it.

        Raises:
            OSError: as `poll`.
        """
        if self._job is not None:
            with self._working():
                if self._job.thread is not None:
                    self._job.thread.join()
                self._finish(self._job)

    # Below: what the ranks tell each other ------------------------------------------------------------------

    def _begin(self, target: Path, lock: ExitStack) -> str:
        """An empty directory to write to; on rank 0."""
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.enter_context(directories.writing_alone(target.parent))
        return str(directories.begin(target))

    def _finish(self, job: _Job) -> None:
        with self._working():
            self._put_together(job)

    def _put_together(self, job: _Job) -> None:
        self._job = None
        outcomes = self._gather(job.outcome)
        failed = [f"rank {rank}: {each.error}" for rank, each in enumerate(outcomes) if each and each.error]
        self._on_rank_0(lambda: self._put_in_place(job, outcomes, failed), job.lock)
        job.lock.close()
        job.after()

    def _put_in_place(self, job: _Job, outcomes: list[Outcome], failed: list[str]) -> None:
        """Describes the checkpoint and moves it to its place; on rank 0."""
        if failed:
            raise OSError("; ".join(failed))
        describe(job.plan, [each.results for each in outcomes])
        for name, text in self.settings.texts.items():
            manifest.write_durably(job.plan.directory / name, text.encode())
        job.beside(job.plan.directory)
        files = {name: each for outcome in outcomes for name, each in outcome.files.items()}
        manifest.write(job.plan.directory, job.config, files, job.losses)
        directories.publish(job.plan.directory, job.target)
        logger.info("saved %s", job.target)
        for path in directories.clean_up(job.target.parent, self.settings):
            logger.info("deleted %s", path)

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value on rank 0, nothing of them elsewhere."""
        size = dist.get_world_size(self._group)
        values: list[Any] | None = [None] * size if dist.get_rank() == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def _on_rank_0(self, act: Callable[[], Any], lock: ExitStack) -> Any:
        """What `act` gives on rank 0, where alone it runs, on every rank.

        Raises:
            OSError: on every rank, where it raised on rank 0.
        """
        message: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                message = [act(), None]
            except Exception as error:
                message = [None, f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)]
        dist.broadcast_object_list(message, src=0, group=self._group)
        given, failure = message
        if failure is not None:
            lock.close()
            raise OSError(f"the checkpoint was not saved, and those that were are kept: {failure}")
        return given
