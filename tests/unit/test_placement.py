"""Token ids -> Placement: rows, counts, spans, and what it says of a bad batch."""

import dataclasses
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.placement import build_placement

IMAGES, AUDIO, WRITE = -200, 10**12, 61

IDS = torch.tensor(
    [
        [7, IMAGES, IMAGES, 8, AUDIO, WRITE],
        [IMAGES, 9, 9, WRITE, WRITE, IMAGES],
        [1, 2, 3, 4, 5, 6],
    ]
)
TABLES = {"images": IMAGES, "audio": AUDIO}


def total(placement, name: str) -> int:
    """How many positions a reading table fills."""
    return int(placement.counts(name).sum())


def test_source_and_row_name_the_table_and_number_its_rows_sample_after_sample():
    placement = build_placement(IDS, TABLES, {"images": WRITE})
    assert placement.names == ("images", "audio")
    assert placement.source.tolist() == [[-1, 0, 0, -1, 1, -1], [0, -1, -1, -1, -1, 0], [-1] * 6]
    assert placement.row.tolist() == [[0, 0, 1, 0, 0, 0], [2, 0, 0, 0, 0, 3], [0] * 6]
    assert placement.source.dtype == placement.row.dtype == torch.int32
    assert (placement.batch_size, placement.sequence_length, placement.device.type) == (3, 6, "cpu")


def test_counts_are_known_per_sample_and_on_the_host():
    placement = build_placement(IDS, TABLES, {"images": WRITE})
    assert placement.counts("images").tolist() == [2, 2, 0]
    assert placement.counts("audio").tolist() == [1, 0, 0]
    assert placement.generation_count("images") == 3
    assert placement.generation_total("images").item() == 3


def test_a_deferred_placement_keeps_its_counts_off_the_host():
    placement = build_placement(IDS, TABLES, {"images": WRITE}, validate="deferred")
    assert placement.generation_count("images") is None
    assert placement.counts("images").tolist() == [2, 2, 0]


def test_spans_are_runs_that_stop_at_the_end_of_a_sample():
    ids = torch.tensor([[5, IMAGES, IMAGES], [IMAGES, 5, IMAGES]])
    assert build_placement(ids, TABLES).spans("images").tolist() == [[0, 1, 3], [1, 0, 1], [1, 2, 3]]
    assert build_placement(ids, TABLES).spans("audio").shape == (0, 3)


def test_spans_of_a_placement_that_the_host_does_not_know_are_refused():
    placement = build_placement(IDS, TABLES, validate="deferred")
    with pytest.raises(ValueError, match="'images' are not known on the host.*Build it on the CPU"):
        placement.spans("images")


def test_the_text_table_takes_every_other_position():
    placement = build_placement(IDS, TABLES, text_table="text")
    assert placement.names == ("images", "audio", "text")
    assert total(placement, "text") == 18 - 5
    assert placement.source.tolist()[0] == [2, 0, 0, 2, 1, 2]
    assert placement.row.tolist()[1] == [2, 3, 4, 5, 6, 3]


