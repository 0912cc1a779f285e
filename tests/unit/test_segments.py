"""Packed samples attend to themselves alone, and a span that asks for it to the whole of itself."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.nn import functional as F

from megatron_mimo import MimoModel, MimoModelConfig, specs
from megatron_mimo.attention import FusedAttention
from megatron_mimo.segments import SegmentAttention, segmented, span_mask
from tests import packed, tiny

BOUNDS = [0, 5, 5, 12, 16]
HEADS, GROUPS, WIDTH = 4, 2, 8


def attention(**changes) -> SegmentAttention:
    return SegmentAttention(tiny.language_config(num_query_groups=GROUPS, **changes), 1, AttnMaskType.causal, "self")


def drawn(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(BOUNDS[-1], heads, WIDTH, generator=draw) for heads in (HEADS, GROUPS, GROUPS)]


def written_out(inputs: list[torch.Tensor], sees: torch.Tensor) -> torch.Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in inputs)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, enable_gqa=True)
    return found[0].transpose(0, 1).flatten(1)


def same_sequence() -> torch.Tensor:
    sequence = torch.searchsorted(torch.tensor(BOUNDS), torch.arange(BOUNDS[-1]), right=True)
    return sequence[:, None] == sequence


SPANS = torch.tensor([-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2, 2, -1, -1, -1, -1], dtype=torch.int32)


@pytest.mark.parametrize("spans", [None, SPANS], ids=["causal", "spans"])
def test_it_equals_a_mask_that_is_written_out(single_process, spans):
    sees = torch.ones(16, 16, dtype=torch.bool).tril()
    if spans is not None:
        sees |= (spans[:, None] == spans) & (spans >= 0)
    inputs = [x.requires_grad_() for x in drawn()]
    params = segmented(torch.tensor(BOUNDS, dtype=torch.int32), spans=spans)
    found = attention()(*inputs, None, packed_seq_params=params)
    expected = written_out(inputs, sees & same_sequence())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # float32 sums in another order
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(
        expected.square().sum(), inputs
    )):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_plain_boundaries_of_megatron_are_enough_on_the_cpu(single_process):
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    plain = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    core = attention()
    assert torch.equal(
        core(*drawn(), None, packed_seq_params=plain), core(*drawn(), None, packed_seq_params=segmented(bounds))
    )


def test_what_lies_between_samples_is_told_beforehand():
    """Else TransformerEngine asks the device in every layer. Padding after the last sample is not between samples."""
    ends = torch.tensor([0, 5, 9], dtype=torch.int32)
    told = [segmented(ends, padded).pad_between_seqs for padded in (
        None, ends, torch.tensor([0, 5, 12], dtype=torch.int32), torch.tensor([0, 6, 12], dtype=torch.int32)
    )]  # fmt: skip
    assert told == [False, False, False, True]


def test_scores_are_scaled_as_megatrons_are(single_process):
    """The whole of a batch of one as one sequence, with scaling by layer too."""
    for changes in ({}, {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}):
        core = SegmentAttention(tiny.language_config(**changes), 3, AttnMaskType.causal, "self")
        inputs = [torch.randn(6, HEADS, WIDTH, generator=torch.Generator().manual_seed(at)) for at in range(3)]
        later = torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(1)
        expected = core(*(x[:, None] for x in inputs), later)
        found = core(*inputs, None, packed_seq_params=segmented(torch.tensor([0, 6], dtype=torch.int32)))
        torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=2e-6)


def test_attention_without_order_sees_the_whole_sequence(single_process):
    params = segmented(torch.tensor(BOUNDS, dtype=torch.int32))
    found = attention()(*drawn(), None, AttnMaskType.no_mask, packed_seq_params=params)
    torch.testing.assert_close(found, written_out(drawn(), same_sequence()), rtol=0, atol=2e-6)


def test_dropout_drops_in_training_alone(single_process):
    core, params = attention(attention_dropout=0.5), segmented(torch.tensor(BOUNDS, dtype=torch.int32))
    trained = core(*drawn(), None, packed_seq_params=params)
    evaluated = core.eval()(*drawn(), None, packed_seq_params=params)
    assert not torch.equal(trained, evaluated)
    torch.testing.assert_close(evaluated, attention()(*drawn(), None, packed_seq_params=params))


def test_what_it_cannot_do_is_refused(single_process):
    params = segmented(torch.tensor(BOUNDS, dtype=torch.int32))
    for changes in ({"window_size": (4, 0)}, {"softmax_type": "off-by-one"}):
        with pytest.raises(ValueError, match="expected window_size=None and softmax_type='vanilla'"):
            attention(**changes)(*drawn(), None, packed_seq_params=params)
    elsewhere = torch.tensor(BOUNDS, dtype=torch.int32, device="meta")
    plain = PackedSeqParams(qkv_format="thd", cu_seqlens_q=elsewhere, cu_seqlens_kv=elsewhere)
    with pytest.raises(ValueError, match="boundaries are on meta alone"):
        attention()(*drawn(), None, packed_seq_params=plain)
    with pytest.raises(ValueError, match="boundaries on the CPU"):
        segmented(elsewhere)
    with pytest.raises(ValueError, match="a number for each position"):
        segmented(torch.tensor(BOUNDS), spans=SPANS[:3])
    with pytest.raises(ValueError, match="span 1 lies in the packed sequences 0 and 2"):
        segmented(torch.tensor(BOUNDS), spans=torch.ones(16, dtype=torch.int32))


# In a model --------------------------------------------------------------------------------------


def language(config, kind: str):
    changes = {"position_embedding_type": kind}
    if kind == "mrope":
        config = replace(config, mrope_section=[2, 1, 1])
    return tiny.language_spec(config, **changes)


@pytest.mark.parametrize("kind", ["rope", "mrope"])
def test_a_pack_with_images_equals_its_samples_apart(single_process, kind):
    torch.manual_seed(0)
    images = tiny.image_spec(decoders={}, output_projections=[])
    config = tiny.mimo_config(
        language(tiny.language_config(num_query_groups=2), kind),
        modality_submodules={"images": images},
        special_token_ids={"images": tiny.READ},
        generation_token_ids={},
        modality_loss_weights={},
    )
    model = MimoModel(config)
    alone = packed.alone()
    for batch in alone:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.WRITE, 3)
        length = batch["input_ids"].shape[1]
        ids = torch.arange(length)[None]
        if kind == "mrope":
            batch["position_ids"] = torch.stack([ids, ids // 2, ids % 3])
    counts = {"text": sum(batch["loss_mask"].sum() for batch in alone)}
    expected, gradients = packed.step(model, [(batch, None) for batch in alone], counts)
    together = packed.packed(alone)
    if kind == "mrope":
        lengths = [length for _, length, _, _ in packed.SEQUENCES]
        rows = [batch["position_ids"] for batch in alone]
        together["position_ids"] = torch.cat([F.pad(x, (0, n - x.shape[-1])) for x, n in zip(rows, lengths)], -1)
    found, theirs = packed.step(model, [(together, None)], counts)
    torch.testing.assert_close(found["text"].sum, expected["text"].sum, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_spans_of_a_model_equal_a_mask_that_is_written_out_on_bare_gpt(single_process):
    torch.manual_seed(0)
    spec = tiny.language_spec(tiny.language_config())
    config = tiny.mimo_config(
        spec, modality_submodules={}, special_token_ids={}, generation_token_ids={}, modality_loss_weights={}
    )
    model = MimoModel(config).eval()
    ids = torch.randint(0, 60, (1, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(BOUNDS)])[None]
    params = segmented(torch.tensor(BOUNDS, dtype=torch.int32), spans=SPANS)
    found, _ = model(ids, position_ids=positions, packed_seq_params=params)
    for sequence, (start, stop) in enumerate(itertools.pairwise(BOUNDS)):
        if start == stop:
            continue
        hidden = ~span_mask(SPANS[start:stop])[None, None]
        length = stop - start
        alone = model.language_model(ids[:, start:stop], torch.arange(length)[None], hidden)
        torch.testing.assert_close(found[:, start:stop], alone, rtol=0, atol=1e-5, msg=str(sequence))


def test_spans_equal_the_attention_of_transformers_gemma3(single_process):
    """Its own mask of images, made of token types, and its own attention over the same queries, keys and values."""
    from transformers import Gemma3TextConfig
    from transformers.masking_utils import create_causal_mask
    from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward, get_block_sequence_ids_for_mask

    length = 16
    config = Gemma3TextConfig(
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=WIDTH, hidden_size=HEADS * WIDTH
    )
    config._attn_implementation = "eager"
    kinds = (SPANS >= 0).int()[None]
    spans = get_block_sequence_ids_for_mask(kinds)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, length, HEADS * WIDTH),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(length)[None],
        block_sequence_ids=spans,
    )
    inputs = drawn()
    layer = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, head_dim=WIDTH, training=False)
    expected, _ = eager_attention_forward(layer, *(x.transpose(0, 1)[None] for x in inputs), mask)
    params = segmented(torch.tensor([0, length], dtype=torch.int32), spans=spans[0].int())
    found = attention()(*inputs, None, packed_seq_params=params)
    torch.testing.assert_close(found, expected[0].flatten(1), rtol=0, atol=2e-6)


def test_attention_that_would_see_a_span_as_text_is_named_before_anything_runs(single_process, monkeypatch):
    class EngineAttention(DotProductAttention):
        def forward(self, *given, **named):
            raise AssertionError("the batch reached the layers")

    monkeypatch.setattr(specs, "core_attention", lambda backend, config: EngineAttention)
    model = MimoModel(MimoModelConfig(tiny.language_spec(tiny.language_config())))
    ids = torch.randint(0, 60, (1, 16), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected none in front of EngineAttention, which ignores them.*'torch'"):
        model(ids, packed_seq_params=segmented(bounds, spans=SPANS))
    with pytest.raises(AssertionError, match="reached the layers"):  # without spans it is none of its business
        model(ids, packed_seq_params=segmented(bounds))


def test_a_model_whose_media_see_the_whole_of_themselves_is_not_built_where_attention_cannot_show_it(
    single_process, monkeypatch
):
    class EngineAttention(DotProductAttention):
        pass

    config = tiny.mimo_config(
        modality_submodules={"images": tiny.image_spec()}, special_token_ids={"images": 61}, whole_spans={"images"}
    )
    MimoModel(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ValueError, match=r"MimoModel: \['images'\] have media spans .* under context parallelism"):
        MimoModel(config, pg_collection=groups)
    monkeypatch.undo()
    monkeypatch.setattr(specs, "core_attention", lambda backend, config: EngineAttention)
    message = "expected none in front of EngineAttention, which ignores them.*leave out whole_spans of the MimoModelC"
    with pytest.raises(ValueError, match=message):
        MimoModel(config)


def test_fused_attention_of_encoders_refuses_packed_sequences(single_process):
    core = FusedAttention(tiny.language_config(), 1, AttnMaskType.causal, "self")
    with pytest.raises(ValueError, match="FusedAttention keeps no packed sequences apart"):
        core(*(x[:, None] for x in drawn()), None, packed_seq_params=segmented(torch.tensor(BOUNDS)))


def test_a_fused_rotary_kernel_that_counts_packed_sequences_anew_is_refused_with_mrope(single_process):
    config = tiny.language_config(mrope_section=[2, 1, 1])
    model = MimoModel(MimoModelConfig(tiny.language_spec(config, position_embedding_type="mrope")))
    ids, bounds = torch.randint(0, 60, (1, 16)), torch.tensor(BOUNDS, dtype=torch.int32)
    model(ids, packed_seq_params=segmented(bounds))
    config.apply_rope_fusion = True  # which Megatron itself refuses to build without TransformerEngine
    with pytest.raises(ValueError, match="apply_rope_fusion=True: the fused kernel .*--no-rope-fusion"):
        model(ids, packed_seq_params=segmented(bounds))
