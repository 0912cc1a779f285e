"""Which positions a rank holds, against written-out lists and the code that Megatron cuts batches with."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.sharding import SequenceShard, sequence_shard


def zigzag(length: int, rank: int, size: int) -> list[int]:
    """Chunks `rank` and `2 * size - 1 - rank` of `2 * size`, written out."""
    chunk = length // (2 * size)
    chunks = [list(range(i * chunk, (i + 1) * chunk)) for i in range(2 * size)]
    return chunks[rank] + chunks[2 * size - 1 - rank]


def packed_zigzag(lengths: list[int], rank: int, size: int) -> list[int]:
    """The zigzag of each packed sequence, one after the other."""
    positions, start = [], 0
    for length in lengths:
        positions += [start + s for s in zigzag(length, rank, size)]
        start += length
    return positions


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_one_rank_holds_everything_in_order():
    shard = sequence_shard(6)
    assert shard.is_whole and shard.length == shard.cp_length == 6
    assert shard.positions.tolist() == list(range(6))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_context_parallel_ranks_hold_the_zigzag(size):
    for rank in range(size):
        shard = sequence_shard(24, cp_rank=rank, cp_size=size)
        assert shard.positions.tolist() == zigzag(24, rank, size)
        assert shard.length == 24 // size


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4), st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_packed_sequences_are_each_cut_in_a_zigzag(size, chunks, data):
    lengths = [2 * size * n for n in chunks]
    rank = data.draw(st.integers(0, size - 1))
    if sum(lengths) == 0:
        return
    shard = sequence_shard(sum(lengths), cp_rank=rank, cp_size=size, cu_seqlens=boundaries(lengths))
    assert shard.positions.tolist() == packed_zigzag(lengths, rank, size)


@pytest.mark.parametrize("cu_seqlens", [None, boundaries([8, 40])])
@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (2, 1), (2, 2), (2, 3), (1, 4)])
def test_the_ranks_together_hold_every_position_once(cp, tp, cu_seqlens):
    shards = [
        sequence_shard(48, cp_rank=c, cp_size=cp, tp_rank=t, tp_size=tp, cu_seqlens=cu_seqlens)
        for c in range(cp)
        for t in range(tp)
    ]
    held = torch.cat([shard.positions for shard in shards])
    assert held.sort().values.tolist() == list(range(48))
    assert {shard.length for shard in shards} == {48 // (cp * tp)}
    for shard in shards:
        assert (
            shard.positions.tolist()
            == shard.whole_cp.positions.tolist()[shard.tp_rank * shard.length :][: shard.length]
        )


def test_sequence_parallel_ranks_hold_slices_of_the_context_parallel_part():
    first, second = (sequence_shard(16, cp_rank=1, cp_size=2, tp_rank=t, tp_size=2) for t in range(2))
    assert first.positions.tolist() + second.positions.tolist() == zigzag(16, 1, 2)


def test_cut_takes_the_context_parallel_part_along_any_dim():
    shard = sequence_shard(8, cp_rank=1, cp_size=2, tp_rank=1, tp_size=2)
    labels = torch.arange(16).view(2, 8)
    assert shard.cut(labels).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert torch.equal(shard.cut(labels.expand(3, 2, 8), dim=2), shard.cut(labels).expand(3, 2, 4))
    whole = sequence_shard(8)
    assert whole.cut(labels) is labels


def test_cut_wants_the_whole_sequence():
    with pytest.raises(ValueError, match=r"shape \(2, 4\): its dim 1 should be the sequence length 8"):
        sequence_shard(8, cp_size=2).cut(torch.zeros(2, 4))


@pytest.mark.parametrize("layout", [{}, {"cp_size": 2, "cp_rank": 1}, {"cp_size": 2, "tp_size": 2, "tp_rank": 1}])
def test_local_index_finds_each_position_in_the_flattened_local_rows(layout):
    shard = sequence_shard(16, **layout)
    positions = torch.arange(3 * 16)
    index, owned = shard.local_index(positions, batch_size=3)
    flat = torch.arange(shard.length * 3).view(shard.length, 3)
    for local, s in enumerate(shard.positions.tolist()):
        for b in range(3):
            assert owned[b * 16 + s]
            assert index[b * 16 + s] == flat[local, b]
    assert owned.sum() == shard.length * 3
    assert (index[~owned] == 0).all()


def test_local_row_is_minus_one_for_other_ranks_positions():
    assert sequence_shard(8, cp_size=2).local_row.tolist() == [0, 1, -1, -1, -1, -1, 2, 3]


def test_equal_arguments_give_the_same_shard():
    assert sequence_shard(32, cp_size=2) is sequence_shard(32, cp_size=2)


def test_it_is_the_partition_that_megatron_cuts_batches_with(monkeypatch):
    from megatron.core import utils

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    tokens = torch.arange(2 * 32).view(2, 32)
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        cut = utils.get_batch_on_this_cp_rank({"tokens": tokens}, is_hybrid_cp=False, cp_group=object())
        assert torch.equal(sequence_shard(32, cp_rank=rank, cp_size=4).cut(tokens), cut["tokens"])


@pytest.mark.parametrize(
    ("length", "layout", "multiple"),
    [
        (10, {"cp_size": 2}, 4),
        (6, {"tp_size": 4}, 4),
        (12, {"cp_size": 2, "tp_size": 4}, 8),
        (12, {"cp_size": 2, "tp_size": 3}, 12),
        (20, {"cp_size": 3, "tp_size": 2}, 6),
    ],
)
def test_a_length_that_cannot_be_divided_is_named_with_the_sizes(length, layout, multiple):
    if length % multiple == 0:
        assert isinstance(sequence_shard(length, **layout), SequenceShard)
        return
    with pytest.raises(
        ValueError, match=f"expected a sequence length that is a multiple of {multiple} .*found {length}"
    ):
        sequence_shard(length, **layout)


@pytest.mark.parametrize(("cp", "tp"), [(c, t) for c in range(1, 5) for t in range(1, 7)])
def test_the_multiple_in_the_message_is_the_least_that_can_be_divided(cp, tp):
    fitting = []
    for length in range(1, 200):
        try:
            sequence_shard(length, cp_size=cp, tp_size=tp)
        except ValueError as error:
            multiple = int(re.search(r"multiple of (\d+)", str(error))[1])
        else:
            fitting.append(length)
    if fitting[0] > 1:
        assert multiple == fitting[0]
    assert all(length % fitting[0] == 0 for length in fitting)


@pytest.mark.parametrize("layout", [{"cp_rank": 2, "cp_size": 2}, {"tp_rank": -1, "tp_size": 2}])
def test_a_rank_outside_its_group_is_refused(layout):
    with pytest.raises(ValueError, match="lies outside its group of 2: expected 0 to 1"):
        sequence_shard(8, **layout)


@pytest.mark.parametrize("bounds", [[0, 4, 12], [4, 16]])
def test_boundaries_must_run_over_the_whole_sequence(bounds):
    with pytest.raises(ValueError, match=r"expected 0 to the sequence length 16.*padded"):
        sequence_shard(16, cp_size=2, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize("bounds", [[0, 6, 16], [0, 12, 8, 16]])
def test_every_packed_length_must_be_divisible(bounds):
    with pytest.raises(
        ValueError, match="packed sequence .* multiple of 2 . context-parallel size = 4|falls from 12 to 8"
    ):
        sequence_shard(16, cp_size=2, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_boundaries_are_checked_without_context_parallelism_too():
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 12"):
        sequence_shard(16, cu_seqlens=torch.tensor([0, 12], dtype=torch.int32))
