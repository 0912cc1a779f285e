"""SIGTERM, as the end of the current step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class StopRequest:
    """Within it, a signal does not end the process: `received` tells of it at the next step boundary.

    Schedulers send SIGTERM some seconds before they take a machine away: long enough to finish a step
    and save. All ranks learn of a signal that any of them received.

    Args:
        device: where this rank's collectives run.
        number: of the signal.

    Example:
        >>> with StopRequest(torch.device("cpu")) as stop:
        ...     stop.received()
        False
    """

    def __init__(self, device: torch.device, number: signal.Signals = signal.SIGTERM) -> None:
        self._device, self._number = device, number
        self._flag = False

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(self._number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(self._number, self._before)

    def received(self) -> bool:
        """Whether any rank got the signal. Collective over all ranks: one all-reduce of one number."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._flag
        flag = torch.tensor(int(self._flag), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._flag = True
