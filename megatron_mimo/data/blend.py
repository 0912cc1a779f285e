"""Several sources as one endless order of samples that a number alone determines.

`order.at(position)` says which record of which source the `position`-th sample is, for every position, without the ones
before it: data-parallel ranks, workers and resumed runs agree on it with no word exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

# Shares are kept to a thousandth: within each thousand samples every source has its whole number of them.
PERIOD = 1000


@dataclass(frozen=True)
class Place:
    """Which sample stands at a position: record `index` of source `source`, in that source's pass `epoch`."""

    source: int
    index: int
    epoch: int


class Order:
    """The order of the samples of one or more sources.

    Without weights the sources are one: an epoch has every record of all of them once. With weights every thousand
    samples hold the sources in these shares, evenly spread, and each source begins anew when it is through.

    Args:
        lengths: records of each source.
        weights: share of each source; None: as they are long.
        seed: of the order within an epoch.
        shuffle: False keeps records as they stand.

    Raises:
        ValueError: an empty source, or weights that are no shares.

    Example:
        >>> order = Order([4], shuffle=False)
        >>> [order.at(position).index for position in range(6)]
        [0, 1, 2, 3, 0, 1]
        >>> blend = Order([10, 10], weights=[3, 1], shuffle=False)
        >>> [blend.at(position).source for position in range(8)]
        [0, 0, 1, 0, 0, 0, 1, 0]
    """

    def __init__(
        self, lengths: Sequence[int], *, weights: Sequence[float] | None = None, seed: int = 0, shuffle: bool = True
    ) -> None:
        for source, length in enumerate(lengths):
            if length < 1:
                raise ValueError(f"source {source} has no record; leave it out or give one that has")
        if not lengths:
            raise ValueError("expected at least one source, found none")
        self._ends = np.cumsum(lengths)
        self._lengths = list(lengths) if weights is not None else [int(self._ends[-1])]
        self._joined = weights is None
        self._pattern = _pattern(len(lengths), weights)
        self._ranks, self._per_period = _ranks(self._pattern, len(self._lengths))
        self._seed, self._shuffle = seed, shuffle
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def at(self, position: int) -> Place:
        """What stands at `position`, counted from 0 over all epochs."""
        period, slot = divmod(position, len(self._pattern))
        lane = int(self._pattern[slot])
        nth = period * self._per_period[lane] + int(self._ranks[slot])
        epoch, offset = divmod(nth, self._lengths[lane])
        index = int(self._permutation(lane, epoch)[offset]) if self._shuffle else offset
        if not self._joined:
            return Place(lane, index, epoch)
        source = int(np.searchsorted(self._ends, index, side="right"))
        return Place(source, index - (int(self._ends[source - 1]) if source else 0), epoch)

    def _permutation(self, lane: int, epoch: int) -> np.ndarray:
        known = self._orders.get(lane)
        if known is None or known[0] != epoch:
            draw = np.random.Generator(np.random.PCG64([self._seed, lane, epoch]))
            known = self._orders[lane] = (epoch, draw.permutation(self._lengths[lane]))
        return known[1]


def _pattern(sources: int, weights: Sequence[float] | None) -> np.ndarray:
    """int64 `[period]`: the lane of each slot, each lane as often as its share says and evenly spread."""
    if weights is None:
        return np.zeros(1, dtype=np.int64)
    if len(weights) != sources:
        raise ValueError(f"expected a weight for each of {sources} sources, found {len(weights)}")
    if not all(isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights: expected numbers above 0, found {list(weights)}")
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(-(exact - counts), kind="stable")[: PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(
            f"weights {list(weights)}: one source has less than 1 in {PERIOD} of the samples; give it more"
        )
    divisor = np.gcd.reduce(counts)
    counts //= divisor
    # The k-th of n samples of a lane is due at (k + 1/2) / n of the period; ties go to the first source.
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(sources), counts)[np.argsort(due, kind="stable")]


def _ranks(pattern: np.ndarray, lanes: int) -> tuple[np.ndarray, list[int]]:
    """For each slot how many slots of its lane come before it, and the slots of each lane in a period."""
    ranks = np.zeros(len(pattern), dtype=np.int64)
    for lane in range(lanes):
        slots = np.flatnonzero(pattern == lane)
        ranks[slots] = np.arange(len(slots))
    return ranks, [int((pattern == lane).sum()) for lane in range(lanes)]
