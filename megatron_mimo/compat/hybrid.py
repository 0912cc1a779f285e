"""Megatron's `HybridStack` without TransformerEngine, which its final norm and its own layer spec name.

Checked by `tests/unit/test_compat.py` on the installed version; last read in Megatron-Core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn


def keeps_states(module: nn.Module) -> bool:
    """Whether a module is one of Megatron's state-space layers.

    Undocumented: that they live in `megatron.core.ssm`; its MLPLayer does too and keeps nothing.
    Reason: they mix positions by states of their own, which neither generation nor packs of ours know.
    When it goes: name the classes.
    """
    return type(module).__module__.startswith("megatron.core.ssm.") and not isinstance(module, MLPLayer)


#: Letter of a pattern -> the layer that a stack spec holds for it.
LAYERS = {"*": "attention_layer", "-": "mlp_layer", "E": "moe_layer"}


class StackWithNorm(HybridStack):
    """A stack of attention, MLP and MoE layers that ends in a norm of one's own.

    Undocumented: that a `HybridStack` built with ``post_layer_norm=False`` has no `final_norm`, and that its `forward`
    reads the attributes `post_layer_norm` and `final_norm`.
    Reason: `hybrid_block` names `TENorm` where every other module comes from the spec, and a layer that the spec lacks
    is built as an identity without a word.
    When it goes: Megatron takes the final norm from `HybridStackSubmodules`; put it there and use `HybridStack`.

    Args:
        config: the language model's configuration.
        submodules: of the layers in `LAYERS`.
        layer_type_list: a letter for each layer of this pipeline stage.
        norm: class of the final norm, built as ``norm(config=..., hidden_size=..., eps=...)``.
        post_layer_norm: whether the last stage has a final norm.
        options: what else `HybridModel` gives its stack.

    Raises:
        ValueError: a letter that has no layer here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        layer_type_list: list[str],
        norm: type,
        post_layer_norm: bool = True,
        **options: Any,
    ) -> None:
        built = {letter for letter, name in LAYERS.items() if getattr(submodules, name) is not IdentityOp}
        for letter in layer_type_list:
            if letter not in built:
                raise ValueError(
                    f"hybrid_layer_pattern: expected {sorted(built)}, found {letter!r}. 'E' needs num_moe_experts; "
                    "for state-space and latent-attention layers pass Megatron's own hybrid_stack_spec, which needs "
                    "TransformerEngine."
                )
        super().__init__(config, submodules, layer_type_list=layer_type_list, post_layer_norm=False, **options)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def stack_layers(config: TransformerConfig, transformer_engine: bool) -> HybridStackSubmodules:
    """The layers that a pattern's letters stand for: Megatron's GPT layers, their halves each a layer.

    Undocumented: which fields of `TransformerLayerSubmodules` belong to attention and which to the MLP.
    Reason: `hybrid_layer_specs` has TransformerEngine's layers alone, without normalised queries and keys, and eight
    experts in its MoE layer whatever the configuration says.
    When it goes: Megatron has a hybrid spec by backend and configuration; take that.

    Args:
        config: the language model's configuration.
        transformer_engine: whether the layers are TransformerEngine's; otherwise plain torch's.
    """
    dense = _layer(config, transformer_engine, None)
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=_attention_half(dense)),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp_half(dense)),
    )
    if config.num_moe_experts is not None:
        experts = _mlp_half(_layer(config, transformer_engine, config.num_moe_experts))
        layers.moe_layer = ModuleSpec(module=MoETransformerLayer, submodules=experts)
    return layers


def _layer(config: TransformerConfig, transformer_engine: bool, experts: int | None) -> TransformerLayerSubmodules:
    """Megatron's layer of attention and MLP, or of attention and experts."""
    options = {
        "num_experts": experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "qk_l2_norm": config.qk_l2_norm,
    }
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_submodules(**options)
    return get_gpt_layer_local_submodules(normalization=config.normalization, **options)


def _attention_half(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
        sharded_state_dict_keys_map=_keys(layer, "input_layernorm"),
    )


def _mlp_half(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=layer.mlp,
        mlp_bda=layer.mlp_bda,
        sharded_state_dict_keys_map=_keys(layer, "pre_mlp_layernorm", "mlp"),
    )


def _keys(layer: TransformerLayerSubmodules, *parts: str) -> dict[str, str]:
    """What a checkpoint calls the parameters of these parts of a layer."""
    return {name: key for name, key in layer.sharded_state_dict_keys_map.items() if name.split(".")[0] in parts}


def with_output_processor(model: Any, processor: Callable[..., Tensor], labels: Tensor, **call: Any) -> Tensor:
    """`model(labels=labels, output_processor=processor, **call)`, for a `HybridModel`, whose forward has no such hook.

    Undocumented: that `HybridModel.forward` without labels ends with `output_layer` called on the hidden states
    `[S_local, B, H]`; and its `_scale_logits`.
    Reason: output layer and loss run where a label counts alone, as `GPTModel` lets them.
    When it goes: Megatron gives `HybridModel.forward` an `output_processor`; pass it there.

    Args:
        model: on the last pipeline stage.
        processor: as `GPTModel.forward` calls it.
        labels: `[B, S / CP]`, rank-local.
        call: other arguments of `forward`.
    """
    kept: list[Tensor] = []

    def withhold(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if kept:
            return inputs  # the processor's own call
        hidden, *others = inputs
        kept.append(hidden)
        return hidden[:0], *others

    hook = model.output_layer.register_forward_pre_hook(withhold)
    parallel = model.output_layer.sequence_parallel
    model.output_layer.sequence_parallel = False  # no rows, none to gather
    try:
        model(labels=None, **call)
    finally:
        hook.remove()
        model.output_layer.sequence_parallel = parallel
    tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    return processor(
        hidden_states=kept[0],
        labels=labels,
        output_layer=model.output_layer,
        output_weight=tied,
        scale_logits=model._scale_logits,
        compute_language_model_loss=model.compute_language_model_loss,
    )
