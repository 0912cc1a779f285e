"""How far a run has read its data, as plain JSON, and how another number of ranks goes on from there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]


@dataclass
class Progress:
    """Where a rank stands: what `state_dict` holds.

    Attributes:
        next: position of the order that is read next, once the backlog is through.
        backlog: positions that another number of ranks left unread.
        waiting: of samples in the packing buffer.
        ready: of the samples of each pack that is made and not taken.
        skipped: samples left out, by kind.
        stream: of records without numbers, a place in them that all of these positions come after.
    """

    next: int
    backlog: list[int]
    waiting: list[int]
    ready: list[list[int]]
    skipped: Counter[str]
    stream: State | None

    def __init__(
        self, next: int, backlog=(), waiting=(), ready=(), skipped=(), stream: Mapping[str, Any] | None = None
    ) -> None:
        self.next, self.backlog, self.waiting = next, list(backlog), list(waiting)
        self.ready, self.skipped = [list(pack) for pack in ready], Counter(dict(skipped))
        self.stream = None if stream is None else dict(stream)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        return cls(**state)

    def state(self) -> State:
        found = {
            "next": self.next,
            "backlog": list(self.backlog),
            "waiting": list(self.waiting),
            "ready": [list(pack) for pack in self.ready],
            "skipped": dict(self.skipped),
        }
        return found if self.stream is None else {**found, "stream": self.stream}

    def pending(self) -> list[int]:
        """Positions whose samples are read and not given out: those of packs that are ready, then those that wait."""
        return [position for pack in self.ready for position in pack] + self.waiting

    def passed(self, position: int, size: int) -> None:
        """Takes note of a sample that was read: the first of the backlog, or else the next of the order."""
        if self.backlog:
            self.backlog.pop(0)
        else:
            self.next = position + size


def joined_states(states: Sequence[State]) -> State:
    """The state of a run, of the states of all its data-parallel ranks.

    Raises:
        ValueError: states of different runs.

    Example:
        >>> one = {"order": {}, "size": 2, "ranks": {"0": {"next": 2}}}
        >>> joined_states([one, one | {"ranks": {"1": {"next": 3}}}])["ranks"]
        {'0': {'next': 2}, '1': {'next': 3}}
    """
    first = states[0]
    if any(state["order"] != first["order"] or state["size"] != first["size"] for state in states):
        raise ValueError("states of different runs cannot be joined: sources, order and ranks must be the same")
    return {**first, "ranks": {rank: one for state in states for rank, one in state["ranks"].items()}}


def redealt(ranks: Mapping[int, State], rank: int, size: int, limit: int | None) -> State:
    """What rank `rank` of `size` has before it, of what another number of ranks had: nothing lost, nothing twice."""
    horizon = max(state["next"] for state in ranks.values())
    left: list[int] = []
    skipped: Counter[str] = Counter()
    for state in ranks.values():
        left += state["backlog"] + state["waiting"] + [position for pack in state["ready"] for position in pack]
        left += range(state["next"], horizon if limit is None else min(horizon, limit), len(ranks))
        skipped.update(state["skipped"])
    # A stream goes on from where all that is left comes after.
    streams = [state["stream"] for state in ranks.values() if "stream" in state]
    stream = min(streams, key=lambda one: one["at"]) if len(streams) == len(ranks) else None
    # The counts go on with one rank, so that their sum over ranks stays what it was.
    return Progress(
        horizon + rank, sorted(left)[rank::size], skipped=skipped if rank == 0 else (), stream=stream
    ).state()
