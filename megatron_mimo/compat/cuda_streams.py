"""CUDA's streams and events where everything runs in program order: waiting is already done."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch

__all__ = ["STREAM", "Event", "Guard", "Stream"]


class Stream:
    """A CUDA stream on a machine where everything runs in program order: waiting is already done."""

    device = torch.device("cpu")

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event if event is not None else Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Event:
    """A CUDA event that has happened as soon as it is recorded, and keeps the wall clock for `elapsed_time`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._recorded_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds between this event and `end_event`."""
        return (end_event._recorded_s - self._recorded_s) * 1000.0


class Guard:
    """``torch.cuda.device(index)``: within it, the current device is the one there is."""

    def __init__(self, device: Any = None) -> None:
        self.idx, self.prev_idx = 0, 0

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


#: Stands for every stream.
STREAM = Stream()
