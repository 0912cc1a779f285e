"""A source in two parts: records to train on, and records to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_mimo.data.sources import Source


class Part(Source):
    """Some of a source's records.

    Args:
        source: whose.
        records: int64, their numbers there, in the order in which they are numbered here.
    """

    def __init__(self, source: Source, records: np.ndarray) -> None:
        super().__init__(source.path, source.media_root, source.columns)
        self._source, self._records = source, records

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Mapping[str, Any]:
        return self._source.record(int(self._records[index]))

    def where(self, index: int) -> str:
        return self._source.where(int(self._records[index]))


def split(source: Source, share: float, seed: int = 0) -> tuple[Part, Part]:
    """`(rest, held_out)` of a source: records drawn by `seed`, the same for every run and rank.

    Args:
        source: at least two records.
        share: of the records that are held out; at least one is, and at least one is not.
        seed: of the draw.

    Raises:
        ValueError: a share outside (0, 1), or a source of one record.

    Example:
        >>> rest, held_out = split(source, 0.05)                                  # doctest: +SKIP
    """
    if not 0 < share < 1:
        raise ValueError(f"split: expected a share between 0 and 1, found {share}")
    if len(source) < 2:
        raise ValueError(f"{source.path}: expected at least 2 records, one to hold out, found {len(source)}")
    held = min(max(1, round(share * len(source))), len(source) - 1)
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(source))
    return Part(source, np.sort(drawn[held:])), Part(source, np.sort(drawn[:held]))
