"""The row movements on tensors without memory (`torch.device("meta")`): nothing moves, shapes are those of `reference`.

What a step takes is counted on such tensors (`training.footprint`). A kernel writes into what its caller made, so
there is nothing to do but to make what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mimo.kernels.reference import TextRows, given_gradient


def plan(
    input_ids_BS: Tensor,
    reading_ids: Sequence[int],
    generation_ids: Sequence[int],
    *,
    text_is_table: bool,
    vocabulary_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.plan`."""
    tokens = len(reading_ids) + len(generation_ids) + text_is_table
    source_BS = torch.empty_like(input_ids_BS, dtype=torch.int32)
    positions_TP = input_ids_BS.new_empty(tokens, input_ids_BS.numel(), dtype=torch.int32)
    return (
        source_BS,
        torch.empty_like(source_BS),
        positions_TP,
        input_ids_BS.new_empty(tokens + 1, input_ids_BS.shape[0]),
    )


def gather(
    out_LBH: Tensor,
    text: Tensor | None,
    tables: Sequence[Tensor | None],
    input_ids_BS: Tensor,
    source_BS: Tensor,
    row_BS: Tensor,
    held: Tensor | None,
    *,
    text_rows: TextRows,
    vocabulary_start: int = 0,
) -> None:
    """As `reference.gather`, into what is there."""


def table_gradients(
    gradients: Sequence[Tensor | None],
    grad_LBH: Tensor,
    positions_TP: Tensor,
    sequence_length: int,
    local_row: Tensor | None,
) -> None:
    """As `reference.table_gradients`, into what is there."""


def vocabulary_order(
    input_ids_BS: Tensor, source_BS: Tensor, held: Tensor | None, vocabulary_start: int, vocabulary_rows: int
) -> tuple[Tensor, Tensor]:
    """As `reference.vocabulary_order`, of as many rows as a rank has: which of them are text no shape says."""
    rows = input_ids_BS.shape[0] * (input_ids_BS.shape[1] if held is None else len(held))
    return input_ids_BS.new_empty(rows, dtype=torch.int64), input_ids_BS.new_empty(rows, dtype=torch.int64)


def vocabulary_gradient(gradient_VH: Tensor, grad_LBH: Tensor, order: tuple[Tensor, Tensor]) -> None:
    """As `reference.vocabulary_gradient`, into what is there."""


__all__ = ["gather", "given_gradient", "plan", "table_gradients", "vocabulary_gradient", "vocabulary_order"]
