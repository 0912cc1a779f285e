"""Every snippet of docs/specification.md runs, and its signatures are ours."""

import inspect
import re
from abc import ABC
from pathlib import Path
from typing import Optional

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

import megatron_mimo
from megatron_mimo import specs

TEXT = Path(__file__).parents[2].joinpath("docs/specification.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
HIDDEN = 64


def transformer_config(hidden_size: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=4,
        ffn_hidden_size=2 * hidden_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


class Pooled(nn.Module):
    """An encoder that calls its input what the specification calls it."""

    def __init__(self, keyword: str) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.ones(HIDDEN))
        self.keyword = keyword


class ImageEncoder(Pooled):
    def forward(self, images):
        return images.flatten(1).mean(1)[:, None, None] * self.width


class PixelEncoder(Pooled):
    def forward(self, pixel_values):
        return pixel_values.flatten(1).mean(1)[:, None, None] * self.width


class FeatureEncoder(Pooled):
    def forward(self, input_features):
        return input_features.mean((1, 2))[:, None] * self.width


def vocabulary() -> dict[str, object]:
    """The names that the snippets take for granted."""
    language_config, vision_config = transformer_config(HIDDEN), transformer_config(128)
    projection_config = transformer_config(HIDDEN)
    return {
        **{name: getattr(megatron_mimo, name) for name in megatron_mimo.__all__},
        "ABC": ABC, "nn": nn, "Dict": dict, "List": list, "Optional": Optional,
        "ModuleSpec": ModuleSpec, "GPTModel": GPTModel, "CLIPViTModel": CLIPViTModel,
        "MultimodalProjector": MultimodalProjector,
        "language_config": language_config, "vision_config": vision_config,
        "get_mock_language_layer_spec": lambda: specs.language_layer_spec(language_config),
        "get_mock_vision_layer_spec": lambda: specs.vision_layer_spec(vision_config),
        "get_mock_projection_config": lambda: projection_config,
        "get_mock_projection_layer_spec": lambda: specs.projection_spec(projection_config),
    }  # fmt: skip


def snippet(containing: str) -> str:
    (found,) = [text for text in SNIPPETS if containing in text]
    return found


def signature_of(text: str, name: str) -> inspect.Signature:
    """The signature that a `Name(parameter: type, ...)` snippet writes down."""
    names = vocabulary()
    exec(f"def {name}" + text.strip()[len(name) :] + ": ...", names)
    return inspect.signature(names[name])


def tiny_model(modality_submodules) -> megatron_mimo.MimoModel:
    config = transformer_config(HIDDEN)
    language = ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": specs.language_layer_spec(config),
            "vocab_size": 128,
            "max_sequence_length": 16,
        },
    )
    return megatron_mimo.MimoModel(
        megatron_mimo.MimoModelConfig(
            language_model=language,
            modality_submodules=modality_submodules,
            special_token_ids=dict(zip(modality_submodules, (32000, 32001))),
        )
    )


def test_there_is_a_test_for_each_snippet():
    run = re.findall(r'snippet\(\s*"([^"]+)"', Path(__file__).read_text())
    constructed = ("MimoModel(\n", "MimoModelConfig(\n")  # whose signatures are compared
    untested = [text for text in SNIPPETS if not any(part in text for part in run) and not text.startswith(constructed)]
    assert SNIPPETS and not untested


def test_base_class_signature(single_process):
    written = snippet("# Base class constructor with named encoders").rstrip() + "\n        pass\n"
    names = vocabulary()
    exec(written, names)
    ours = inspect.signature(megatron_mimo.ModalitySubmodules.__init__).parameters
    assert issubclass(megatron_mimo.ModalitySubmodules, (ABC, nn.Module))
    for name, parameter in inspect.signature(names["ModalitySubmodules"].__init__).parameters.items():
        assert ours[name].default is parameter.default
        assert ours[name].kind is parameter.kind


@pytest.mark.parametrize("name", ["MimoModel", "MimoModelConfig"])
def test_constructor_signature(name, single_process):
    (text,) = [text for text in SNIPPETS if re.match(rf"{name}\(\n    \w+: ", text)]
    ours = inspect.signature(getattr(megatron_mimo, name)).parameters
    written = signature_of(text, name).parameters
    assert list(ours)[: len(written)] == list(written)
    for parameter, of in written.items():
        required = of.default is inspect.Parameter.empty
        if required and parameter in ("config", "language_model"):
            assert ours[parameter].default is inspect.Parameter.empty


def test_custom_submodules(single_process):
    mimo_config = tiny_model({}).mimo_config
    names = {**vocabulary(), "mimo_config": mimo_config, "projected_embeddings": torch.ones(2, HIDDEN)}
    exec(snippet("class CustomVisionSubmodules").replace("{...}", "{}"), names)
    embeddings = names["model"].modality_submodules["images"].encode({"anything": 1})
    assert embeddings is names["projected_embeddings"]


def test_alignment(single_process):
    tokens = torch.tensor([[1, 32000, 2], [32000, 3, 4]])
    text, images = torch.randn(4, HIDDEN), torch.randn(2, HIDDEN)
    names = {**vocabulary(), "self": tiny_model({}), "text_emb": text, "image_emb": images}
    exec(snippet("self.align_embeddings_by_token_positions"), {**names, "tokens": tokens}, names)
    rows = [[text[0], images[0], text[1]], [images[1], text[2], text[3]]]
    expected = torch.stack([torch.stack(sample) for sample in rows], dim=1)
    assert torch.equal(names["aligned_embeddings"], expected)


def test_vision_language_model(single_process):
    names = vocabulary()
    exec(snippet("# Language model specification"), names)
    tokens = torch.tensor([[5] + [32000] * 197 + [6, 7]])
    labels = tokens.roll(-1, 1)
    outputs, _ = names["vlm"](
        input_ids=tokens,
        labels=labels,
        modality_inputs={"images": {"clip_encoder": {"pixel_values": torch.randn(1, 3, 224, 224)}}},
    )
    assert outputs.shape == tokens.shape
    outputs.mean().backward()
    assert all(p.grad is not None for p in names["vlm"].modality_submodules.parameters())


def test_forward_usage(single_process):
    encoders = {"clip_encoder": PixelEncoder, "vit_encoder": ImageEncoder}
    model = tiny_model(
        {
            "images": ModuleSpec(
                module=megatron_mimo.VisionModalitySubmodules,
                submodules={
                    "encoders": {
                        name: ModuleSpec(module=kind, params={"keyword": name}) for name, kind in encoders.items()
                    }
                },
            ),
            "audio": ModuleSpec(
                module=megatron_mimo.AudioModalitySubmodules,
                submodules={
                    "encoders": {
                        "whisper_encoder": ModuleSpec(module=FeatureEncoder, params={"keyword": "input_features"})
                    }
                },
            ),
        }
    )
    names = {
        "mimo_model": model,
        "images": torch.randn(1, 3, 8, 8),
        "vit_images": torch.randn(1, 3, 4, 4),
        "audio_features": torch.randn(3, 5, 6),
        "input_ids": torch.tensor([[1, 32000, 32000, 2, 32001, 32001, 32001]]),
        "position_ids": torch.arange(7)[None],
    }
    exec(snippet("# Prepare inputs for multiple modalities"), names)
    vocabulary_here = 128 // parallel_state.get_tensor_model_parallel_world_size()
    assert names["outputs"].shape == (1, 7, vocabulary_here)
