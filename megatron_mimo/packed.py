"""What the boundaries of packed sequences make of a row: positions that begin anew, and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def default_positions(input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Positions `[B, S]` int64 that count from 0, anew in each packed sequence.

    Args:
        input_ids: `[B, S]`.
        cu_seqlens: `[sequences + 1]` boundaries of packed sequences, B = 1.

    Example:
        >>> default_positions(torch.zeros(1, 5, dtype=torch.long), torch.tensor([0, 3, 5]))
        tensor([[0, 1, 2, 0, 1]])
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.to(positions), positions, right=True) - 1
        positions = positions - cu_seqlens.to(positions)[sequence]
    return positions.expand_as(input_ids)


def padding_of(
    packed_seq_params: PackedSeqParams | None,
    length: int,
    device: torch.device | str = "cpu",
    padding_mask: Tensor | None = None,
) -> Tensor | None:
    """Positions that hold nothing, bool `[1 or B, S]`, or None where there are none.

    Args:
        packed_seq_params: of the batch, whose sequences may have padding between them.
        length: `S`.
        device: where the answer is wanted.
        padding_mask: bool `[B, S]`, or None.
    """
    padded = boundaries_of(packed_seq_params)
    own = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
    if padded is None or own is None or own is padded:
        return padding_mask
    between = packed_padding(length, own, padded.to(device))
    return between if padding_mask is None else between | padding_mask


def packed_padding(length: int, cu_seqlens: Tensor, cu_seqlens_padded: Tensor) -> Tensor:
    """Which positions are padding between packed sequences, bool `[1, S]`.

    Args:
        length: `S`.
        cu_seqlens: int `[sequences + 1]`, boundaries of the sequences themselves.
        cu_seqlens_padded: int `[sequences + 1]`, where each starts in the packed sequence; on the wanted device.

    Raises:
        ValueError: boundaries of unequal number.

    Example:
        >>> packed_padding(6, torch.tensor([0, 2, 4]), torch.tensor([0, 3, 6])).long()
        tensor([[0, 0, 1, 0, 0, 1]])
    """
    if cu_seqlens.shape != cu_seqlens_padded.shape:
        raise ValueError(
            f"cu_seqlens_q has shape {list(cu_seqlens.shape)} but cu_seqlens_q_padded "
            f"{list(cu_seqlens_padded.shape)}: both need one boundary a packed sequence, and one more."
        )
    starts = cu_seqlens_padded.long()
    lengths = cu_seqlens.to(starts).diff()
    positions = torch.arange(length, device=starts.device)
    # Wrong boundaries are reported where the sequence is cut; until then they must not lead outside.
    sequence = (torch.searchsorted(starts, positions, right=True) - 1).clamp(0, len(lengths) - 1)
    return (positions - starts[sequence] >= lengths[sequence])[None]


def boundaries_of(packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """Padded boundaries `[sequences + 1]` of packed sequences, None where nothing is packed."""
    if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
        return None
    if packed_seq_params.cu_seqlens_q_padded is not None:
        return packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q
