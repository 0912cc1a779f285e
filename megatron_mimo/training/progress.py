"""A progress bar of one line, in a terminal, a notebook or a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

WIDTH = 24
# A log file gets a line of its own each time; a terminal's line is rewritten.
LOG_INTERVAL_S = 10.0
TERMINAL_INTERVAL_S = 0.1


class Progress:
    """Shows how far a run has come, how long it will take, and its losses.

    Args:
        total: steps of the run.
        shown: False makes it do nothing.
        stream: to write to; None for standard error.
        unit: what is counted.

    Example:
        >>> with Progress(2, shown=True, stream=sys.stdout) as bar:
        ...     bar.show(2, {"text": 0.5}, seconds=0.1)
        [########################] 2/2  0 s left  100 ms/step  text 0.5000
    """

    def __init__(self, total: int, shown: bool, stream: TextIO | None = None, unit: str = "step") -> None:
        self._total, self._shown, self._unit = total, shown, unit
        self._stream = sys.stderr if stream is None else stream
        self._rewrites = shown and self._stream.isatty()
        self._last_shown = -LOG_INTERVAL_S

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rewrites:
            self._stream.write("\n")

    def show(self, done: int, losses: Mapping[str, float], seconds: float) -> None:
        """Writes the state after `done` steps, of which the last took `seconds`; not at every step."""
        now = time.monotonic()
        interval = TERMINAL_INTERVAL_S if self._rewrites else LOG_INTERVAL_S
        if not self._shown or (now - self._last_shown < interval and done < self._total):
            return
        self._last_shown = now
        filled = WIDTH * done // self._total
        terms = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        line = (
            f"[{'#' * filled:<{WIDTH}}] {done}/{self._total}  {(self._total - done) * seconds:.0f} s left  "
            f"{seconds * 1e3:.0f} ms/{self._unit}  {terms}"
        ).rstrip()
        self._stream.write(f"\r\x1b[K{line}" if self._rewrites else f"{line}\n")
        self._stream.flush()
