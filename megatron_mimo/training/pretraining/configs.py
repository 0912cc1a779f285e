"""Configurations of a recipe's parts, from Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo import specs

# Apex brings it. In half precision Megatron's attention in plain torch asks for it by default, and fails without.
SOFTMAX_KERNEL = find_spec("scaled_masked_softmax_cuda") is not None


def backend_from_args(args: Namespace) -> specs.Backend:
    """`--transformer-impl local` computes in plain torch; otherwise the fastest that is installed.

    Args:
        args: Megatron's.

    Example:
        >>> backend_from_args(Namespace(transformer_impl="local"))
        'torch'
    """
    return "torch" if args.transformer_impl == "local" else "auto"


def language_spec_from_args(args: Namespace) -> ModuleSpec:
    """A `GPTModel` as Megatron's arguments describe it.

    Args:
        args: Megatron's.

    Example:
        >>> MimoModelConfig(language_spec_from_args(args), {"images": images})     # doctest: +SKIP
    """
    from megatron.training.argument_utils import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    config.masked_softmax_fusion &= SOFTMAX_KERNEL
    return ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config,
            transformer_layer_spec=partial(specs.language_layer_spec, backend=backend_from_args(args)),
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


def encoder_config_from_args(args: Namespace, **sizes: int) -> TransformerConfig:
    """A vision transformer's configuration in the run's precision, whole on the first pipeline stage.

    Args:
        args: Megatron's, with those of `add_mimo_args`.
        sizes: `TransformerConfig`'s `num_layers`, `hidden_size`, `num_attention_heads`, ...

    Example:
        >>> vision = encoder_config_from_args(                                    # doctest: +SKIP
        ...     args, num_layers=24, hidden_size=1024, num_attention_heads=16
        ... )
    """
    recompute = args.encoder_recompute_granularity
    full: dict[str, Any] = dict(recompute_method="uniform", recompute_num_layers=1) if recompute == "full" else {}
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
