"""Names the rank that holds a run up: what it is doing, since when, and which collective the others wait in.

A thread of each rank tells the others through the store of the process group, not through collectives, which a rank
that does not answer would hold up too.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from megatron_mimo.compat.torch import own_store
from megatron_mimo.launch import Run
from megatron_mimo.training.stop import Pace, place_of

logger = logging.getLogger(__name__)

# A run is held up where no step ends for so many times the slowest so far, and for the least of seconds.
STALL_STEPS, LEAST_STALL_S = 10.0, 60.0
# How often a rank tells what it does, at most.
BEAT_S = 1.0
# A rank is slow where it takes so many times the median of all ranks, and so many seconds a step more.
SLOW_TIMES, SLOW_S = 1.5, 0.05
# How often slow ranks are shown, and in how few steps at least.
SLOW_EVERY_S, SLOW_STEPS = 60.0, 5
# Ranks that a report names, and groups of ranks that it describes; of more it tells the number.
SHOWN = 8
# What a place begins with that is a collective; see `place_of`.
_WAITS = "the collective "

READING, COMPUTING, REDUCING = "reading data", "forward and backward passes", "reduction of gradients"
STEPPING, EVALUATING, SAVING, BETWEEN = "optimizer", "evaluation", "checkpoint", "between steps"
#: Stages whose seconds are a rank's own: in the others it waits for others.
OWN = (READING, COMPUTING)


class Watched(NamedTuple):
    """What is asked of a `Run`."""

    rank: int
    world_size: int


class Stages:
    """What a rank is doing, since when, and how long it did each thing so far. One thread enters, others look."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds: dict[str, float] = {}
        self._now = (BETWEEN, time.monotonic())

    def enter(self, stage: str) -> None:
        """The stage before ends, and `stage` begins."""
        before, since = self._now
        now = time.monotonic()
        self.seconds[before] = self.seconds.get(before, 0.0) + now - since
        self._now = (stage, now)

    def reading[Item](self, items: Iterator[Item]) -> Iterator[Item]:
        """`items`, each of which is read in a stage of its own."""
        while True:
            stage, _ = self._now
            self.enter(READING)
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.enter(stage)
            yield item

    def now(self) -> tuple[str, float]:
        """The stage, and its seconds up to now."""
        stage, since = self._now
        return stage, time.monotonic() - since


@dataclass
class _Heard:
    """What a rank told last, and when that was."""

    told: Mapping[str, Any]
    at: float
    shown: Mapping[str, Any] = field(default_factory=dict)  # the last that slow ranks were reckoned from


