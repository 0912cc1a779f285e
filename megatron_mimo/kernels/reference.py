"""The row movements of alignment in plain torch: what runs on the CPU, and what the fused kernels are held to.

Names: B batch, S sequence (global), L = S_local rows of this rank a sample, H hidden, V vocabulary rows of this
rank, N rows of one table, T tables and generation tokens. All tensors are rank-local except [B, S] ones.

`source`, `row`, `positions` are those of `Placement`; `held` is `SequenceShard.positions`, or None where the rank
holds the whole sequence in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TextRows = Literal["lookup", "given", "zero", "keep"]


def plan(
    input_ids_BS: Tensor,
    reading_ids: Sequence[int],
    generation_ids: Sequence[int],
    *,
    text_is_table: bool,
    vocabulary_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids -> which row fills each position, and where each token stands.

    Args:
        input_ids_BS: int64 or int32 [B, S].
        reading_ids: the token of each reading table.
        generation_ids: the token of each modality that generates.
        text_is_table: whether the positions without a reading token make one more table, the last.
        vocabulary_size: count the text ids outside [0, vocabulary_size); None counts none.

    Returns:
        `source` int32 [B, S], `row` int32 [B, S], `positions` int32 [T, B * S] and `counts` int64 [T + 1, B], as
        `Placement` describes them.
    """
    source_BS = torch.full(input_ids_BS.shape, -1, dtype=torch.int32, device=input_ids_BS.device)
    row_BS = torch.zeros_like(source_BS)
    found = {token_id: input_ids_BS == token_id for token_id in (*reading_ids, *generation_ids)}
    tokens = [found[token_id] for token_id in reading_ids]
    text_BS = torch.ones_like(source_BS, dtype=torch.bool)
    for read_BS in tokens:
        text_BS &= ~read_BS
    if text_is_table:
        tokens.append(text_BS)
    tables = len(tokens)
    tokens += [found[token_id] for token_id in generation_ids]
    positions_TP = input_ids_BS.new_full((len(tokens), input_ids_BS.numel()), -1, dtype=torch.int32)
    for index, token_BS in enumerate(tokens):
        flat_N = token_BS.flatten().nonzero().squeeze(1)
        positions_TP[index, : flat_N.numel()] = flat_N
        if index < tables:
            source_BS.view(-1)[flat_N] = index
            row_BS.view(-1)[flat_N] = torch.arange(flat_N.numel(), dtype=torch.int32, device=flat_N.device)
    outside_BS = torch.zeros_like(text_BS)
    if vocabulary_size is not None:
        outside_BS = text_BS & ((input_ids_BS < 0) | (input_ids_BS >= vocabulary_size))
    counts = torch.stack([token_BS.sum(1) for token_BS in (*tokens, outside_BS)])
    return source_BS, row_BS, positions_TP, counts


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
    """Writes every row of `out_LBH` from the place the plan names, converted to its dtype.

    Args:
        out_LBH: [L, B, H], contiguous; overwritten.
        text: for "lookup" the rank's vocabulary shard [V, H]; for "given" text rows [L, B, H]; else None.
        tables: one [N, H] for each reading table, None for one without rows; or no tables at all: their positions are
            then written zero (kept, for "keep").
        input_ids_BS, source_BS, row_BS, held: the plan and this rank's positions.
        text_rows: "lookup" writes row `id - vocabulary_start` of `text`, zero if another rank has it; "given" copies
            `text`; "zero" writes zeros; "keep" leaves text rows as they are.
        vocabulary_start: the first token id of the shard.

    Rows beyond a table's end read its last row (zero, if it has none), until the plan's check reports.
    """
    out_RH = out_LBH.view(-1, out_LBH.shape[2])
    source_R = _local(source_BS, held)
    text_R = source_R < 0
    if text_rows == "lookup":
        ids_R = _local(input_ids_BS, held) - vocabulary_start
        words_VH = needed(text, text_rows)
        owned_R = text_R & (ids_R >= 0) & (ids_R < words_VH.shape[0])
        # One pass over all rows; the table rows are overwritten below.
        torch.index_select(words_VH.to(out_RH.dtype), 0, torch.where(owned_R, ids_R, 0), out=out_RH)
        _zero(out_RH, ~owned_R if not tables else text_R & ~owned_R)
    elif text_rows == "given":
        out_RH.copy_(needed(text, text_rows).reshape(out_RH.shape))
        if not tables:
            _zero(out_RH, ~text_R)
    elif text_rows == "zero":
        _zero(out_RH, text_R if tables else torch.ones_like(text_R))
    for table, table_NH in enumerate(tables):
        at_R = (source_R == table).nonzero().squeeze(1)
        if table_NH is None or table_NH.shape[0] == 0:
            out_RH[at_R] = 0
            continue
        row_R = _local(row_BS, held)[at_R].clamp_(max=table_NH.shape[0] - 1)
        table_NH = table_NH.to(out_RH.dtype)
        if at_R.numel() == table_NH.shape[0]:  # all of the table: each row goes straight to its place
            out_RH.index_copy_(0, torch.empty_like(at_R).index_copy_(0, row_R.long(), at_R), table_NH)
        else:
            out_RH.index_copy_(0, at_R, table_NH.index_select(0, row_R))


