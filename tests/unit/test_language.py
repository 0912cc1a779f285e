"""How the language model is built and called: masks, stages, positions, logits, multi-token prediction."""

from dataclasses import replace

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules
from megatron_mimo.attention_mask import joined_with_causal
from megatron_mimo.language import build_language_model
from tests import tiny

IDS = torch.arange(1, 13)[None]


def text_model(**changes) -> MimoModel:
    torch.manual_seed(0)
    return MimoModel(MimoModelConfig(tiny.language_spec(**changes)))


# Masks


def test_a_mask_of_padding_joins_the_causal_mask(single_process):
    model = text_model().eval()
    hidden = torch.zeros(1, 1, 1, 12, dtype=torch.bool)
    hidden[..., 3] = True
    changed = IDS.clone()
    changed[0, 11] = 50
    before, after = model(IDS, attention_mask=hidden)[0], model(changed, attention_mask=hidden)[0]
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 4:], model(IDS)[0][:, 4:]), "the padding itself is hidden"


def test_a_mask_of_queries_and_keys_is_taken_as_it_is_with_two_dims_or_four(single_process):
    model = text_model().eval()
    window = torch.ones(12, 12, dtype=torch.bool).triu(1) | torch.ones(12, 12, dtype=torch.bool).tril(-4)
    assert torch.equal(model(IDS, attention_mask=window)[0], model(IDS, attention_mask=window[None, None])[0])


class EngineAttention(nn.Module):
    """Stands in for TransformerEngine's core attention, which is known by its module."""


EngineAttention.__module__ = "megatron.core.extensions.transformer_engine"


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 1, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)])
def test_causal_layers_of_transformer_engine_refuse_a_mask_they_would_ignore(single_process, mask):
    stack = text_model().language_model.decoder
    for layer in stack.layers:
        layer.self_attention.core_attention = EngineAttention()
    with pytest.raises(ValueError, match="EngineAttention with a causal mask type ignores it"):
        joined_with_causal(mask, stack)
    for layer in stack.layers:
        layer.self_attention.attn_mask_type = AttnMaskType.arbitrary
    assert joined_with_causal(mask, stack).shape[-1] == 4


# Stages


class Wrapped(GPTModel):
    def __init__(self, **keywords) -> None:
        super().__init__(**keywords)


def build(spec: ModuleSpec, pre_process: bool = True, post_process: bool = True) -> nn.Module:
    return build_language_model(
        spec, pre_process=pre_process, post_process=post_process, vp_stage=None, pg_collection=None
    )


def test_a_class_that_hands_keywords_on_is_cut_into_stages(single_process):
    spec = tiny.language_spec()
    made = build(replace(spec, module=Wrapped), pre_process=False)
    assert not made.pre_process and made.post_process
    assert {*made.state_dict()} == {*build(spec, pre_process=False).state_dict()}


class Whole(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.config = config


def test_a_class_without_stage_arguments_is_refused_on_a_pipeline(single_process):
    spec = ModuleSpec(Whole, {"config": tiny.language_config()})
    build(spec)
    with pytest.raises(ValueError, match="Whole takes no post_process, so that every pipeline stage would build"):
        build(spec, post_process=False)


@pytest.mark.parametrize("name", ["pre_process", "post_process"])
def test_stage_arguments_of_the_spec_that_disagree_with_the_stage_are_refused(single_process, name):
    with pytest.raises(ValueError, match=f"params have {name}=False, but this pipeline stage has {name}=True"):
        build(tiny.language_spec(**{name: False}))


# Inference


def test_cached_decoding_with_learned_positions_goes_on_counting(single_process):
    model = text_model(position_embedding_type="learned_absolute").eval()
    whole = model(IDS)[0]
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=16)
    found = []
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 7)):
            found.append(model(IDS[:, start:stop], inference_context=context)[0])
            context.sequence_len_offset = stop
    torch.testing.assert_close(torch.cat(found, dim=1)[:, -2:], whole[:, 5:7], rtol=1e-4, atol=1e-5)


def test_megatrons_inference_mode_runs(single_process):
    model = text_model().eval()
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=16)
    with torch.no_grad(), InferenceMode.active():
        logits, _ = model(IDS, inference_context=context)
    torch.testing.assert_close(logits[:, -1], model(IDS)[0][:, -1], rtol=1e-4, atol=1e-5)


