"""Whether a model of one's own configuration computes what a checkpoint's says."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo.build import maker
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf.blueprint import LANGUAGE_MODELS, TOWERS, Part
from megatron_mimo.hf.clip import layers_built
from megatron_mimo.hf.family import settings_of

#: Settings of layers that change what is computed and leave the sizes of tensors as they are.
_OF_LAYERS = (
    "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit", "activation_func",
    "num_attention_heads", "num_query_groups", "kv_channels", "qk_layernorm", "window_size", "window_attn_skip_freq",
    "mrope_section",
)  # fmt: skip
#: And of the language model.
_OF_MODEL = {
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling": False,
    "rope_scaling_factor": None,  # compared where there is scaling
    "seq_len_interpolation_factor": None,
    "share_embeddings_and_output_weights": False,
}


def unlike(config: MimoModelConfig, part: Part) -> list[str]:
    """One line for each setting in which a model differs from what a checkpoint of one of its parts was made with.

    Args:
        config: of the model.
        part: of the checkpoint. Of encoders that are no towers of the library nothing is compared.
    """
    if part.path == "language_model":
        settings, _ = settings_of(LANGUAGE_MODELS[part.model_type], part.config)
        params = config.language_model.params
        layers = {**settings, "num_layers": part.config.num_hidden_layers}
        own = vars(config.language_config) | {"num_layers": _attention_layers(config)}
        return [*_layers(own, layers), *_model(config.language_model, params, settings)]
    modality, kind, name = part.path.split("/")
    if part.model_type not in TOWERS or modality not in config.modality_submodules:
        return []
    encoders: Any = config.submodule_specs(modality).get(kind) or {}
    spec = encoders.get(name)
    own_config = (spec.params or {}).get("transformer_config") if isinstance(spec, ModuleSpec) else None
    if own_config is None:
        return []
    settings, _ = settings_of(TOWERS[part.model_type], part.config)
    return [*_layers(vars(own_config), {**settings, "num_layers": layers_built(part.config, part.layer)})]


def _attention_layers(config: MimoModelConfig) -> int:
    """Layers as `GPTModel` counts them: of a hybrid model those with attention."""
    pattern = config.language_model.params.get("hybrid_layer_pattern")
    return config.language_config.num_layers if pattern is None else str(pattern).count("*")


def _layers(own: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    plain = {one.name: one.default for one in dataclasses.fields(TransformerConfig)}
    for name in ("num_layers", *_OF_LAYERS):
        expected = settings.get(name, plain[name])
        if name in settings or expected is not dataclasses.MISSING:
            yield from _one(name, own[name], expected, given=name in settings)


def _model(spec: ModuleSpec, params: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    defaults = {name: one.default for name, one in inspect.signature(maker(spec)).parameters.items()}
    for name, plain in _OF_MODEL.items():
        if name == "rope_scaling_factor" and not settings.get("rope_scaling"):
            continue
        yield from _one(name, params.get(name, defaults.get(name, plain)), settings.get(name, plain))


def _one(name: str, own: object, expected: object, *, given: bool = True) -> Iterator[str]:
    if not given and name in ("num_attention_heads", "num_query_groups", "kv_channels"):
        return  # which Megatron derives
    if _comparable(own) != _comparable(expected):
        yield f"setting: {name} is {own!r} in the model, expected {expected!r}, as the checkpoint was made with"


def _comparable(value: object) -> object:
    if isinstance(value, partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    return tuple(value) if isinstance(value, list) else value
