"""Packs leave little empty, cut no medium, and hold each sample once."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.data.packing import Packer, PackShape, first_fit_decreasing
from megatron_mimo.data.packs import joined, packed, padded
from megatron_mimo.data.samples import Item, Sample, cut, fitted
from megatron_mimo.placement import build_placement


def mixture(count: int, seed: int = 0) -> list[int]:
    """Lengths as facts of real data have them: 30 % text, 35 % one image, 25 % 1 to 12 tiles, 10 % video."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.multinomial(torch.tensor([0.30, 0.35, 0.25, 0.10]), count, replacement=True, generator=draw)
    words = torch.randint(20, 600, (count,), generator=draw)
    tiles = torch.randint(1, 13, (count,), generator=draw)
    frames = torch.randint(4, 25, (count,), generator=draw)
    media = torch.stack([torch.zeros(count), torch.full((count,), 576.0), 256.0 * tiles, 128.0 * frames])
    return (words + media.gather(0, kinds[None])[0].long()).clamp(max=4096).tolist()


def packs_of(lengths: list[int], shape: PackShape) -> list[list[SimpleNamespace]]:
    packer, packs = Packer(shape), []
    for number, tokens in enumerate(lengths):
        packs += packer.add(SimpleNamespace(tokens=tokens, cost=0.0, number=number))
    return packs + packer.flush()


@pytest.mark.parametrize("length", [4096, 8192])
def test_packs_of_a_drawn_mixture_waste_at_most_one_per_cent(length):
    lengths = mixture(8000)
    packs = packs_of(lengths, PackShape(length=length))
    waste = 1 - sum(lengths) / (len(packs) * length)
    assert waste <= 0.01, waste
    assert sorted(sample.number for pack in packs for sample in pack) == list(range(8000))


def test_samples_so_short_that_a_buffer_of_them_fills_no_pack_are_waited_for():
    packs = packs_of([50] * 1000, PackShape(length=8192, buffer=16))
    assert 1 - 50 * 1000 / (len(packs) * 8192) <= 0.15  # the last of seven packs is what is left over
    assert all(len(pack) == 163 for pack in packs[:-1])


@given(
    sizes=st.lists(st.integers(1, 50), max_size=40),
    costs=st.lists(st.integers(0, 20), min_size=40, max_size=40),
    budget=st.one_of(st.none(), st.integers(20, 60)),
)
@settings(max_examples=60, deadline=None)
def test_every_pack_keeps_both_budgets_and_holds_each_sample_once(sizes, costs, budget):
    packs = first_fit_decreasing(sizes, costs[: len(sizes)], 50, budget)
    assert sorted(index for pack in packs for index in pack) == list(range(len(sizes)))
    for pack in packs:
        assert sum(sizes[index] for index in pack) <= 50
        assert budget is None or sum(costs[index] for index in pack) <= budget


def test_samples_take_a_multiple_of_what_the_layout_needs():
    shape = PackShape(length=16, multiple=4)
    packs = packs_of([5, 5, 5], shape)
    assert [[sample.tokens for sample in pack] for pack in packs] == [[5, 5], [5]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(length=0), "length should be at least 1"),
        (dict(length=10, multiple=4), "Take 8 or 12"),
        (dict(length=10, budget=0.0), "above 0"),
        (dict(length=10, buffer=0), "buffer should be at least 1"),
    ],
)
def test_shapes_that_cannot_be_packed_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        PackShape(**sizes)


def test_a_sample_that_fits_no_pack_is_refused():
    for tokens, cost in ((11, 0), (1, 3)):
        with pytest.raises(ValueError, match="fits no pack"):
            Packer(PackShape(length=10, budget=2)).add(SimpleNamespace(tokens=tokens, cost=cost))


# Samples in packs ----------------------------------------------------------------------------------


def sample(ids: list[int], learned=(), items=(), **more) -> Sample:
    learn = torch.zeros(len(ids), dtype=torch.bool)
    learn[list(learned)] = True
    return Sample(torch.tensor(ids), learn, tuple(items), torch.arange(len(ids))[None], **more)


def item(modality: str, start: int, tensors: dict, rows: int = 2, **more) -> Item:
    return Item(modality, more.pop("written", False), start, rows, rows, tensors, **more)