def needed(text: Tensor | None, text_rows: TextRows) -> Tensor:
    """`text`, which `gather` cannot do without for these `text_rows`.

    Raises:
        ValueError: there is none.
    """
    if text is None:
        raise ValueError(f"gather: expected `text` for text_rows={text_rows!r}, found None. Give it, or 'zero'.")
    return text


def table_gradients(
    gradients: Sequence[Tensor | None],
    grad_LBH: Tensor,
    positions_TP: Tensor,
    sequence_length: int,
    local_row: Tensor | None,
) -> None:
    """Writes each table row's gradient from its position, zero where another rank holds the position.

    Args:
        gradients: for each table [N, H] with unit stride along H, overwritten; None where none is wanted.
        grad_LBH: [L, B, H], contiguous, gradient of the aligned rows.
        positions_TP: the plan's; the tables come first.
        sequence_length: S.
        local_row: int32 [S], `SequenceShard.local_row`; None where the rank holds the whole sequence.
    """
    batch_size = grad_LBH.shape[1]
    grad_RH = grad_LBH.view(-1, grad_LBH.shape[2])
    for index, gradient_NH in enumerate(gradients):
        if gradient_NH is None:
            continue
        at_N = positions_TP[index, : gradient_NH.shape[0]].long()
        held_N = at_N >= 0
        at_N = at_N.clamp(min=0)
        sample_N = at_N.div(sequence_length, rounding_mode="floor")
        place_N = at_N - sample_N * sequence_length
        if local_row is not None:
            place_N = local_row[place_N].long()
            held_N = held_N & (place_N >= 0)
        found = at_N.numel()
        gradient_NH[:found] = grad_RH.index_select(0, (place_N * batch_size + sample_N) * held_N)
        _zero(gradient_NH[:found], ~held_N)
        gradient_NH[found:] = 0  # more rows than positions: the count check reports them


def given_gradient(grad_LBH: Tensor, source_BS: Tensor, held: Tensor | None) -> Tensor:
    """[L, B, H]: the gradient of given text rows, zero where a table fills the position."""
    text_R = _local(source_BS, held) < 0
    return torch.where(text_R.view(*grad_LBH.shape[:2], 1), grad_LBH, 0)


def vocabulary_order(
    input_ids_BS: Tensor, source_BS: Tensor, held: Tensor | None, vocabulary_start: int, vocabulary_rows: int
) -> tuple[Tensor, Tensor]:
    """Which local rows belong to which row of the vocabulary shard; see `vocabulary_gradient`.

    Returns:
        int64 [n], the rows of the shard; int64 [n], the local rows (flattened [L * B]) whose text they are.
    """
    ids_R = _local(input_ids_BS, held).long() - vocabulary_start
    owned_R = (_local(source_BS, held) < 0) & (ids_R >= 0) & (ids_R < vocabulary_rows)
    at_R = owned_R.nonzero().squeeze(1)
    return ids_R[at_R], at_R


def vocabulary_gradient(gradient_VH: Tensor, grad_LBH: Tensor, order: tuple[Tensor, Tensor]) -> None:
    """Adds each text row's gradient to its token's row, as the embedding's own backward does.

    Args:
        gradient_VH: [V, H], unit stride along H, zero; rows without a token stay so.
        grad_LBH: [L, B, H], gradient of the aligned rows.
        order: from `vocabulary_order`.
    """
    ids_n, at_n = order
    rows_nH = grad_LBH.reshape(-1, grad_LBH.shape[2]).index_select(0, at_n)
    gradient_VH.copy_(torch.ops.aten.embedding_dense_backward(rows_nH, ids_n, gradient_VH.shape[0], -1, False))


def _local(x_BS: Tensor, held: Tensor | None) -> Tensor:
    """[L * B], sequence first: the plan at this rank's positions."""
    x_BL = x_BS if held is None else x_BS.index_select(1, held)
    return x_BL.t().reshape(-1)


def _zero(rows_RH: Tensor, mask_R: Tensor) -> None:
    """Writes zeros where the mask says, leaving the pass out where it says so nowhere."""
    if mask_R.any():
        rows_RH.masked_fill_(mask_R.unsqueeze(1), 0)