class Watch:
    """Within it, a rank that holds the run up is named in the log, and slow ranks are shown.

    One rank logs: the lowest of those that answer.

    Args:
        run: in progress.
        stages: what this rank does.
        pace: of the run's steps.
        stall_s: seconds without the end of a step after which the run is held up; None for ten times the slowest step
            so far, and at least 60. It is told again each time as long has passed.

    Example:
        >>> with Watch(run, stages, pace):                                        # doctest: +SKIP
        ...     stages.enter("forward and backward passes")
    """

    def __init__(self, run: Run | Watched, stages: Stages, pace: Pace, stall_s: float | None = None) -> None:
        self._run, self._stages, self._pace, self._stall_s = run, stages, pace, stall_s
        self._heard: dict[int, _Heard] = {}
        self._beats = 0
        self._reported = time.monotonic()
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        self._main = threading.get_ident()
        self._pace.ended()
        self._shown = self._reported = time.monotonic()
        self._store = own_store() if self._run.world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    # Below: the watching thread ---------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._done.wait(min(BEAT_S, self._limit() / 4)):
            try:
                self._beat()
                self._look()
            except Exception as error:  # the store goes with the rank that holds it
                logger.debug("watch: %s", error)
                self._store = None

    def _limit(self) -> float:
        return max(LEAST_STALL_S, STALL_STEPS * self._pace.slowest) if self._stall_s is None else self._stall_s

    def _beat(self) -> None:
        """Tells what this rank does."""
        self._beats += 1
        stage, seconds = self._stages.now()
        frame = sys._current_frames().get(self._main)
        told = {
            "beat": self._beats,
            "step": self._stages.step,
            "stage": stage,
            "for": seconds,
            "place": "" if frame is None else place_of(traceback.extract_stack(frame)),
            "seconds": {name: self._stages.seconds.get(name, 0.0) for name in OWN},
        }
        self._hear(self._run.rank, told)
        if self._store is not None:
            self._store.set(f"watch/{self._run.rank}", json.dumps(told))
            for rank in range(self._run.world_size):
                if rank != self._run.rank and self._store.check([f"watch/{rank}"]):
                    self._hear(rank, json.loads(self._store.get(f"watch/{rank}")))

    def _hear(self, rank: int, told: Mapping[str, Any]) -> None:
        known = self._heard.get(rank)
        if known is None:
            self._heard[rank] = _Heard(told, time.monotonic(), told)
        elif known.told["beat"] != told["beat"]:
            known.told, known.at = told, time.monotonic()

    def _look(self) -> None:
        now, limit = time.monotonic(), self._limit()
        silent = 3 * BEAT_S + limit / 4
        answering = [rank for rank, heard in self._heard.items() if now - heard.at < silent]
        if self._run.rank != min(answering):
            return
        if now - max(self._pace.last, self._reported) > limit:
            self._reported = now
            logger.warning("%s", self._held_up(now, answering))
        if now - self._shown > SLOW_EVERY_S:
            self._shown = now
            for line in slow_ranks({rank: (heard.shown, heard.told) for rank, heard in self._heard.items()}):
                logger.warning("%s", line)
            for heard in self._heard.values():
                heard.shown = heard.told

    def _held_up(self, now: float, answering: Sequence[int]) -> str:
        """Who holds the run up, and who waits: those that do not answer, then the few before the many."""
        silent, doing = [], dict[tuple[int, str, str], list[int]]()
        for rank in range(self._run.world_size):
            heard = self._heard.get(rank)
            if heard is None:
                silent.append(f"rank {rank} has told nothing since the run began")
            elif rank not in answering:
                told, seconds = heard.told, now - heard.at
                silent.append(
                    f"rank {rank} has not answered for {seconds:.0f} s; it was in step {told['step']}, "
                    f"{told['stage']} for {told['for'] + seconds:.0f} s, in {told['place']}"
                )
            else:
                doing.setdefault((heard.told["step"], heard.told["stage"], heard.told["place"]), []).append(rank)
        # A GPU's collectives return at once: ranks that wait for them are many in one place.
        groups = sorted(doing.items(), key=lambda one: (one[0][2].startswith(_WAITS), len(one[1]), one[1]))
        lines = silent + [self._group(now, what, ranks) for what, ranks in groups]
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        return f"no step has ended for {now - self._pace.last:.0f} s. {'; '.join(lines[:SHOWN])}{more}"

    def _group(self, now: float, what: tuple[int, str, str], ranks: Sequence[int]) -> str:
        """Ranks that do the same."""
        step, stage, place = what
        seconds = max(self._heard[rank].told["for"] + now - self._heard[rank].at for rank in ranks)
        named = ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" * (len(ranks) > SHOWN))
        if place.startswith(_WAITS):
            return f"waiting for {seconds:.0f} s: rank {named} (step {step}, {stage}, {place})"
        are = "is" if len(ranks) == 1 else "are"
        return f"rank {named} {are} in step {step}, {stage} for {seconds:.0f} s, in {place}"


def slow_ranks(told: Mapping[int, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """A line for each stage in which ranks are slow, empty where none is.

    Args:
        told: rank -> what it told at the beginning and at the end of a time.

    Example:
        >>> before = {"step": 0, "seconds": {"reading data": 0.0}}
        >>> after = [{"step": 10, "seconds": {"reading data": seconds}} for seconds in (0.1, 0.2, 9.0)]
        >>> slow_ranks({rank: (before, each) for rank, each in enumerate(after)})
        ['slow in reading data, steps 0 to 10: rank 2 takes 0.900 s a step (median of all ranks 0.020 s)']
    """
    lines = []
    for stage in OWN:
        mine = {}
        for rank, (before, after) in told.items():
            steps = after["step"] - before["step"]
            if steps < SLOW_STEPS:
                return []
            mine[rank] = (after["seconds"].get(stage, 0.0) - before["seconds"].get(stage, 0.0)) / steps
        median = statistics.median_low(mine.values()) if mine else 0.0
        slow = {rank: each for rank, each in mine.items() if each > SLOW_TIMES * median and each - median > SLOW_S}
        if slow:
            first, last = (
                min(before["step"] for before, _ in told.values()),
                max(each["step"] for _, each in told.values()),
            )
            named = ", ".join(f"rank {rank} takes {each:.3f} s a step" for rank, each in list(slow.items())[:SHOWN])
            lines.append(f"slow in {stage}, steps {first} to {last}: {named} (median of all ranks {median:.3f} s)")
    return lines
