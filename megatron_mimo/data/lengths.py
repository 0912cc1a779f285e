"""How long the samples of a source are: measured once, kept beside it, and what packs they will make."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from megatron_mimo.data.messages import SampleError, conversation_of
from megatron_mimo.data.packing import Packer, PackShape
from megatron_mimo.data.samples import SampleProcessor
from megatron_mimo.data.sources import Source
from megatron_mimo.data.written import write_whole


@dataclass(frozen=True)
class _Length:
    tokens: int
    cost: float


@dataclass(frozen=True)
class Expected:
    """What an epoch will come to.

    Args:
        packs: of the epoch, in the order of the records.
        waste: share of their positions that stays empty.
        skipped: samples left out, by kind.
    """

    packs: int
    waste: float
    skipped: dict[str, int]


@dataclass(frozen=True)
class Lengths:
    """Tokens and media cost of every record of a source. `prepare` measures them.

    Args:
        tokens: int64 `[records]`, 0 where a record cannot be used.
        costs: float64 `[records]`.
        skipped: records that cannot be used, by kind.
        reasons: the first record of each kind, and why it cannot be used; those of `load` have none.
    """

    tokens: np.ndarray
    costs: np.ndarray
    skipped: dict[str, int]
    reasons: dict[str, str] = field(default_factory=dict)

    def expected(self, shape: PackShape) -> Expected:
        """What an epoch of packs of a shape will come to, samples that fit none left out.

        Example:
            >>> Lengths(np.array([6, 4, 9, 0]), np.zeros(4), {"media": 1}).expected(PackShape(length=10))
            Expected(packs=2, waste=0.05, skipped={'media': 1})
        """
        packer, packs, tokens, skipped = Packer(shape), 0, 0, Counter(self.skipped)
        for length, cost in zip(self.tokens.tolist(), self.costs.tolist()):
            if length > shape.length or (shape.budget is not None and cost > shape.budget):
                skipped["too_long" if length > shape.length else "too_costly"] += 1
            elif length:
                packs += len(packer.add(_Length(length, cost)))
                tokens += length
        packs += len(packer.flush())
        return Expected(packs, round(1 - tokens / (packs * shape.length), 6) if packs else 0.0, dict(skipped))

    def save(self, path: Path) -> None:
        """Writes a file of numpy that `load` reads, under its name once it is whole."""
        written = io.BytesIO()
        np.savez(written, tokens=self.tokens, costs=self.costs, skipped=np.array(json.dumps(self.skipped)))
        write_whole(path, written.getvalue())

    @staticmethod
    def load(path: Path) -> Lengths:
        """What `save` wrote; nothing in it is run.

        Raises:
            FileNotFoundError: it was not measured.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: the lengths were not measured; call prepare(source, process)")
        with np.load(path, allow_pickle=False) as file:
            return Lengths(file["tokens"], file["costs"], json.loads(str(file["skipped"])))


def lengths_path(source: Source) -> Path:
    """Where the lengths of a source are kept: beside it."""
    path = Path(os.path.abspath(source.path))  # "." has a name too; links are not followed
    return path.with_name(f"{path.name}.lengths.npz")


def prepare(source: Source, process: SampleProcessor, *, workers: int = 0) -> Lengths:
    """Measures every record of a source and keeps the lengths beside it.

    Args:
        source: of files; its directory is written to.
        process: makes samples, as in training; other settings make other lengths.
        workers: processes that read.

    Example:
        >>> prepare(open_source("train.jsonl"), process).expected(shape).packs     # doctest: +SKIP
    """
    tokens, costs = np.zeros(len(source), np.int64), np.zeros(len(source))
    skipped: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    loader = DataLoader(_Measured(source, process), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    for index, (length, cost, kind, reason) in enumerate(loader):
        tokens[index], costs[index] = length, cost
        if kind:
            skipped[kind] += 1
            reasons.setdefault(kind, f"{source.where(index)}: {reason}")
    measured = Lengths(tokens, costs, dict(skipped), reasons)
    measured.save(lengths_path(source))
    return measured


class _Measured(Dataset):
    def __init__(self, source: Source, process: SampleProcessor) -> None:
        self._source, self._process = source, process

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, float, str, str]:
        try:
            conversation = conversation_of(self._source.record(index), columns=self._source.columns)
            sample = self._process(conversation, self._source.media_root)
        except SampleError as error:
            return 0, 0.0, error.kind, str(error)
        return len(sample), sample.cost, "", ""


def _as_it_is(item: Sequence) -> Sequence:
    return item