def test_a_placement_moves_with_what_the_host_knows():
    placement = build_placement(IDS, TABLES, {"images": WRITE}, cu_seqlens=None)
    moved = placement.to("meta", non_blocking=True)
    assert moved.device.type == "meta"
    assert moved.generation_count("images") == 3
    assert moved.spans("images").equal(placement.spans("images"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        moved.names = ()


def test_pinning_asks_every_tensor_and_leaves_the_rest(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    placement = build_placement(IDS[:1], TABLES, {"images": WRITE}, cu_seqlens=torch.tensor([0, 6]))
    assert placement.pin_memory().generation_count("images") == 1
    assert len(pinned) == 6  # its five tensors and the ids it was made from


# Generation


def test_generation_positions_are_flat_and_in_order():
    placement = build_placement(IDS, TABLES, {"images": WRITE})
    assert placement.generation_positions("images").tolist() == [5, 9, 10]
    assert placement.generation_positions("images", rule="predecessor").tolist() == [4, 8, 9]
    assert placement.generation_positions("images").dtype == torch.int64


def test_a_generation_token_may_be_the_special_token():
    placement = build_placement(IDS, TABLES, {"images": IMAGES})
    assert placement.generation_positions("images").tolist() == [1, 2, 6, 11]
    assert total(placement, "images") == placement.generation_count("images") == 4


def test_a_given_number_of_positions_is_kept_whatever_the_batch_holds():
    placement = build_placement(IDS, TABLES, {"images": WRITE}, validate="deferred")
    assert placement.generation_positions("images", 2).tolist() == [5, 9]
    assert placement.generation_positions("images", 5).tolist() == [5, 9, 10, 0, 0]
    assert placement.generation_positions("images", 20).tolist() == [5, 9, 10] + [0] * 17
    assert placement.generation_positions("images", 0).tolist() == []


def test_positions_need_a_number_where_the_host_knows_none():
    placement = build_placement(IDS, TABLES, {"images": WRITE}, validate="deferred")
    with pytest.raises(ValueError, match="images: the number of generation tokens is not known.*Pass n"):
        placement.generation_positions("images")


def test_an_unknown_position_rule_is_refused():
    with pytest.raises(ValueError, match="unknown position rule 'next'; expected 'own' or 'predecessor'"):
        build_placement(IDS, TABLES, {"images": WRITE}).generation_positions("images", rule="next")


@pytest.mark.parametrize("validate", ["now", "deferred"])
def test_a_predecessor_never_crosses_the_start_of_a_sample(validate):
    ids = torch.tensor([[1, WRITE], [WRITE, 1]])
    placement = build_placement(ids, {}, {"images": WRITE}, validate=validate)
    with pytest.raises(ValueError, match="images: the generation token at position 0 of sample 1 opens"):
        placement.generation_positions("images", 2, rule="predecessor")


def test_a_predecessor_never_crosses_a_packed_boundary():
    ids = torch.tensor([[1, WRITE, 1, WRITE, 1, WRITE]])
    within = build_placement(ids, {}, {"images": WRITE}, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))
    assert within.generation_positions("images", rule="predecessor").tolist() == [0, 2, 4]
    across = build_placement(ids, {}, {"images": WRITE}, cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="position 3 of sample 0 opens its sequence"):
        across.generation_positions("images", rule="predecessor")


def test_spans_stop_at_a_packed_boundary():
    ids = torch.tensor([[1, WRITE, WRITE, WRITE, WRITE, 1]])
    packed = build_placement(ids, {"images": WRITE}, {"images": WRITE}, cu_seqlens=torch.tensor([0, 3, 6]))
    assert packed.spans("images").tolist() == [[0, 1, 3], [0, 3, 5]]
    packed.check_generation("images", 4, span=2)
    across = build_placement(ids, {}, {"images": WRITE}, cu_seqlens=torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match="images: sample 0 has 1 generation tokens in a row.*spans of 2"):
        across.check_generation("images", 4, span=2)


# Counts that do not fit


@pytest.mark.parametrize(
    ("rows", "sample", "tokens", "found"), [(0, 0, 2, 0), (1, 0, 2, 1), (3, 1, 2, 1), (5, 2, 0, 1), (9, 2, 0, 5)]
)
@pytest.mark.parametrize("validate", ["now", "deferred"])
def test_totals_alone_name_the_sample_where_rows_run_out_or_the_last(rows, sample, tokens, found, validate):
    placement = build_placement(IDS, TABLES, validate=validate)
    message = (
        rf"^images: sample {sample} has {tokens} special tokens but {found} embeddings "
        rf"\(batch: 4 special tokens, {rows} embeddings\)"
    )
    with pytest.raises(ValueError, match=message):
        placement.check_rows("images", rows)
    placement.check_rows("images", 4)


@pytest.mark.parametrize("validate", ["now", "deferred"])
def test_generation_counts_are_held_against_the_targets(validate):
    placement = build_placement(IDS, TABLES, {"images": WRITE}, validate=validate)
    placement.check_generation("images", 3)
    with pytest.raises(ValueError, match="images: sample 1 has 2 generation tokens but 1 target rows"):
        placement.check_generation("images", 2)


def spans_of(*lengths: int) -> torch.Tensor:
    """One row per sample with a run of image tokens of each length, a text token between runs."""
    width = max(lengths)
    return torch.tensor([[IMAGES] * n + [5] * (width - n + 1) for n in lengths])


@pytest.mark.parametrize(
    ("lengths", "items", "sample", "tokens", "found"),
    [
        ((4, 3, 4), (4, 4, 4), 1, 3, 4),  # one token too few in the middle: totals alone would blame the last
        ((4, 5, 4), (4, 4, 4), 1, 5, 4),
        ((4, 5, 3), (4, 4, 4), 1, 5, 4),  # totals agree, the rows would slip from one sample into the next
        ((3, 4, 4), (4, 4, 4), 0, 3, 4),
        ((4, 4, 4), (4, 4), 2, 4, 0),
        ((4, 4), (4, 4, 4), 1, 4, 8),
    ],
)
def test_items_name_the_right_sample(lengths, items, sample, tokens, found):
    placement = build_placement(spans_of(*lengths), TABLES)
    with pytest.raises(ValueError, match=f"images: sample {sample} has {tokens} special tokens but {found} embed"):
        placement.check_rows("images", sum(items), rows_per_item=items)


def test_items_may_share_a_span_or_spread_over_several():
    adjacent = torch.tensor([[IMAGES] * 4 + [5], [IMAGES, IMAGES, 5, IMAGES, IMAGES]])
    placement = build_placement(adjacent, TABLES)
    placement.check_rows("images", 8, rows_per_item=[2, 2, 4])  # as many spans as items, but not one each


def test_items_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="images: rows_per_item adds up to 3, but there are 4 embeddings"):
        build_placement(IDS, TABLES).check_rows("images", 4, rows_per_item=[1, 2])


@contextmanager
def counted_instructions() -> Iterator[list[int]]:
    """Counts what the interpreter executes: one more for each turn of a loop, however it is written."""
    count = [0]

    def trace(frame, event, _):
        frame.f_trace_opcodes = True
        count[0] += event == "opcode"
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # CPython 3.12 looks for one such frame when tracing begins
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def test_the_check_of_a_large_batch_costs_no_loop_over_rows():
    def instructions(rows: int) -> int:
        placement = build_placement(torch.full((1, rows), IMAGES), TABLES)
        with counted_instructions() as count:
            placement.check_rows("images", rows)
        return count[0]

    assert 0 < instructions(10**6) <= instructions(100)


# Arguments


@pytest.mark.parametrize("ids", [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)])
def test_ids_must_be_integers(ids):
    with pytest.raises(TypeError, match="input_ids should be int64 or int32"):
        build_placement(ids, {})


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0), (1, 2, 3)])
def test_an_empty_or_misshapen_batch_is_refused(shape):
    with pytest.raises(ValueError, match=r"input_ids should be \[B, S\] with B and S at least 1"):
        build_placement(torch.zeros(shape, dtype=torch.long), {})


