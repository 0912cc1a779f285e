"""Families: how a configuration's fields and a checkpoint's tensors read in Megatron's terms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.activations import quick_gelu
from torch.nn import functional as F

from megatron_mimo.hf.table import Table

#: What a field of a configuration means: the name of Megatron's setting for it; a function of (value, configuration)
#: that gives settings, or raises `Unmapped`; or None where the table alone reads it.
Field = str | Callable[[Any, Any], Mapping[str, object]] | None

#: Fields that change nothing that is computed here.
INERT = frozenset(
    {
        "transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype",
        "torch_dtype", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "id2label", "label2id",
        "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "name_or_path", "model_type",
        "initializer_range", "initializer_factor",
    }
)  # fmt: skip

ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


class Unmapped(Exception):
    """A value of a configuration's field that Megatron has nothing for; the message says what would do."""


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        model_type: as configurations name it.
        architecture: the class of transformers that export is for.
        fields: field of the configuration -> what it means.
        table: configuration -> the tensors of its checkpoint; of an encoder also with the layer whose states are taken.
        constants: Megatron's settings that every model of the family has.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Field]
    table: Callable[..., Table]
    constants: Mapping[str, object]


def settings_of(family: Family, config: Any) -> tuple[dict[str, object], list[str]]:
    """Megatron's settings for a configuration, and what in it they do not cover.

    Args:
        family: of the configuration.
        config: of transformers.

    Returns:
        The settings, and one line a field that changes the computation and is not mapped.
    """
    settings, problems = dict(family.constants), []
    defaults = type(config)()
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in family.fields:
            meaning = family.fields[name]
            try:
                if isinstance(meaning, str):
                    settings[meaning] = value
                elif meaning is not None:
                    settings |= meaning(value, config)
            except Unmapped as unmapped:
                problems.append(f"{family.model_type}: {name} = {value!r}: {unmapped}")
        elif name not in INERT and value != getattr(defaults, name):
            problems.append(f"{family.model_type}: {name} = {value!r}: not mapped")
    return settings, problems


def activation(value: str, config: Any) -> dict[str, object]:
    """Of a feed-forward layer."""
    if value not in ACTIVATIONS:
        raise Unmapped(f"expected one of {sorted(ACTIVATIONS)}")
    return {"activation_func": ACTIVATIONS[value]}


def silu(value: str, config: Any) -> dict[str, object]:
    """Of a gated feed-forward layer, whose fused kernels know SiLU by its function."""
    if value not in ("silu", "swish"):
        raise Unmapped("expected 'silu'")
    return {"activation_func": F.silu}


def only(*values: object) -> Callable[[Any, Any], Mapping[str, object]]:
    """A field of which Megatron has these values alone."""

    def check(value: object, config: Any) -> dict[str, object]:
        if value not in values:
            raise Unmapped(f"expected {' or '.join(map(repr, values))}")
        return {}

    return check


def rope(value: Mapping[str, Any], config: Any) -> dict[str, object]:
    """Rotary positions: plain ones, those of Llama 3, or interpolated ones."""
    kind = value.get("rope_type", "default")
    settings: dict[str, object] = {"rotary_base": value["rope_theta"]}
    if value.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unmapped("expected partial_rotary_factor 1")
    if kind == "linear":
        return settings | {"seq_len_interpolation_factor": float(value["factor"])}
    if kind == "llama3":
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        for name, number in fixed.items():
            if not math.isclose(value[name], number):
                raise Unmapped(f"Megatron's own {name} is {number:g}")
        return settings | {"rope_scaling": True, "rope_scaling_factor": float(value["factor"])}
    if kind != "default":
        raise Unmapped("expected rope_type 'default', 'llama3' or 'linear'")
    return settings


def window(value: int | None, config: Any) -> dict[str, object]:
    """A window of `value` positions, itself among them, in every layer."""
    return {} if value is None else {"window_size": (value - 1, 0)}


def layer_types(value: list[str], config: Any) -> dict[str, object]:
    """Which layers attend within `config.sliding_window` alone."""
    slides = [kind == "sliding_attention" for kind in value]
    if not any(slides):
        return {}
    if set(value) - {"sliding_attention", "full_attention"}:
        raise Unmapped("expected 'full_attention' and 'sliding_attention'")
    if config.sliding_window is None:
        raise Unmapped("expected a sliding_window beside 'sliding_attention'")
    # Megatron's list has 1 where a layer's attention is cut off.
    return {"window_size": (config.sliding_window - 1, 0), "window_attn_skip_freq": [int(one) for one in slides]}
