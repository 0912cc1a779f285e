"""Self attention whose rotary angles of packed samples are told position by position.

Megatron 0.19 finds them by the boundaries of the samples, for which it waits in every layer; its fused kernel does not
wait, but lets every sample count from 0, whatever positions it has. Told for each position, angles need neither.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention, SelfAttention
from torch import Tensor, nn

from megatron_mimo.compat.megatron import turned_rows
from megatron_mimo.segments import SegmentedParams


class PackedSelfAttention(SelfAttention):
    """Megatron's self attention; packs that say what turns each position (`SegmentedParams.turn`) wait for no device.

    Without packs, and with boundaries alone, it is `SelfAttention`.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._angles: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        *more: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What `SelfAttention` gives, with its arguments.

        Args:
            rotary_pos_emb: float `[rows, 1, 1, d]`, of which `SegmentedParams.turn` picks.
        """
        turn = turned_by(packed_seq_params)
        attend = functools.partial(super().forward, hidden_states, attention_mask, key_value_states, inference_context)
        if turn is None or not isinstance(rotary_pos_emb, Tensor):
            return attend(rotary_pos_emb, *more, packed_seq_params=packed_seq_params, **named)
        if not (self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]):
            self._angles = rotary_pos_emb.index_select(0, turn)
        try:
            return attend(None, *more, packed_seq_params=packed_seq_params, **named)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *given: Any, **named: Any) -> Any:
        """Queries `[S / CP, 1, heads, d]`, keys and values, turned already where the pack says by what."""
        found = super().get_query_key_value_tensors(*given, **named)
        if self._angles is None:
            return found
        query, key, *rest = found
        return *(turned_rows(self, rows, self._angles) for rows in (query, key)), *rest


def turned_by(packed: PackedSeqParams | None) -> Tensor | None:
    """Which row of the rotary angles turns each position, int64 `[S / CP]`; None where Megatron finds it."""
    return packed.turn if isinstance(packed, SegmentedParams) else None


def turns_packs(stack: nn.Module) -> bool:
    """Whether all attention in a transformer stack takes the angles of packs position by position.

    Args:
        stack: the transformer layers of a pipeline stage.

    Example:
        >>> turns_packs(nn.Identity())
        True
    """
    return all(isinstance(each, PackedSelfAttention) for each in stack.modules() if isinstance(each, Attention))