def test_more_positions_than_the_placement_can_number_are_refused():
    ids = torch.zeros(1, dtype=torch.long).expand(2**16, 2**15)
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1"):
        build_placement(ids, {})


@pytest.mark.parametrize("token", ["<image>", 3.0, True, None])
def test_token_ids_must_be_ints(token):
    with pytest.raises(TypeError, match="images: the token id should be an int"):
        build_placement(IDS, {"images": token})


def test_a_token_id_must_fit_the_ids():
    with pytest.raises(ValueError, match="images: token id 9223372036854775808 does not fit"):
        build_placement(IDS, {}, {"images": 2**63})


def test_two_tables_cannot_share_a_token():
    with pytest.raises(ValueError, match="'images' and 'video' both read at token -200"):
        build_placement(IDS, {"images": IMAGES, "video": IMAGES})


def test_the_text_table_cannot_have_a_token():
    with pytest.raises(ValueError, match="'images' names the text table"):
        build_placement(IDS, TABLES, text_table="images")


def test_packing_needs_a_batch_of_one():
    with pytest.raises(ValueError, match="packed sequences .* need a batch size of 1, found 3"):
        build_placement(IDS, {}, cu_seqlens=torch.tensor([0, 6]))


def test_there_is_no_silent_mode():
    with pytest.raises(ValueError, match="validate should be 'now' or 'deferred', found 'never'"):
        build_placement(IDS, {}, validate="never")


