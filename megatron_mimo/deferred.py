"""Checks on values that live on the device, reported without stopping the host for them.

A check compares something on the device (how many special tokens a batch holds) with something on the host
(how many embeddings arrived). Reading the device value would make the host wait for everything queued before
it. Here the value travels to pinned memory on its own, and the comparison happens when it is there: at once if
it already is, otherwise when the next step begins, which is late enough for the device to have passed it.

Nothing here is optional: a check that was handed over is compared when the next step begins. A step never waits
for a check of its own. Whoever hands checks over owns them (`Checks`): a model those of its batches, a placement made
without a model its own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Arrival:
    """A device tensor's copy on its way to the host.

    Args:
        values: any shape and dtype, on any device. On the CPU it has arrived from the start; on the meta device there
            is nothing to look at, and no check runs.
    """

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values

    @property
    def hollow(self) -> bool:
        """Whether there are no values, on the meta device."""
        return self._host.is_meta

    def here(self) -> bool:
        """Whether the values can be read without waiting."""
        if self._event is not None and self._event.query():
            self._event = None
        return self._event is None

    def wait(self) -> Tensor:
        """The values on the host, after waiting for them where they are still on their way."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host


class Checks:
    """The checks of one owner, a model or a placement, that wait for values of its own batches.

    Two owners never meet: what one waits for is not reported by the other. Checks that nobody asked for until
    their owner is gone (the last batch of a run) are looked at then and logged as errors; `report` raises them.

    Example:
        >>> def refuse(values):
        ...     raise ValueError(f"refused {values.tolist()}")
        >>> Checks().check(Arrival(torch.tensor([3])), refuse, "key")
        Traceback (most recent call last):
        ValueError: refused [3]
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, tuple[Arrival, Callable[[Tensor], None]]] = {}
        #: Whether the batch at hand was checked on the host: nothing of it is looked at on the device then.
        self.settled = False
        self._all_settled = False
        #: Rows that each microbatch brought, `(table, rows, rows of each item)`; None while nobody records them.
        self.brought: list[list[tuple[str, int, tuple[int, ...] | None]]] | None = None
        weakref.finalize(self, _log_left_over, self._waiting)

    def __reduce__(self) -> tuple[type[Checks], tuple[()]]:
        """A copy, on another rank or in another process, waits for nothing: the values stay here."""
        return Checks, ()

    def begin(self, current: Arrival | None = None, settled: bool = False) -> None:
        """A batch begins: what earlier ones left is reported.

        Args:
            current: an arrival of this batch, whose checks go on waiting.
            settled: the batch was checked on the host, so that `look` looks at nothing of it.

        Raises:
            ValueError: as `report`.
        """
        self.report(current=current)
        self.settled = settled or self._all_settled
        if self.brought is not None:
            self.brought.append([])

    @contextmanager
    def recording(self, settled: bool = False) -> Iterator[list[list[tuple[str, int, tuple[int, ...] | None]]]]:
        """Within it, what arrives for each table is kept, a list a microbatch.

        Args:
            settled: its batches were checked on the host, with or without a placement that says so.
        """
        self.brought, self._all_settled = [], settled
        try:
            yield self.brought
        finally:
            self.brought, self._all_settled = None, False

    def came(self, table: str, rows: int, items: tuple[int, ...] | None) -> None:
        """Keeps what arrived for a table, where somebody records it: CUDA graphs, whose replays count nothing."""
        if self.brought:
            self.brought[-1].append((table, rows, items))

    def look(self, values: Callable[[], Tensor], verify: Callable[[Tensor], None], key: Hashable) -> None:
        """`check` of values that are made only where the batch was not checked on the host.

        Args:
            values: makes them.
            verify, key: as `check` takes them.

        Raises:
            ValueError: from `verify`.
        """
        if not self.settled:
            self.check(Arrival(values()), verify, key)

    def check(self, arrival: Arrival, verify: Callable[[Tensor], None], key: Hashable) -> None:
        """Runs `verify(values)` now if the values are here, otherwise when the next step asks.

        Args:
            arrival: the values to look at.
            verify: raises `ValueError` if they are wrong.
            key: names the check; the same check handed over twice waits once.

        Raises:
            ValueError: from `verify`.
        """
        if arrival.hollow:
            return
        if arrival.here():
            verify(arrival.wait())
        else:
            self._waiting[id(arrival), key] = (arrival, verify)

    def report(self, current: Arrival | None = None, only: Arrival | None = None) -> None:
        """Finishes the checks that earlier steps left, waiting for their values if need be.

        The wait is no stall: an earlier step's values left the device before that step's own work, so the device
        still has that work to do when the host resumes.

        Args:
            current: leave this arrival's checks waiting; it belongs to the step that is being queued now.
            only: look at no other arrival's checks.

        Raises:
            ValueError: for the first check that fails; the others stay and report at the next call.
        """
        for name in list(self._waiting):
            arrival, verify = self._waiting[name]
            if arrival is current or (only is not None and arrival is not only):
                continue
            del self._waiting[name]
            verify(arrival.wait())


def _log_left_over(waiting: dict[Hashable, tuple[Arrival, Callable[[Tensor], None]]]) -> None:
    """Looks at the checks of an owner that is gone, too late to raise."""
    for arrival, verify in waiting.values():
        try:
            verify(arrival.wait())
        except ValueError as error:
            logger.error("a batch before the end was bad, and its results are too: %s", error)
    waiting.clear()
