"""Blocks of scores are those that a written-out mask has, and attention by them equals a call for each sample."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.segment_kernels import BLOCK, block_lists, flexible, takes_flexible, takes_varlen
from megatron_mimo.segments import segmented, span_mask


@st.composite
def packs(draw) -> tuple[list[int], torch.Tensor]:
    """Boundaries of samples, and runs within them that see the whole of themselves."""
    boundaries, spans = [0], []
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 3 * BLOCK))
        boundaries.append(boundaries[-1] + length)
        own = torch.full((length,), -1, dtype=torch.int32)
        if draw(st.booleans()):
            start = draw(st.integers(0, length - 1))
            own[start : draw(st.integers(start + 1, length))] = len(boundaries)
        spans.append(own)
    return boundaries, torch.cat(spans)


def written_out(boundaries: list[int], spans: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool `[S, S]`."""
    mask = torch.zeros(len(spans), len(spans), dtype=torch.bool)
    for start, stop in pairwise(boundaries):
        mask[start:stop, start:stop] = span_mask(spans[start:stop])
    return mask


@settings(max_examples=60, deadline=None)
@given(packs())
def test_a_block_is_listed_where_it_has_a_score_and_as_whole_where_it_has_all(pack) -> None:
    boundaries, spans = pack
    mask = written_out(boundaries, spans)
    lists = block_lists(boundaries, spans)
    count = -(-len(spans) // BLOCK)
    for query in range(count):
        partial, whole = (set(lists[kind, query, 1 : 1 + int(lists[kind, query, 0])].tolist()) for kind in (0, 1))
        assert not partial & whole
        for key in range(count):
            block = mask[query * BLOCK : (query + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK]
            assert bool(block.any()) == (key in partial | whole), (query, key)
            if key in whole:
                assert block.all() and block.shape[1] == BLOCK
            elif key < query and len(boundaries) == 2:
                raise AssertionError("a block before the queries' own, of one sample, is whole")


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_by_blocks_equals_a_mask_that_is_written_out(heads) -> None:
    """Torch has this kernel on the CPU in one direction."""
    draw = torch.Generator().manual_seed(1)
    boundaries = [0, 100, 300, 330]
    spans = torch.full((330,), -1, dtype=torch.int32)
    spans[20:50], spans[120:290] = 0, 1
    q, k, v = (torch.randn(330, number, 16, generator=draw) for number in (heads[0], heads[1], heads[1]))
    params = segmented(torch.tensor(boundaries, dtype=torch.int32), spans=spans)
    assert params.block_mask() is params.block_mask()  # one for all layers
    with torch.no_grad():
        found = flexible(q, k, v, params.block_mask(), scale=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=written_out(boundaries, spans), scale=0.3,
        enable_gqa=heads[0] != heads[1],
    )[0].transpose(0, 1)  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_lists_of_a_pack_are_small_and_the_mask_needs_spans() -> None:
    spans = torch.full((4096,), -1, dtype=torch.int32)
    spans[10:1000] = 0
    params = segmented(torch.tensor([0, 4096], dtype=torch.int32), spans=spans)
    assert params.blocks.numel() * params.blocks.element_size() < 10_000  # a mask of bytes would be 16 MB
    with pytest.raises(ValueError, match="expected media spans"):
        segmented(torch.tensor([0, 8], dtype=torch.int32)).block_mask()


def test_no_fused_kernel_is_asked_for_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert not takes_varlen(cpu, torch.bfloat16, 16) and not takes_flexible(cpu, 16)
