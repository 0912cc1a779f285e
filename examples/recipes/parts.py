"""Configurations that the recipes' models are made of, from Megatron's arguments."""

from argparse import Namespace

import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_mimo import specs


def backend(args: Namespace) -> specs.Backend:
    """`--transformer-impl local` computes in plain torch; otherwise the fastest that is installed."""
    return "torch" if args.transformer_impl == "local" else "auto"


def language_spec(args: Namespace, pipeline_rank: int, vp_stage: int | None) -> ModuleSpec:
    """A `GPTModel` as Megatron's arguments describe it; the layers of one pipeline stage."""
    config = core_transformer_config_from_args(args)
    return ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config,
            transformer_layer_spec=specs.language_layer_spec(
                config, backend(args), vp_stage=vp_stage, pp_rank=pipeline_rank
            ),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            rotary_base=args.rotary_base,
            rotary_percent=args.rotary_percent,
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
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        activation_func=F.gelu,
        recompute_granularity=recompute,
        **full,
    )