@pytest.mark.parametrize("validate", ["now", "deferred"])
def test_text_outside_the_vocabulary_is_reported_and_special_tokens_are_not(validate):
    ids = torch.tensor([[1, IMAGES, 2], [3, 64, -1]])
    build_placement(ids[:1], TABLES, vocabulary_size=64, validate=validate)
    with pytest.raises(ValueError, match=r"text: sample 1 has 2 token ids outside the vocabulary \(0 to 63\)"):
        build_placement(ids, TABLES, vocabulary_size=64, validate=validate)


@pytest.mark.parametrize("method", ["counts", "spans"])
def test_an_unknown_table_is_named(method):
    with pytest.raises(ValueError, match=r"no reading table 'video' in this placement; it has \['audio', 'images'\]"):
        getattr(build_placement(IDS, TABLES), method)("video")


def test_an_unknown_modality_is_named():
    with pytest.raises(ValueError, match=r"no generation token for 'audio' in this placement; it has \['images'\]"):
        build_placement(IDS, TABLES, {"images": WRITE}).generation_count("audio")


# Any batch


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda batch: st.integers(1, 20).flatmap(
            lambda length: st.lists(
                st.lists(st.sampled_from([0, 5, IMAGES, AUDIO, WRITE]), min_size=length, max_size=length),
                min_size=batch,
                max_size=batch,
            )
        )
    ),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_every_token_is_listed_once_and_points_back(ids, dtype):
    tables = TABLES if dtype == torch.int64 else {"images": IMAGES, "audio": 5}
    ids = torch.tensor(ids).clamp(max=2**31 - 1).to(dtype)
    placement = build_placement(ids, tables, {"images": WRITE})
    for code, (name, token) in enumerate(tables.items()):
        count = total(placement, name)
        listed = placement.positions[placement.reading[name].index]
        assert torch.equal(listed[:count].long(), (ids.flatten() == token).nonzero().squeeze(1))
        assert (listed[count:] == -1).all()
        assert torch.equal(placement.source.flatten() == code, ids.flatten() == token)
        assert torch.equal(placement.row.flatten()[listed[:count].long()], torch.arange(count, dtype=torch.int32))
        spans = placement.spans(name)
        assert (spans[:, 2] - spans[:, 1]).sum() == count


def test_a_placement_travels_between_processes():
    sent = build_placement(IDS, TABLES, {"images": WRITE}, vocabulary_size=64)
    received = pickle.loads(pickle.dumps(sent))
    assert torch.equal(received.source, sent.source)
    assert torch.equal(received.spans("images"), sent.spans("images"))
    with pytest.raises(ValueError, match="images: sample 0"):
        received.check_rows("images", 1)


class Batches(torch.utils.data.Dataset):
    """Three batches, each with its placement, as a collator in a worker makes them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        return build_placement(IDS + 0, TABLES, {"images": WRITE}, vocabulary_size=64)


def test_a_placement_can_be_built_in_a_loaders_worker():
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=1)
    assert [placement.generation_count("images") for placement in loader] == [3, 3, 3]
