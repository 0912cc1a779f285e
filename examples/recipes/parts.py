"""Configurations that the recipes' models are made of, from Megatron's arguments."""

import copy
from argparse import Namespace
from functools import partial
from importlib.util import find_spec

import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mimo import specs

# Apex brings it. In half precision Megatron's attention in plain torch asks for it by default, and fails without.
SOFTMAX_KERNEL = find_spec("scaled_masked_softmax_cuda") is not None


class FusedAttention(MegatronModule):
    """Torch's fused attention in place of Megatron's own, which without TransformerEngine keeps every score."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, cp_comm_type, softmax_scale, pg_collection
    ) -> None:
        super().__init__(config)
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params) -> Tensor:
        """`[S, B, heads, D]` each -> `[S, B, heads * D]`; there is no mask but the causal one."""
        batch_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(*batch_first, is_causal=self.causal)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def with_fused_attention(layers: ModuleSpec) -> ModuleSpec:
    """Plain-torch layers, of `specs`, with torch's fused attention."""
    changed = copy.deepcopy(layers)
    for layer in changed.submodules.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = FusedAttention
    return changed


def backend(args: Namespace) -> specs.Backend:
    """`--transformer-impl local` computes in plain torch; otherwise the fastest that is installed."""
    return "torch" if args.transformer_impl == "local" else "auto"


def language_spec(args: Namespace) -> ModuleSpec:
    """A `GPTModel` as Megatron's arguments describe it."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    config.masked_softmax_fusion &= SOFTMAX_KERNEL
    return ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config,
            transformer_layer_spec=partial(specs.language_layer_spec, backend=backend(args)),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            rotary_base=args.rotary_base,
            rotary_percent=args.rotary_percent,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        ),
    )


def encoder_config(args: Namespace, **sizes: int) -> TransformerConfig:
    """A vision transformer's configuration in the run's precision, whole on the first pipeline stage."""
    recompute = args.encoder_recompute_granularity
    full = dict(recompute_method="uniform", recompute_num_layers=1) if recompute == "full" else {}
    return TransformerConfig(
        **sizes,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        params_dtype=args.params_dtype,
        bf16=args.bf16,
        fp16=args.fp16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=SOFTMAX_KERNEL,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        activation_func=F.gelu,
        recompute_granularity=recompute,
        **full,
    )
