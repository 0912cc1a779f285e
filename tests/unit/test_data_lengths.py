"""Lengths are measured once, kept beside the source, and tell what an epoch will come to."""

import numpy as np
import pytest

from megatron_mimo.data.lengths import Lengths, lengths_path, prepare
from megatron_mimo.data.loading import PackedData, ReadingOptions
from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.sources import JsonLines
from tests import data_samples as made


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_expected_of_an_epoch_is_what_comes(tmp_path, workers):
    (tmp_path / "a.png").write_bytes(made.png())
    records = [{"text": "a cat " * (index % 9 + 1)} for index in range(50)]
    records += [{"messages": [made.user(made.image("a.png")), made.assistant("A cat")]}, {"title": "none"}]
    records += [{"text": "a " * 500}]
    source = JsonLines(made.lines(tmp_path / "train.jsonl", records))
    shape = PackShape(length=64, multiple=4, buffer=8)
    measured = prepare(source, made.processor(), workers=workers)
    assert lengths_path(source) == tmp_path / "train.jsonl.lengths.npz"
    assert list(measured.reasons) == ["form"] and f"{source.where(51)}: expected 'messages'" in measured.reasons["form"]
    kept = Lengths.load(lengths_path(source))
    assert np.array_equal(kept.tokens, measured.tokens) and np.array_equal(kept.costs, measured.costs)
    assert kept.costs[50] > 0 and kept.tokens[51] == 0
    data = PackedData([source], made.processor(), shape, options=ReadingOptions(shuffle=False), samples=len(records))
    packs = list(data)
    expected = kept.expected(shape)
    assert expected.packs == len(packs)
    assert expected.skipped == data.skipped == {"form": 1, "too_long": 1}
    assert expected.waste == pytest.approx(1 - sum(pack.tokens for pack in packs) / (64 * len(packs)), abs=1e-6)


def test_samples_beyond_the_budget_are_left_out_of_what_is_expected():
    lengths = Lengths(np.array([5, 5]), np.array([1.0, 9.0]), {})
    assert lengths.expected(PackShape(length=10, budget=4.0)).skipped == {"too_costly": 1}
    assert Lengths(np.array([0]), np.array([0.0]), {}).expected(PackShape(length=10)).packs == 0


def test_lengths_that_were_not_measured_are_missed(tmp_path):
    with pytest.raises(FileNotFoundError, match="call prepare"):
        Lengths.load(tmp_path / "x.npz")
