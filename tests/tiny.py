"""Tiny models and batches that the tests share: a language model, images to read and to write."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.decoders.base import Decoder, weighted_sum

HIDDEN, VOCABULARY, PIXELS = 32, 64, 6
READ, WRITE, HEAR = -200, 61, 9_000_000


class PatchEncoder(nn.Module):
    """[n, s, PIXELS] -> [n, s, width]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(PIXELS, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class LinearDecoder(Decoder):
    """Squared error of a linear map of each row."""

    def __init__(self, width: int = HIDDEN, position_rule: str = "own") -> None:
        super().__init__(width=width, position_rule=position_rule)
        self.linear = nn.Linear(width, PIXELS)

    def num_rows(self, targets):
        return targets["pixels"].shape[0]

    def loss_shape(self, targets):
        return tuple(targets["pixels"].shape)

    def loss(self, rows, targets):
        return weighted_sum((self.linear(rows) - targets["pixels"]).square(), None)

    def sample(self, rows):
        return self.linear(rows)


def language_config(**changes) -> TransformerConfig:
    settings = dict(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        bias_dropout_fusion=False,
    )
    return TransformerConfig(**{**settings, **changes})


def language_spec(config: TransformerConfig | None = None, **changes) -> ModuleSpec:
    config = config or language_config()
    params = dict(
        config=config,
        transformer_layer_spec=specs.language_layer_spec,
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="rope",
    )
    return ModuleSpec(module=GPTModel, params={**params, **changes})


def megatrons_layers(config: TransformerConfig | None = None) -> ModuleSpec:
    """Layers in plain torch whose self attention is Megatron's own."""
    layers = specs.language_layer_spec(config or language_config(), "torch")
    for layer in layers.submodules.layer_specs:
        layer.submodules.self_attention.module = SelfAttention
    return layers


def hybrid_spec(config: TransformerConfig, pattern: str = "*-*-", **changes) -> ModuleSpec:
    params = dict(
        config=config,
        hybrid_stack_spec=specs.hybrid_stack_spec(config),
        hybrid_layer_pattern=pattern,
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="rope",
    )
    return ModuleSpec(module=HybridModel, params={**params, **changes})


def linear(inputs: int, outputs: int) -> ModuleSpec:
    return ModuleSpec(module=nn.Linear, params=dict(in_features=inputs, out_features=outputs))


def image_spec(**submodules) -> ModuleSpec:
    parts = dict(
        encoders={"patches": ModuleSpec(module=PatchEncoder)},
        input_projections=[linear(16, HIDDEN)],
        decoders={"pixels": ModuleSpec(module=LinearDecoder)},
        output_projections=[linear(HIDDEN, HIDDEN)],
    )
    return ModuleSpec(module=megatron_mimo.VisionModalitySubmodules, submodules={**parts, **submodules})


def audio_spec() -> ModuleSpec:
    return ModuleSpec(
        module=megatron_mimo.AudioModalitySubmodules,
        submodules=dict(
            encoders={"frames": ModuleSpec(module=PatchEncoder)},
            input_projections=[linear(16, HIDDEN)],
        ),
    )


def mimo_config(language: ModuleSpec | None = None, **changes) -> megatron_mimo.MimoModelConfig:
    settings = dict(
        language_model=language or language_spec(),
        modality_submodules={"images": image_spec(), "audio": audio_spec()},
        special_token_ids={"images": READ, "audio": HEAR},
        generation_token_ids={"images": WRITE},
        modality_loss_weights={"images": 0.5},
    )
    return megatron_mimo.MimoModelConfig(**{**settings, **changes})


def batch(seed: int = 0) -> dict:
    """Three samples of 16 tokens: one reads and writes, one hears, one has text alone."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (3, 16), generator=draw)
    ids[0, 2:6] = READ
    ids[0, 9:12] = WRITE
    ids[1, 5:8] = HEAR
    ids[1, 12:14] = WRITE
    labels = ids.roll(-1, 1).clamp(0, VOCABULARY - 1)
    return dict(
        input_ids=ids,
        labels=labels,
        loss_mask=(torch.rand(3, 16, generator=draw) > 0.3).float(),
        modality_inputs={
            "images": {"patches": {"x": torch.randn(2, 2, PIXELS, generator=draw)}},
            "audio": {"frames": {"x": torch.randn(3, PIXELS, generator=draw)}},
        },
        modality_targets={"images": {"pixels": {"pixels": torch.randn(5, PIXELS, generator=draw)}}},
    )


def total(model: megatron_mimo.MimoModel, arguments: dict) -> Tensor:
    """The weighted loss of one batch."""
    outputs, loss_mask = model(**arguments)
    return megatron_mimo.total_loss(megatron_mimo.loss_terms(outputs, loss_mask), model.loss_weights)
