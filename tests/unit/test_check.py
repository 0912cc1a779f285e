"""What a batch may not be: each refusal names what is wrong, and nothing bad passes in silence."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_mimo import MimoModel, MimoModelConfig, build_placement
from tests import packed, tiny

IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def text_model(one_process):
    return MimoModel(MimoModelConfig(tiny.language_spec()))


def text(**language) -> MimoModel:
    return MimoModel(MimoModelConfig(tiny.language_spec(**language)))


@pytest.fixture
def model(single_process) -> MimoModel:
    return MimoModel(tiny.mimo_config())


# Placement


def placement_of(ids: torch.Tensor):
    return build_placement(ids, {"images": tiny.READ, "audio": tiny.HEAR}, {"images": tiny.WRITE})


def test_a_placement_of_other_generation_tokens_is_refused(model):
    batch = tiny.batch()
    other = batch["input_ids"].clone()
    writes = (other[0] == tiny.WRITE).nonzero().flatten()
    other[0, writes[0]], other[0, writes[-1] + 1] = other[0, writes[-1] + 1].clone(), other[0, writes[0]].clone()
    with pytest.raises(ValueError, match="placement was not made from these input_ids"):
        model(**batch, placement=placement_of(other))


def test_a_placement_of_other_text_is_refused(model):
    batch = tiny.batch()
    made = placement_of(batch["input_ids"])
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][2, 0] = 9999
    with pytest.raises(ValueError, match="placement was not made from these input_ids"):
        model(**batch, placement=made)


def test_a_placement_of_other_tokens_is_refused(model):
    batch = tiny.batch()
    made = build_placement(batch["input_ids"], {"images": tiny.READ, "audio": tiny.HEAR}, {"images": 5})
    with pytest.raises(ValueError, match="expected a placement of tokens"):
        model(**batch, placement=made)


def test_a_placement_that_travelled_with_its_ids_is_not_compared_again(model, monkeypatch):
    batch = tiny.batch()
    bound = placement_of(batch["input_ids"]).bound()
    compared = []
    monkeypatch.setattr(torch.Tensor, "__ne__", lambda a, b: compared.append(a) or torch.ne(a, b))
    model(**batch, placement=bound)
    assert not [value for value in compared if value is batch["input_ids"]]


@pytest.mark.parametrize("made", [{}, 3])
def test_something_else_than_a_placement_is_a_type_error(model, made):
    with pytest.raises(TypeError, match=f"placement must be a Placement, found {type(made).__name__}"):
        model(**tiny.batch(), placement=made)


# Strides


def test_token_tensors_of_any_strides_give_the_same_result(model):
    batch = tiny.batch()
    expected = model(**batch)[0]
    strided = {
        name: value.t().contiguous().t() if isinstance(value, torch.Tensor) and value.dim() == 2 else value
        for name, value in batch.items()
    }
    assert not strided["input_ids"].is_contiguous()
    found = model(**strided)[0]
    assert torch.equal(found.language, expected.language)
    assert torch.equal(found.modalities["images"].hidden, expected.modalities["images"].hidden)


# Values


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_of_labels_that_mean_nothing_are_refused(text_model, bad):
    mask = torch.ones(1, 8)
    mask[0, 3] = bad
    with pytest.raises(ValueError, match="sample 0 has 1 weights in loss_mask that are negative, infinite or NaN"):
        text_model(IDS, labels=IDS, loss_mask=mask)


@pytest.mark.parametrize("mask", [torch.ones(1, 8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.int64)])
def test_masks_of_booleans_and_integers_are_taken(text_model, mask):
    assert text_model(IDS, labels=IDS, loss_mask=mask)[1] is mask


def test_labels_that_are_no_integers_are_a_type_error(text_model):
    with pytest.raises(TypeError, match="expected labels of int64 or int32, found torch.float32"):
        text_model(IDS, labels=IDS.float())


def boundaries(own, padded=None, dtype=torch.int32) -> PackedSeqParams:
    own = torch.tensor(own, dtype=dtype)
    padded = None if padded is None else torch.tensor(padded, dtype=dtype)
    ends = {"cu_seqlens_q": own, "cu_seqlens_kv": own, "cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
    return PackedSeqParams(qkv_format="thd", max_seqlen_q=8, max_seqlen_kv=8, **ends)


@pytest.mark.parametrize(
    ("own", "padded", "message"),
    [
        ([1, 4, 8], None, "cu_seqlens_q runs from 1 to 8, expected 0 to the sequence length 8"),
        ([0, 4, 7], None, "cu_seqlens_q runs from 0 to 7"),
        ([0, 5, 4, 8], None, "cu_seqlens_q falls from 5 to 4 at packed sequence 1"),
        ([0, 5, 8], [0, 4, 8], "packed sequence 0 is 5 long .* in a room of 4"),
        ([0, 3, 6], [0, 4, 9], "cu_seqlens_q_padded runs from 0 to 9"),
        ([1, 3, 6], [0, 4, 8], "cu_seqlens_q runs from 1 to 6"),
        ([0, 3, 6], [0, 8], "both need one boundary a packed sequence"),
        ([0], None, "at least two boundaries"),
    ],
)
def test_boundaries_that_do_not_describe_the_sequence_are_refused(text_model, own, padded, message):
    with pytest.raises(ValueError, match=message):
        text_model(IDS, packed_seq_params=boundaries(own, padded))


@pytest.mark.parametrize("bounds", [[1, 8], [0, 7], [0, 5, 4, 8]])
def test_build_placement_refuses_them_too(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        build_placement(IDS, {}, cu_seqlens=torch.tensor(bounds))


def test_boundaries_reach_the_language_model_as_int32(single_process, monkeypatch):
    model = MimoModel(MimoModelConfig(packed.language_spec(tiny.language_config())))
    seen = []
    forward = model.language_model.forward
    monkeypatch.setattr(
        model.language_model, "forward", lambda **given: seen.append(given["packed_seq_params"]) or forward(**given)
    )
    model(IDS, packed_seq_params=boundaries([0, 3, 7], [0, 4, 8], torch.int64))
    assert seen[0].cu_seqlens_q.dtype == seen[0].cu_seqlens_kv_padded.dtype == torch.int32


def test_something_else_than_packed_seq_params_is_a_type_error(text_model):
    with pytest.raises(TypeError, match="packed_seq_params must be .*PackedSeqParams, found dict"):
        text_model(IDS, packed_seq_params={"cu_seqlens_q": [0, 8]})


# Positions


def test_positions_that_the_embedding_ignores_are_refused(text_model):
    text_model(IDS, position_ids=torch.arange(8)[None])
    with pytest.raises(ValueError, match="differ from those that position_embedding_type='rope' counts by itself"):
        text_model(IDS, position_ids=torch.arange(8)[None] + 1)
    with pytest.raises(ValueError, match="counts by itself"):
        text_model(IDS, position_ids=torch.arange(8).expand(3, 1, 8))


@pytest.mark.parametrize("position", [64, -1])
def test_learned_positions_beyond_their_table_are_refused(single_process, position):
    model = text(position_embedding_type="learned_absolute")
    positions = torch.arange(8)[None].clone()
    positions[0, 7] = position
    with pytest.raises(ValueError, match=f"position_ids reach {position}, but the model has 64 learned positions"):
        model(IDS, position_ids=positions)
    with pytest.raises(ValueError, match="position_ids reach 64"):
        model(IDS.repeat(1, 9)[:, :65] % 60)


def mrope() -> MimoModel:
    config = tiny.language_config(mrope_section=[1, 1, 2])
    return MimoModel(tiny.mimo_config(tiny.language_spec(config, position_embedding_type="mrope")))


def test_text_needs_no_sections_under_mrope(single_process):
    model = mrope().eval()
    ids = IDS % 60
    sections = torch.arange(8).expand(3, 1, 8)
    expected = model(ids, position_ids=sections)[0].language
    for positions in (None, torch.arange(8)[None]):
        assert torch.equal(model(ids, position_ids=positions)[0].language, expected)


def test_media_without_sections_are_refused_under_mrope(single_process):
    batch = tiny.batch()
    with pytest.raises(ValueError, match=r"expected position_ids \[3, B, S\] for a batch with \['audio', 'images'\]"):
        mrope()(**batch)


# Nothing


@pytest.mark.parametrize("nothing", [None, {}, [], torch.zeros(0, 3, 4, 4)], ids=["None", "{}", "[]", "no images"])
def test_zero_images_are_absent(model, nothing):
    ids = torch.tensor([[1, 2, 3, 4]])
    given = {"patches": nothing if not isinstance(nothing, torch.Tensor) else {"x": nothing}}
    expected, _ = model(ids, labels=ids)
    found, _ = model(ids, labels=ids, modality_inputs={"images": given})
    assert torch.equal(found.language, expected.language)
    sum(term.sum for term in [*found.modalities["images"].losses.values()]).backward()


def test_decode_takes_an_output_and_nothing_else(model):
    with pytest.raises(TypeError, match="decode takes a MimoOutput, found Tensor"):
        model.decode(torch.zeros(3))