# Multi-token prediction


def mtp_spec() -> ModuleSpec:
    config = tiny.language_config(mtp_num_layers=2)
    spec = tiny.language_spec(config)
    layers = spec.params["transformer_layer_spec"](config)
    spec.params["mtp_block_spec"] = get_gpt_mtp_block_spec(config, layers.submodules, use_transformer_engine=False)
    return spec


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_multi_token_prediction_of_text_is_bitwise_gptmodels(single_process):
    spec = mtp_spec()
    theirs, ours = build(spec), MimoModel(MimoModelConfig(spec, loss_where_counted=False))
    ours.language_model.load_state_dict(theirs.state_dict())
    labels, mask = IDS.roll(-1, 1), torch.ones(1, 12)
    mask[0, -1] = 0
    positions = torch.arange(12)[None]
    expected = theirs(IDS, positions, None, labels=labels, loss_mask=mask)
    (expected * mask).sum().backward()
    found, _ = ours(IDS, labels=labels, loss_mask=mask)
    (found * mask).sum().backward()
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients(ours.language_model), gradients(theirs)))
    assert torch.equal(ours.eval()(IDS)[0], theirs.eval()(IDS, positions, None))


def given_rows(spec: ModuleSpec) -> MimoModel:
    """Reads images whose encoder gives back the rows it is given."""
    images = ModuleSpec(VisionModalitySubmodules, submodules={"encoders": {"rows": ModuleSpec(nn.Identity)}})
    return MimoModel(MimoModelConfig(spec, {"images": images}, special_token_ids={"images": tiny.READ}))


def test_multi_token_prediction_sees_the_rows_that_were_placed(single_process):
    """Images whose rows are those of text tokens train the language model as the text does."""
    model = given_rows(mtp_spec())
    stands_for = IDS.clone()
    ids = IDS.clone()
    ids[0, 3:6] = tiny.READ
    labels, mask = stands_for.roll(-1, 1), torch.ones(1, 12)
    mask[0, -1] = 0
    mask[0, 2:5] = 0
    results = []
    for tokens in (stands_for, ids):
        model.zero_grad()
        rows = model.language_model.embedding.word_embeddings.weight[stands_for[0, 3:6]]
        given = {} if tokens is stands_for else {"images": {"rows": {"input": rows}}}
        loss, _ = model(tokens, labels=labels, loss_mask=mask, modality_inputs=given)
        (loss * mask).sum().backward()
        results.append([loss.detach(), *gradients(model.language_model)])
    assert len(results[0]) == len(results[1])
    for text, image in zip(*results, strict=True):
        torch.testing.assert_close(image, text, rtol=1e-5, atol=1e-6)


def test_multi_token_prediction_without_layers_for_it_is_refused(single_process):
    spec = mtp_spec()
    del spec.params["mtp_block_spec"]
    with pytest.raises(ValueError, match="mtp_num_layers=2, but the language model is given no layers for it"):
        MimoModel(MimoModelConfig(spec))


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({}, {"pre_process": False}, "needs the embedded rows on the last pipeline stage"),
        ({"module": Whole}, {}, "works with GPTModel alone"),
    ],
)
def test_multi_token_prediction_that_cannot_work_is_refused(single_process, changes, stage, message):
    with pytest.raises(ValueError, match=message):
        build(replace(mtp_spec(), **changes), **stage)


# Experts


def test_padding_counts_in_no_balance_of_experts(single_process):
    """The balance loss of a padded batch moves the router as that of the batch without its padding."""
    config = tiny.language_config(
        num_moe_experts=4,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1.0,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        add_bias_linear=False,
    )
    model = MimoModel(MimoModelConfig(tiny.language_spec(config)))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # Megatron's own draws depend on the tests before, and some gradients then nearly cancel
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw).mul_(0.2))
    gradients = []
    for length, padding in ((12, None), (16, torch.arange(16)[None] >= 12)):
        model.zero_grad()
        ids = torch.cat([IDS, torch.full((1, length - 12), 7)], dim=1)
        loss, _ = model(ids, labels=ids, loss_mask=torch.zeros_like(ids).float(), padding_mask=padding)
        (loss * 0).sum().backward()
        gradients.append([p.grad.clone() for name, p in model.named_parameters() if "router" in name])
    assert gradients[0] and all(gradient.any() for gradient in gradients[0])
    for alone, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-7)
