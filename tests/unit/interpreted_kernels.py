"""The Triton kernels' code against the reference, in Triton's interpreter; `test_kernels_interpreted` runs this file.

Slow, so the problems are tiny and the blocks smaller still: every loop over blocks is taken.
"""

import pytest
import torch

from megatron_mimo.kernels import reference
from megatron_mimo.kernels import triton as fused_kernels

TOKENS = (-200, 10**12, -1, 7, 2**40)


@pytest.fixture
def fused(monkeypatch):
    """The kernels with blocks of a few elements."""
    for name, value in {"PLAN_BLOCK": 16, "PIECE": 4, "ROW_BLOCK": 16}.items():
        monkeypatch.setattr(fused_kernels, name, value)
    fused_kernels._row_blocks.cache_clear()
    yield fused_kernels
    fused_kernels._row_blocks.cache_clear()


def draw_ids(batch: int, length: int, tokens: tuple[int, ...], distinct: int = 50) -> torch.Tensor:
    torch.manual_seed(length)
    ids = torch.randint(0, distinct, (batch, length))
    for token in tokens:
        ids[torch.rand(batch, length) < 0.25] = token
    return ids


def planned(ids, tokens):
    return reference.plan(ids, tokens, (), text_is_table=False, vocabulary_size=None)


def halved(length: int):
    """Every other position, backwards, and the local row of each position."""
    held = torch.arange(length).flip(0)[::2].contiguous()
    local_row = torch.full((length,), -1, dtype=torch.int32)
    local_row[held] = torch.arange(held.numel(), dtype=torch.int32)
    return held, local_row


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (2, 37)])
@pytest.mark.parametrize(("reads", "generates", "text_is_table"), [(0, 0, True), (2, 2, False)])
def test_plan(fused, batch, length, reads, generates, text_is_table):
    ids = draw_ids(batch, length, TOKENS[:reads])
    arguments = (TOKENS[:reads], (-200, 3)[:generates])
    settings = {"text_is_table": text_is_table, "vocabulary_size": 40}
    expected = reference.plan(ids, *arguments, **settings)
    for ours, theirs in zip(fused.plan(ids, *arguments, **settings), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("text_rows", ["lookup", "given", "zero", "keep"])
@pytest.mark.parametrize("sharded", [False, True])
def test_gather(fused, text_rows, sharded):
    batch, length, hidden, tables = 2, 9, 17, 5
    ids = draw_ids(batch, length, TOKENS[:tables])
    source, row, _, counts = planned(ids, TOKENS[:tables])
    held = halved(length)[0] if sharded else None
    rows = length if held is None else held.numel()
    text = {"lookup": torch.randn(30, hidden + 2)[:, :hidden], "given": torch.randn(rows, batch, hidden)}
    counts = counts[:-1].sum(1).tolist()
    full = [torch.randn(n, hidden) for n in counts]
    full[1] = torch.randn(hidden, counts[1]).t()
    full[2] = full[2][:-1]
    full[3] = full[3].bfloat16()
    for given in (full, [None] * tables, []):
        expected = torch.full((rows, batch, hidden), 7.0)
        ours = expected.clone()
        for kernel, out in ((reference, expected), (fused, ours)):
            plan = (ids, source, row, held)
            kernel.gather(out, text.get(text_rows), given, *plan, text_rows=text_rows, vocabulary_start=10)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_table_gradients(fused, sharded):
    batch, length, hidden = 2, 9, 17
    ids = draw_ids(batch, length, TOKENS)
    *_, positions, counts = planned(ids, TOKENS)
    held, local_row = halved(length) if sharded else (torch.arange(length), None)
    grad = torch.randn(held.numel(), batch, hidden)
    counts = counts[:-1].sum(1).tolist()
    expected = [torch.full((n, 2 * hidden), torch.nan)[:, :hidden] for n in counts]
    expected[0] = torch.full((counts[0] + 3, hidden), torch.nan)
    expected[1] = None
    ours = [None if x is None else x.clone() for x in expected]
    reference.table_gradients(expected, grad, positions, length, local_row)
    fused.table_gradients(ours, grad, positions, length, local_row)
    for a, b in zip(ours, expected, strict=True):
        assert b is None or torch.equal(a, b)


@pytest.mark.parametrize("distinct", [1, 2, 50])
@pytest.mark.parametrize("sharded", [False, True])
def test_vocabulary_gradient(fused, distinct, sharded):
    batch, length, hidden = 2, 21, 17
    ids = draw_ids(batch, length, TOKENS[:1], distinct)
    source = planned(ids, TOKENS[:1])[0]
    held = halved(length)[0] if sharded else None
    grad = torch.randn(length if held is None else held.numel(), batch, hidden, dtype=torch.float64)
    gradients = []
    for kernel in (reference, fused):
        gradient = torch.zeros(30, 2 * hidden, dtype=torch.float64)[:, 1 : 1 + hidden]
        kernel.vocabulary_gradient(gradient, grad, kernel.vocabulary_order(ids, source, held, 0, 30))
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


def test_an_unaligned_tensor_takes_the_same_way(fused):
    ids = draw_ids(1, 9, TOKENS[:1])
    source, row, _, counts = planned(ids, TOKENS[:1])
    table = torch.randn(int(counts[0].sum()) * 5 + 1)[1:].view(-1, 5)
    assert table.data_ptr() % 16
    expected, ours = torch.zeros(9, 1, 5), torch.zeros(9, 1, 5)
    for kernel, out in ((reference, expected), (fused, ours)):
        kernel.gather(out, None, [table], ids, source, row, None, text_rows="zero")
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("text_rows", ["lookup", "given"])
def test_text_that_is_asked_for_must_be_given(fused, text_rows):
    ids = draw_ids(1, 9, TOKENS[:1])
    source, row, *_ = planned(ids, TOKENS[:1])
    for kernel in (reference, fused):
        with pytest.raises(ValueError, match=f"expected `text` for text_rows='{text_rows}', found None"):
            kernel.gather(torch.zeros(9, 1, 5), None, [], ids, source, row, None, text_rows=text_rows)
