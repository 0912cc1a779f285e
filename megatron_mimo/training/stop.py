"""SIGTERM, as the end of the current step; or of the process, where that step does not end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_mimo.exits import exit_now

# How many times as long as the slowest step so far a step may take once a SIGTERM has come, and the least.
GRACE_STEPS, LEAST_GRACE_S = 10.0, 10.0
# torchrun hands on the SIGTERM that a scheduler also sends to every process: two that come together are one.
_TOGETHER_S = 1.0
# How often the watching thread looks, once a signal has come.
_LOOK_S = 0.05
_WAKE = b"\0"  # the number of no signal
_HOST = torch.device("cpu")
# Those that watch in this process. Hooks of a fork cannot be taken back: there is one, for all that watch at that time.
_watching: weakref.WeakSet[StopRequest] = weakref.WeakSet()
_blocked = threading.local()  # mask: of the signals that a thread that forks did not want before


class Pace:
    """When the last step ended, and how long the slowest took."""

    def __init__(self) -> None:
        self.slowest = 0.0
        self.last = time.monotonic()

    def ended(self, seconds: float = 0.0) -> None:
        """Takes note of the end of a step of training or evaluation, or of a save, and of how long a step took."""
        self.last = time.monotonic()
        self.slowest = max(self.slowest, seconds)


class StopRequest:
    """Within it, a signal does not end the process: `received` tells of it at the next step boundary.

    Schedulers send SIGTERM some seconds before they take a machine away: long enough to finish a step
    and save. All ranks learn of a signal that any of them received.

    A thread watches for it beside, since a rank that waits in a collective runs no handler. If no step ends within a
    grace after the signal, or a second one comes, the process ends with status 1 and prints in which collective it was.
    It never does so while `saving` says that a checkpoint is being written.

    It watches for the process that entered it. A process forked meanwhile, such as a worker that reads batches, does
    with the signal what it would have done before, and tells nobody here of it.

    Args:
        device: where this rank's collectives run, where there is no `group`.
        number: of the signal.
        pace: of the run's steps.
        grace_s: seconds; None for ten times the slowest step so far, and at least 10.
        saving: whether this rank is writing a checkpoint.
        group: of all ranks' hosts; None for the device's.

    Example:
        >>> with StopRequest(torch.device("cpu")) as stop:
        ...     stop.received()
        False
    """

    def __init__(
        self,
        device: torch.device = _HOST,
        number: signal.Signals = signal.SIGTERM,
        *,
        pace: Pace | None = None,
        grace_s: float | None = None,
        saving: Callable[[], bool] = lambda: False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._device, self.number, self._group = device, number, group
        self._pace, self._grace_s, self._saving = pace or Pace(), grace_s, saving
        self._flag = False
        self._agreed = False

    def __enter__(self) -> StopRequest:
        self._main = threading.get_ident()
        self._pace.ended()
        # None where another language's code had set it, which Python cannot set again.
        self._before = signal.signal(self.number, self._note) or signal.SIG_DFL
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        # Python's own handlers wait for the main thread to run; this descriptor does not.
        self._descriptor_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="SIGTERM", daemon=True)
        self._watcher.start()
        _watching.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self not in _watching:  # a fork that goes on with its parent's program
            return
        _watching.discard(self)
        signal.set_wakeup_fd(self._descriptor_before)
        signal.signal(self.number, self._before)
        self._done.set()
        # Closing alone would not wake the thread: forked workers of a reader of batches hold the descriptor too.
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            self._write.send(_WAKE)
        self._watcher.join()
        self._write.close()
        self._read.close()

    def received(self) -> bool:
        """Whether any rank got the signal. Collective over all ranks: one all-reduce of one number."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self._agreed = self._flag
            return self._flag
        flag = torch.tensor(int(self._flag), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        self._agreed = bool(flag.item())
        self._pace.ended()
        return self._agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._flag = True

    def leave_in_child(self) -> None:
        """Gives a forked process its signals back; else one to it would wake the thread of the process that forked."""
        signal.set_wakeup_fd(self._descriptor_before)  # whichever thread forked is the child's main thread
        signal.signal(self.number, self._before)
        self._write.close()
        self._read.close()

    # Below: the watching thread ---------------------------------------------------------------------------

    def _watch(self) -> None:
        arrivals: list[float] = []
        while not self._done.is_set():
            for _ in range(self._arrived(blocking=not arrivals)):
                now = time.monotonic()
                if not arrivals or now - arrivals[-1] > _TOGETHER_S:
                    arrivals.append(now)
            if self._done.is_set() or self._agreed:
                continue  # the run is about to end by itself
            if self._saving():  # what it writes shall be whole
                self._pace.ended()
                continue
            if len(arrivals) > 1:
                return self._end("a second signal came")
            if arrivals:
                grace = self._grace_s
                if grace is None:
                    grace = max(LEAST_GRACE_S, GRACE_STEPS * self._pace.slowest)
                if time.monotonic() - max(arrivals[0], self._pace.last) > grace:
                    return self._end(f"no step ended within {grace:g} s")

    def _arrived(self, blocking: bool) -> int:
        """How many of the signal have come; waits for one, or a moment."""
        self._read.settimeout(None if blocking else _LOOK_S)
        try:
            numbers = self._read.recv(64)
        except TimeoutError:
            return 0
        if not blocking and not numbers:
            time.sleep(_LOOK_S)
        if self._descriptor_before >= 0 and numbers != _WAKE:
            os.write(self._descriptor_before, numbers)  # whoever watched before goes on watching
        return numbers.count(int(self.number))

    def _end(self, why: str) -> None:
        frame = sys._current_frames()[self._main]
        stack = traceback.extract_stack(frame)
        rank = dist.get_rank() if dist.is_initialized() else 0
        exit_now(
            f"{''.join(traceback.format_list(stack))}rank {rank}: {self.number.name} came, and {why}. This rank was "
            f"in {place_of(stack)}. It ends without a checkpoint of this step; those before it are kept. Where a rank "
            "waits in a collective, look at what the others do."
        )


def place_of(stack: traceback.StackSummary) -> str:
    """Which collective a stack waits in and who called it, or the innermost line of Python where there is none.

    Args:
        stack: outermost frame first.
    """
    collectives = [
        index
        for index, each in enumerate(stack)
        if each.filename.endswith("torch/distributed/distributed_c10d.py") and not each.name.startswith("_")
    ]
    if not collectives:
        each = stack[-1]
        return f"{each.name} ({each.filename}, line {each.lineno}: {each.line})"
    collective = stack[collectives[0]]
    callers = [each for each in stack[: collectives[0]] if "torch/distributed" not in each.filename]
    caller = callers[-1] if callers else stack[0]
    return f"the collective {collective.name}, called by {caller.name} ({caller.filename}, line {caller.lineno})"


def _before_fork() -> None:
    """A signal to the child waits until the child is ready for it."""
    _blocked.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {each.number for each in _watching})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _blocked.mask)


def _after_fork_in_child() -> None:
    for each in list(_watching):
        each.leave_in_child()
    _watching.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
