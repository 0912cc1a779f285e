"""Specs as JSON and back, for the classes that are listed here; nothing else is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo.hf.family import ACTIVATIONS
from megatron_mimo.hf.files import DTYPES

#: Name in a file -> where the class is.
CLASSES = {
    "HFCodec": "megatron_mimo.hf.codec",
    "HFEncoder": "megatron_mimo.hf.encoder",
    "HFImageCodec": "megatron_mimo.hf.image_codec",
    "Projector": "megatron_mimo.hf.llava",
    "VisionModalitySubmodules": "megatron_mimo.modality.kinds",
    "AudioModalitySubmodules": "megatron_mimo.modality.kinds",
    "RegressionDecoder": "megatron_mimo.decoders",
    "DiscreteDecoder": "megatron_mimo.decoders",
    "FlowDecoder": "megatron_mimo.decoders",
    "FlowTransformerDecoder": "megatron_mimo.decoders",
    "CodeInput": "megatron_mimo.decoders",
    "NoisedTargetInput": "megatron_mimo.decoders",
    "QueryInput": "megatron_mimo.decoders",
    "TargetInput": "megatron_mimo.decoders",
    "CodeTokenizer": "megatron_mimo.decoders",
    "LatentTokenizer": "megatron_mimo.decoders",
    "RectifiedFlow": "megatron_mimo.decoders",
    "MultimodalProjector": "megatron.core.models.vision.multimodal_projector",
    "MLPSubmodules": "megatron.core.transformer.mlp",
    "ColumnParallelLinear": "megatron.core.tensor_parallel",
    "RowParallelLinear": "megatron.core.tensor_parallel",
    "Linear": "torch.nn",
    "Flatten": "torch.nn",
    "Identity": "torch.nn",
    "LayerNorm": "torch.nn",
    "GELU": "torch.nn",
}
# Fields of a TransformerConfig that follow the run a model is loaded into.
_OF_RUN = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "context_parallel_size", "expert_model_parallel_size", "params_dtype", "bf16", "fp16", "pipeline_dtype",
}  # fmt: skip


class Undescribed(Exception):
    """A value that no file can hold; the message says which."""


def describe(value: Any) -> Any:
    """`value` as JSON.

    Raises:
        Undescribed: it holds what is not listed here.

    Example:
        >>> from torch import nn
        >>> describe(ModuleSpec(module=nn.Linear, params={"in_features": 2, "out_features": 3}))
        {'$spec': 'Linear', 'params': {'in_features': 2, 'out_features': 3}}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, TransformerConfig):
        return {"$config": _fields_of(value)}
    if isinstance(value, ModuleSpec):
        found = {"$spec": _name_of(value.module), "params": describe(value.params or {})}
        return found | ({"submodules": describe(value.submodules)} if value.submodules else {})
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and not key.startswith("$") for key in value):
            raise Undescribed(f"a mapping with the keys {sorted(map(str, value))}")
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [describe(item) for item in value] if isinstance(value, list) else {"$tuple": [*map(describe, value)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"$value": _name_of(type(value)), "fields": fields}
    for name, function in ACTIVATIONS.items():
        if value is function:
            return {"$activation": name}
    if isinstance(value, type):
        return {"$class": _name_of(value)}
    raise Undescribed(f"{type(value).__name__} {value!r}")


def restore(described: Any, of_run: Mapping[str, object]) -> Any:
    """What `describe` was given.

    Args:
        described: of a file.
        of_run: fields of `TransformerConfig` that this run sets.

    Raises:
        ValueError: it names a class that is not listed here.
    """
    if isinstance(described, list):
        return [restore(item, of_run) for item in described]
    if not isinstance(described, dict):
        return described
    if "$config" in described:
        return TransformerConfig(**(restore(described["$config"], of_run) | dict(of_run)))
    if "$dtype" in described:
        return _dtype(described["$dtype"])
    if "$spec" in described:
        parts = {key: restore(described[key], of_run) for key in ("params", "submodules") if key in described}
        return ModuleSpec(module=_class_of(described["$spec"]), **parts)
    if "$tuple" in described:
        return tuple(restore(item, of_run) for item in described["$tuple"])
    if "$value" in described:
        return _class_of(described["$value"])(**restore(described["fields"], of_run))
    if "$activation" in described:
        return ACTIVATIONS[described["$activation"]]
    if "$class" in described:
        return _class_of(described["$class"])
    return {key: restore(item, of_run) for key, item in described.items()}


def _dtype(name: str) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name not in known:
        raise ValueError(f"expected one of the dtypes {sorted(known)}, found {name!r}.")
    return known[name]


def _name_of(cls: Any) -> str:
    name = getattr(cls, "__name__", "")
    if name not in CLASSES or _class_of(name) is not cls:
        raise Undescribed(f"the class {getattr(cls, '__module__', '')}.{name}, which is none of {sorted(CLASSES)}")
    return name


def _class_of(name: str) -> Any:
    if name not in CLASSES:
        raise ValueError(
            f"expected one of the classes {sorted(CLASSES)}, found {name!r}. Give the configuration yourself: "
            "from_pretrained(directory, config=...)."
        )
    return getattr(import_module(CLASSES[name]), name)


def _fields_of(config: TransformerConfig) -> dict[str, Any]:
    """What a configuration was given, as far as it differs from one of the same shape; derived values come again."""
    plain = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1)
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        needed = field.name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels")
        if field.name in _OF_RUN or isinstance(value, Enum) or (value == getattr(plain, field.name) and not needed):
            continue
        if field.name in ("init_method", "output_layer_init_method", "embedding_init_method"):
            continue  # functions that follow from init_method_std
        found[field.name] = describe(value)
    return found
