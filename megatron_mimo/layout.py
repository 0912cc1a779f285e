"""Layouts that cannot work, refused before any process group is built."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import cast

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo.check import check_whole_spans
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.language import check_interleaving
from megatron_mimo.launch import Layout
from megatron_mimo.sharding import sequence_multiple

# Sizes that a layout and the language model's configuration must agree on.
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def check_layout(layout: Layout, config: MimoModelConfig, sequence_length: int | None = None) -> None:
    """Refuses a model that cannot run on a layout; needs no rank and no process group.

    Args:
        layout: the size of every parallel axis.
        config: of the model, its language model's configuration included.
        sequence_length: `S` of the batches; None where it is not known yet.

    Raises:
        ValueError: naming the argument to change.
    """
    language = config.language_model.params["config"]
    if config.whole_spans:
        which = f"{sorted(config.whole_spans)} have"
        check_whole_spans(which, "whole_spans of the MimoModelConfig", None, layout.context_parallel_size)
    _check_sizes(layout, language)
    check_interleaving(language)
    _check_experts(layout, language)
    _check_attention(layout, config.language_model)
    if layout.pipeline_model_parallel_size > 1:
        _check_stages(layout, config, language)
    for modality in config.modality_submodules:
        encoders = config.submodule_specs(modality).get("encoders") or {}
        _check_encoders(modality, cast(Mapping[str, object], encoders))
    if sequence_length is not None:
        check_sequence_length(sequence_length, layout, language)


def check_sequence_length(length: int, layout: Layout, language: TransformerConfig) -> None:
    """Refuses a sequence that cannot be shared out.

    Raises:
        ValueError: naming the length and the sizes.
    """
    context, tensor = layout.context_parallel_size, layout.tensor_model_parallel_size
    slices = tensor if language.sequence_parallel else 1
    multiple = sequence_multiple(context_parallel=context, sequence_parallel=slices)
    if length % multiple:
        raise ValueError(
            f"expected a sequence length that is a multiple of {multiple} (context_parallel_size {context}, "
            f"tensor_model_parallel_size {tensor}, sequence_parallel={language.sequence_parallel}), found {length}. "
            "Pad the sequences (seq_length), or lower one of the two sizes."
        )


def _check_sizes(layout: Layout, language: TransformerConfig) -> None:
    for name in _SIZES:
        ours, theirs = getattr(layout, name), getattr(language, name)
        if ours != theirs:
            raise ValueError(
                f"{name}: the run has {ours}, the language model's TransformerConfig {theirs}. Give both the same."
            )


def _check_experts(layout: Layout, language: TransformerConfig) -> None:
    ranks, experts = layout.expert_model_parallel_size, language.num_moe_experts
    if ranks > 1 and (experts is None or experts % ranks):
        raise ValueError(
            f"expert_model_parallel_size {ranks} shares out the language model's experts, but its "
            f"num_moe_experts is {experts}. Set expert_model_parallel_size=1, or num_moe_experts to a "
            f"multiple of {ranks}."
        )


def _check_attention(layout: Layout, spec: ModuleSpec) -> None:
    if layout.context_parallel_size == 1:
        return
    if any(isinstance(node, type) and issubclass(node, DotProductAttention) for node in _nodes(_first_layers(spec))):
        raise ValueError(
            f"context_parallel_size {layout.context_parallel_size}: the language model's layers compute "
            "attention in plain torch (DotProductAttention), which sees only this rank's part of the "
            "sequence. Set context_parallel_size=1, or install TransformerEngine and build the layers "
            "with specs.language_layer_spec(config, 'transformer_engine')."
        )


def _check_stages(layout: Layout, config: MimoModelConfig, language: TransformerConfig) -> None:
    """Layers for every stage, and a last one that decoders can read from."""
    last = layout.pipeline_model_parallel_size - 1
    chunk = (layout.virtual_pipeline_model_parallel_size or 1) - 1
    try:
        layers = _layers_on(language, last, chunk if layout.virtual_pipeline_model_parallel_size else None)
    except AssertionError as error:
        raise ValueError(
            f"pipeline_model_parallel_size {layout.pipeline_model_parallel_size} and "
            f"virtual_pipeline_model_parallel_size {layout.virtual_pipeline_model_parallel_size} do not "
            f"share out the language model's {language.num_layers} layers: {error}. Change one of them, "
            "or num_layers, or set num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage."
        ) from None
    if layers == 0 and config.generation_token_ids:
        raise ValueError(
            "the last pipeline stage has no layer of the language model, so the decoders of "
            f"{sorted(config.generation_token_ids)} have no room there: they read the last layer's "
            "hidden states. Lower pipeline_model_parallel_size, or give the last stage a layer "
            "(num_layers_in_last_pipeline_stage, pipeline_model_parallel_layout, or "
            "account_for_loss_in_pipeline_split=False)."
        )


def _layers_on(language: TransformerConfig, stage: int, chunk: int | None) -> int:
    """Transformer layers of the language model on a pipeline stage's model chunk."""
    custom = language.pipeline_model_parallel_layout
    if custom is not None:
        return custom.layout[stage][chunk or 0].count(LayerType.decoder)
    return get_num_layers_to_build(language, vp_stage=chunk, pp_rank=stage)


def _check_encoders(modality: str, encoders: Mapping[str, object]) -> None:
    """An encoder lives whole on the first stage and sees whole items."""
    for name, spec in encoders.items():
        params = spec.params or {} if isinstance(spec, ModuleSpec) else {}
        for option, config in params.items():
            if not isinstance(config, TransformerConfig):
                continue
            for size in ("pipeline_model_parallel_size", "context_parallel_size"):
                if getattr(config, size) != 1:
                    raise ValueError(
                        f"encoder {name!r} of modality {modality!r}: {size} of its {option} is "
                        f"{getattr(config, size)}. Encoders run whole on the first pipeline stage: give "
                        f"the encoder a configuration of its own with {size}=1."
                    )


def _first_layers(spec: ModuleSpec) -> object:
    """Layers of the first stage, where they are given by a function; needs no process group."""
    layers = spec.params.get("transformer_layer_spec")
    if not isinstance(layers, (FunctionType, partial)):
        return layers
    # Functions of the user's own need not know of pipeline ranks.
    rank = {"pp_rank": 0} if "pp_rank" in inspect.signature(layers).parameters else {}
    return layers(spec.params["config"], vp_stage=0, **rank)


def _nodes(node: object) -> Iterator[object]:
    """Every leaf of a tree of specs."""
    children: Iterable[object]
    if isinstance(node, Mapping):
        children = node.values()
    elif isinstance(node, (list, tuple)):
        children = node
    elif is_dataclass(node) and not isinstance(node, type):
        children = (getattr(node, field.name) for field in fields(node))
    else:
        yield node
        return
    for child in children:
        yield from _nodes(child)
