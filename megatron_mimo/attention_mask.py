"""What an attention mask of the batch means to the language model's layers."""

from __future__ import annotations

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

_TRANSFORMER_ENGINE = "megatron.core.extensions.transformer_engine"


def joined_with_causal(attention_mask: Tensor, stack: nn.Module) -> Tensor:
    """The mask that the layers of `stack` are given for the mask of a batch.

    Megatron's layers take a mask in place of their causal one. A mask of keys alone (`[B or 1, 1, 1, S]`, padding)
    says nothing of the order, so that it joins the causal mask of causal layers; a mask of queries and keys is the
    whole of it and stays as it is.

    Args:
        attention_mask: bool `[B or 1, heads or 1, S or 1, S]` or `[S, S]`, True where a position is hidden.
        stack: the transformer stack of this stage.

    Returns:
        bool `[B or 1, heads or 1, S, S]`.

    Raises:
        ValueError: causal layers of TransformerEngine, which ignore a mask without a word.
    """
    kinds = {(type(layer.core_attention), layer.attn_mask_type) for layer in stack.modules() if _is_attention(layer)}
    causal = any(mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal) for _, mask_type in kinds)
    for core, mask_type in kinds:
        if core.__module__ == _TRANSFORMER_ENGINE and mask_type == AttnMaskType.causal:
            raise ValueError(
                f"attention_mask is given, but {core.__name__} with a causal mask type ignores it. Pack the sequences "
                "(packed_seq_params) in place of padding, build the layers with attn_mask_type=AttnMaskType.arbitrary, "
                "or pad behind the text, where a causal mask hides padding by itself, and leave the mask out."
            )
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[None, None]
    if not causal or attention_mask.shape[-2] != 1:
        return attention_mask
    length = attention_mask.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).triu(1)
    return attention_mask | later


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, Attention)
