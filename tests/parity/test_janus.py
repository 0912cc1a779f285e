"""Discrete image generation against `transformers`' Janus: the same weights, the same loss and logits.

The whole path is compared: VQ encoding of the image, its codes' embeddings at the generation tokens,
the language model, the hidden state before each generation token, the generation head, cross-entropy.
"""

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

import megatron_mimo
from megatron_mimo.decoders import CodeInput, CodeTokenizer, DiscreteDecoder
from tests import tiny

HIDDEN, CODES, GRID, TEXT = 32, 48, (4, 4), 8
GENERATION = 63
# Float32 on both sides, another order of additions in attention and norms.
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


def janus() -> JanusForConditionalGeneration:
    torch.manual_seed(0)
    config = JanusConfig(
        text_config=LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=64, attn_implementation="eager",
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=2,
            projection_dim=HIDDEN,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8, num_embeddings=CODES, latent_channels=8, base_channels=32,
            channel_multiplier=(1, 1), num_res_blocks=1, projection_dim=HIDDEN,
            image_token_embed_dim=HIDDEN,
        ),
        tie_word_embeddings=False,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # their small start would hide mistakes below the tolerance
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


class JanusCodec(nn.Module):
    """Janus's VQ model as a tokenizer's codec."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode(self, images):
        return self.model.encode(images).image_tokens

    def decode(self, codes):
        return self.model.decode(codes.flatten(1))


def mimo(theirs: JanusForConditionalGeneration) -> megatron_mimo.MimoModel:
    config = tiny.language_config(
        hidden_size=HIDDEN, ffn_hidden_size=48, num_query_groups=2, normalization="RMSNorm",
        layernorm_epsilon=1e-6, add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, bias_activation_fusion=False,
    )  # fmt: skip
    tokenizer = CodeTokenizer(JanusCodec(theirs.model.vqmodel), grid=GRID)
    decoder = dict(width=HIDDEN, codebook_sizes=CODES, hidden_width=HIDDEN, tokenizer=tokenizer)
    feed = dict(hidden_size=HIDDEN, embedding_width=8, hidden_width=HIDDEN)
    images = ModuleSpec(
        module=megatron_mimo.VisionModalitySubmodules,
        submodules=dict(
            decoders={"codes": ModuleSpec(module=DiscreteDecoder, params=decoder)},
            generation_input=ModuleSpec(module=CodeInput, params=feed),
        ),
    )
    language = tiny.language_spec(config, share_embeddings_and_output_weights=False)
    return megatron_mimo.MimoModel(
        megatron_mimo.MimoModelConfig(
            language_model=language,
            modality_submodules={"images": images},
            generation_token_ids={"images": GENERATION},
        )
    )


def copy_weights(theirs: JanusForConditionalGeneration, ours: megatron_mimo.MimoModel) -> None:
    llama, language = theirs.model.language_model, ours.language_model
    pairs = {
        language.embedding.word_embeddings.weight: llama.embed_tokens.weight,
        language.decoder.final_layernorm.weight: llama.norm.weight,
    }
    for layer, their in zip(language.decoder.layers, llama.layers, strict=True):
        attention = their.self_attn
        # Megatron keeps the queries of a group with its key and value, group after group.
        groups = [part.weight.unflatten(0, (2, -1)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        pairs |= {
            layer.input_layernorm.weight: their.input_layernorm.weight,
            layer.self_attention.linear_qkv.weight: torch.cat(groups, dim=1).flatten(0, 1),
            layer.self_attention.linear_proj.weight: attention.o_proj.weight,
            layer.pre_mlp_layernorm.weight: their.post_attention_layernorm.weight,
            layer.mlp.linear_fc1.weight: torch.cat([their.mlp.gate_proj.weight, their.mlp.up_proj.weight]),
            layer.mlp.linear_fc2.weight: their.mlp.down_proj.weight,
        }
    submodule = ours.modality_submodules["images"]
    feed, decoder = submodule.generation_input, submodule.decoders["codes"]
    aligner, head = theirs.model.generation_aligner, theirs.model.generation_head
    pairs[feed.embeddings[0].weight] = theirs.model.generation_embeddings.weight
    for mine, their in (
        (feed.projection[0], aligner.fc1),
        (feed.projection[2], aligner.hidden_layers[0]),
        (decoder.hidden, head.proj_out),
        (decoder.heads[0], head.vision_head),
    ):
        pairs |= {mine.weight: their.weight, mine.bias: their.bias}
    with torch.no_grad():
        for mine, their in pairs.items():
            mine.copy_(their)


@pytest.fixture(scope="module")
def models(single_process):
    theirs = janus()
    ours = mimo(theirs)
    copy_weights(theirs, ours)
    return theirs, ours


def their_logits(theirs, text, codes):
    """`[B, T, CODES]`: the head on the hidden state before each image token, as `generate` reads it."""
    prompt = theirs.get_input_embeddings()(text)
    image = theirs.prepare_embeddings_for_image_generation(codes)
    hidden = theirs.model.language_model(inputs_embeds=torch.cat([prompt, image], dim=1))
    before = hidden.last_hidden_state[:, TEXT - 1 : -1]
    return theirs.model.generation_head(before)


def test_loss_and_image_token_logits_equal_janus(models):
    theirs, ours = models
    text = torch.randint(1, 60, (2, TEXT))
    media = torch.rand(2, 3, 8, 8)
    codes = theirs.model.vqmodel.encode(media).image_tokens.reshape(2, -1)
    assert codes.shape == (2, 16) and codes.unique().numel() > 4
    with torch.no_grad():
        wanted = their_logits(theirs, text, codes)
    ids = torch.cat([text, torch.full((2, 16), GENERATION)], dim=1)
    outputs, _ = ours(ids, modality_targets={"images": {"codes": {"media": media}}})
    result = outputs.modalities["images"]
    (logits,) = ours.modality_submodules["images"].decoders["codes"].logits(result.hidden)
    torch.testing.assert_close(logits, wanted.flatten(0, 1), **TOLERANCE)
    term = result.losses["codes"]
    assert term.count == 32
    expected = F.cross_entropy(wanted.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(term.mean(), expected, **TOLERANCE)


def test_the_gradient_reaches_everything_but_the_tokenizer(models):
    _, ours = models
    ours.zero_grad()
    ids = torch.cat([torch.randint(1, 60, (1, TEXT)), torch.full((1, 16), GENERATION)], dim=1)
    media = {"images": {"codes": {"media": torch.rand(1, 3, 8, 8)}}}
    ours(ids, modality_targets=media)[0].modalities["images"].losses["codes"].mean().backward()
    for name, parameter in ours.named_parameters():
        if "tokenizer" in name:
            assert parameter.grad is None and not parameter.requires_grad, name
        elif "output_layer" not in name:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_guided_greedy_codes_and_the_drawn_image_equal_janus(models):
    theirs, ours = models
    submodule = ours.modality_submodules["images"]
    decoder = submodule.decoders["codes"]
    rows, null = torch.randn(16, HIDDEN), torch.randn(16, HIDDEN)
    with torch.no_grad():
        conditional, free = (theirs.model.generation_head(part) for part in (rows, null))
        codes = (free + 5 * (conditional - free)).argmax(-1)
        image = theirs.model.vqmodel.decode(codes[None])
    drawn = decoder.sample(rows, temperature=0, guidance=5, unconditional_rows=null)
    assert torch.equal(drawn, codes)
    torch.testing.assert_close(decoder.render(drawn), image, **TOLERANCE)