def test_a_pack_has_shifted_labels_positions_and_boundaries_of_its_samples():
    first = sample([5, 6, 7], learned=[0, 2], name="first", delta=1)
    second = sample([8, 9], learned=[1], name="second")
    pack = packed([first, second], PackShape(length=8, multiple=2), pad_id=3, positions=[4, 1])
    none = -100
    assert pack.input_ids.tolist() == [[5, 6, 7, 3, 8, 9, 3, 3]]
    # The first token of a sample has nothing before it to be told from, also where it is learned.
    assert pack.labels.tolist() == [[none, 7, none, none, 9, none, none, none]]
    assert pack.loss_mask.tolist() == [[0, 1, 0, 0, 1, 0, 0, 0]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 4, 0, 1, 2, 3]]  # the first is one ahead, as its delta says
    assert pack.cu_seqlens.tolist() == [0, 3, 5] and pack.cu_seqlens_padded.tolist() == [0, 4, 8]
    assert (pack.names, pack.positions, pack.deltas) == (("first", "second"), (4, 1), (1, 0))
    assert pack.waste == 3 / 8
    assert sorted(pack.batch()) == ["input_ids", "labels", "loss_mask", "position_ids"]


def test_a_batch_of_rows_has_the_same_labels_padded_to_one_length():
    batch = padded([sample([5, 6], learned=[1]), sample([7])], 3, positions=[0, 1])
    assert batch.input_ids.tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch.labels.tolist() == [[6, -100, -100], [-100] * 3]
    assert batch.cu_seqlens is None and batch.position_ids.shape == (2, 3)


def test_positions_of_several_sections_keep_them_first():
    three = Sample(torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool), (), torch.arange(6).view(3, 2))
    assert packed([three], PackShape(length=4)).position_ids.shape == (3, 1, 4)
    assert padded([three, three], 2).position_ids.shape == (3, 2, 2)


def test_media_of_a_pack_are_joined_in_the_order_of_their_places():
    first = sample([1, 9, 9], items=[item("images", 1, {"tower": {"x": torch.ones(1, 2)}})])
    second = sample([9, 9, 8, 8], items=[
        item("images", 0, {"tower": {"x": torch.full((1, 2), 2.0)}}),
        item("images", 2, {"pixels": {"media": torch.full((1, 3), 3.0)}}, written=True),
    ])  # fmt: skip
    pack = packed([first, second], PackShape(length=8))
    assert pack.modality_inputs["images"]["tower"]["x"].tolist() == [[1, 1], [2, 2]]
    assert list(pack.modality_targets["images"]["pixels"]) == ["media"]
    placement = build_placement(pack.input_ids, {"images": 9}, {"images": 8}, cu_seqlens=pack.cu_seqlens_padded)
    placement.check_rows("images", 4, [2, 2])


def test_sounds_of_unequal_length_are_padded_to_the_longest():
    tensors = joined(item("audio", 0, {"ear": {"x": torch.ones(1, 2, frames)}}) for frames in (3, 5))
    assert tensors["audio"]["ear"]["x"].sum((1, 2)).tolist() == [6, 10]
    with pytest.raises(ValueError, match="cannot be joined"):
        joined(item("audio", 0, {"ear": {"x": torch.ones(shape)}}) for shape in ((1, 2), (1, 2, 3)))


def test_written_media_that_are_not_learned_weigh_nothing():
    made = [item("images", 0, {"out": {"media": torch.ones(1)}}, written=True, learn=learn) for learn in (True, False)]
    assert joined(made)["images"]["out"]["weight"].tolist() == [1, 1, 0, 0]
    assert "weight" not in joined(made[:1])["images"]["out"]


def test_packs_and_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        packed([], PackShape(length=4))
    with pytest.raises(ValueError, match="expected at most 4"):
        packed([sample([1] * 5)], PackShape(length=4))
    with pytest.raises(ValueError, match="at least one sample"):
        padded([], 4)
    with pytest.raises(ValueError, match="does not fit rows of 4"):
        padded([sample([1] * 5)], 4)


def test_a_cut_never_falls_into_a_medium():
    long = sample([1, 9, 9, 2, 9, 9, 3], learned=[3, 6], items=[item("images", 1, {}), item("images", 4, {})])
    assert len(cut(long, 6)) == 6
    shorter = cut(long, 5)
    assert len(shorter) == 4 and len(shorter.items) == 1
    assert cut(long, 2) is None  # nothing learned is left
    assert len(fitted(long, 5, None, "cut")) == 4
    assert fitted(long, 7, None, "drop") is long


@pytest.mark.parametrize(
    ("length", "budget", "policy", "kind"),
    [(2, None, "drop", "too_long"), (2, None, "cut", "too_long"), (9, 0.5, "drop", "too_costly")],
)
def test_samples_that_fit_no_pack_are_left_to_the_policy(length, budget, policy, kind):
    from megatron_mimo.data.messages import SampleError

    with pytest.raises(SampleError) as caught:
        fitted(sample([1] * 5, cost=1.0), length, budget, policy)
    assert caught.value.kind == kind
