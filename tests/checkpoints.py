"""Small random checkpoints of transformers, written on the spot, and what transformers computes with them.

Weights have a standard deviation of 0.2: with transformers' own of 0.02, leaving out Llama 3's rope scaling changes
logits by 2e-5, and a test sees nothing.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY, HIDDEN, LENGTH, WINDOW = 101, 32, 200, 64
IMAGE = 100
#: Float32 on both sides, other orders of additions: found 1e-6 of the size.
TOLERANCE = 1e-4
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip

_LANGUAGE = dict(
    hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=512,
)  # fmt: skip
_TOWER = dict(hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=4)
_CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}

#: Name -> model type and what its configuration has of its own: the families, and what breaks converters.
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {}),
    "llama-3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama-biases-tied": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama-interpolated-1-group": (
        "llama",
        dict(num_key_value_heads=1, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    ),
    "mistral": ("mistral", dict(sliding_window=WINDOW)),
    "mistral-head-dim": ("mistral", dict(sliding_window=None, head_dim=12)),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-windows": ("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}


def language_config(kind: str, **changes: Any) -> Any:
    return _CONFIGS[kind](**(_LANGUAGE | changes))


def tower_config(kind: str, image_size: int = 56, **changes: Any) -> Any:
    config: Any = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind]
    return config(**(_TOWER | {"image_size": image_size} | changes))


def llava_config(tower: str = "clip", language: str = "llama", image_size: int = 56, **changes: Any) -> Any:
    of_tower = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
    if tower == "siglip":
        of_tower = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    options = of_tower | dict(image_token_index=IMAGE, image_seq_length=(image_size // 4) ** 2) | changes
    return LlavaConfig(
        text_config=language_config(language), vision_config=tower_config(tower, image_size), **options
    )  # fmt: skip


def randomized(model: nn.Module, seed: int = 0) -> Any:
    """`model` with weights of a standard deviation of 0.2, in evaluation mode; its norms stay near one."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.dim() == 1 and "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def language_model(name: str, **changes: Any) -> Any:
    kind, options = LANGUAGE_MODELS[name]
    return randomized(transformers.AutoModelForCausalLM.from_config(language_config(kind, **(options | changes))))


def llava(tower: str = "clip", language: str = "llama", **changes: Any) -> Any:
    return randomized(transformers.LlavaForConditionalGeneration(llava_config(tower, language, **changes)))


def written(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def ids(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, IMAGE, (2, length), generator=torch.Generator().manual_seed(seed))


def images_and_ids(image_size: int = 56, seed: int = 1) -> tuple[Tensor, Tensor]:
    """`[2, 3, size, size]` images and ids `[2, rows + 44]` of a text around each."""
    rows = (image_size // 4) ** 2
    text = ids(rows + 44, seed)
    text[0, 3 : 3 + rows] = IMAGE
    text[1, 20 : 20 + rows] = IMAGE
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(seed))
    return pixels, text


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
