"""Core attentions that Megatron does not have."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_mimo.cudnn import cudnn_folders

#: Torch's kernels in the order in which FusedAttention asks for them where cuDNN's are the fastest.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def cudnn_is_fastest() -> bool:
    """Whether cuDNN's attention is the fastest of torch's, as on GPUs from Hopper on, and the process has one cuDNN."""
    on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return on_hopper and len(cudnn_folders()) < 2


class FusedAttention(MegatronModule):
    """Torch's fused attention in place of Megatron's own, which without TransformerEngine keeps every score.

    A `core_attention` of Megatron's layers, built and called as these do; `specs.with_fused_attention` puts it there.
    On GPUs from Hopper on it is cuDNN's where that takes the inputs, elsewhere the one that torch chooses. It has no
    dropout, no softmax scale of its own and no mask but the causal one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.causal = attn_mask_type == AttnMaskType.causal
        self._cudnn_first = cudnn_is_fastest()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """`[S, B, heads, D]` each -> `[S, B, heads * D]`; there is no mask but the causal one.

        Raises:
            ValueError: packed sequences, which would see each other.
        """
        if packed_seq_params is not None:
            raise ValueError(
                "FusedAttention keeps no packed sequences apart, expected packed_seq_params=None. Take the layers of "
                "language_layer_spec as they are, or do not pack."
            )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with sdpa_kernel(CUDNN_FIRST, set_priority=True) if self._cudnn_first else nullcontext():
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return mixed.permute(2, 0, 1, 3).flatten(2)
