"""An iterator that a thread runs ahead of."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any


class Ahead:
    """An iterator that a thread runs ahead of, by `count` items."""

    def __init__(self, made: Iterator[Any], count: int) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=count)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(made,), name="packs ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((item, error))  # it ended: the next call says the same
            raise error
        return item

    def stop(self) -> None:
        """Ends the thread and what it was reading."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _run(self, made: Iterator[Any]) -> None:
        try:
            for item in made:
                self._queue.put((item, None))
                if self._stopped.is_set():
                    return
            self._queue.put((None, StopIteration()))
        except BaseException as error:
            self._queue.put((None, error))
