"""Text and modality embeddings -> this rank's rows of the language model's input.

Every row is read once and written once, straight to where the language model reads it: sequence first, and only
the positions this rank holds. How the text rows come about depends on the layout:

- one tensor-parallel rank: looked up in the same pass;
- tensor parallelism: each rank looks up the tokens of its vocabulary shard, zeros elsewhere, and one all-reduce
  adds the partial rows up;
- with sequence parallelism the sum is reduce-scattered, a slice of the hidden size at a time, so that no rank
  ever holds the width of the model over the whole sequence;
- an embedding that does more than look up (positions, dropout, scaling) makes its own text rows.

Modality rows are the same on every tensor-parallel rank and are placed after the reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_mimo.compat.torch import run_forward_pre_hooks
from megatron_mimo.kernels import kernels_for
from megatron_mimo.lookup import check_token_types, known_vocabulary, plain_lookup
from megatron_mimo.placement import Placement, build_placement
from megatron_mimo.sharding import SequenceShard, sequence_shard
from megatron_mimo.tally import outside_vocabulary, verify_vocabulary


def align(
    language_embedding: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None,
    embeddings: Mapping[str, Tensor],
    placement: Placement,
    shard: SequenceShard,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """This rank's rows of the language model's input.

    Args:
        language_embedding: the language model's embedding; `LanguageModelEmbedding` or a module called alike.
        input_ids: int64 or int32 [B, S], global, the same on every tensor- and context-parallel rank.
        position_ids: int64 [B, S] or [k, B, S], global; read by an embedding with learned positions.
        embeddings: reading table -> [N, H], global, the same on every tensor-parallel rank. A table may be left
            out if the batch has none of its tokens.
        placement: of these `input_ids`, on their device.
        shard: the positions this rank holds.
        tp_group: the tensor-parallel group; None for one rank. Collectives over it: one all-reduce forward, or
            under sequence parallelism reduce-scatters forward and all-gathers backward.
        sequence_parallel: whether `shard` splits the sequence over `tp_group`.

    Returns:
        [S_local, B, H], rank-local, contiguous, dtype of the text rows. The gradient of `embeddings` is complete on
        every tensor-parallel rank; over context-parallel ranks it is this rank's share, as a weight's is. The
        gradient of the word embedding is the one the language model's own lookup would give.

    Raises:
        ValueError: if embeddings and special tokens differ in number, or if the arguments do not fit together.
            On the device the count is checked without waiting, see `Placement.check_rows`.
    """
    _check_layout(input_ids, placement, shard, tp_group, sequence_parallel)
    tables = in_order(embeddings, placement)
    _check_rows(tables, placement)
    return align_checked(language_embedding, input_ids, position_ids, tables, placement, shard, tp_group)


def align_checked(
    language_embedding: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None,
    tables: list[Tensor | None],
    placement: Placement,
    shard: SequenceShard,
    tp_group: ProcessGroup | None,
) -> Tensor:
    """What `align` gives, for `in_order(tables)`, a shard and counts of rows that the caller has checked."""
    input_ids = input_ids.contiguous()
    words = plain_lookup(language_embedding)
    vocabulary = (
        known_vocabulary(language_embedding, placement.vocabulary_size) if words is None else words.num_embeddings
    )
    if vocabulary is not None and (placement.vocabulary_size is None or placement.vocabulary_size > vocabulary):
        _check_vocabulary(input_ids, placement, vocabulary)
    if words is not None:
        # Calling the modules would have run these first: Megatron's DDP waits there for gathered parameters.
        run_forward_pre_hooks(language_embedding, (input_ids, position_ids))
        run_forward_pre_hooks(words, (input_ids,))
        group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        call = _Call(placement, shard, "lookup", words.vocab_start_index, group)
        return _Align.apply(call, input_ids, words.weight, *tables)
    check_token_types(language_embedding)
    text = _embed(language_embedding, input_ids, position_ids, placement, shard, tp_group, vocabulary)
    return _Align.apply(_Call(placement, shard, "given", 0, tp_group), input_ids, text, *tables)


def in_order(embeddings: Mapping[str, Tensor], placement: Placement) -> list[Tensor | None]:
    """The embeddings `[N, H]` as a list in the placement's order; None for a table left out.

    Raises:
        ValueError: if a table is not in the placement, or not of two dimensions.
    """
    for name in embeddings:
        if name not in placement.reading:
            raise ValueError(
                f"embeddings of {name!r} have no special token in this placement, which reads {list(placement.names)}."
            )
    tables = []
    for name in placement.names:
        table = embeddings.get(name)
        if table is not None and table.dim() != 2:
            raise ValueError(f"{name}: expected embeddings [N, H], found shape {list(table.shape)}.")
        tables.append(table)
    return tables


def align_by_token_positions(
    modality_embeddings: Mapping[str, Tensor], input_ids: Tensor, special_token_ids: Mapping[str, int]
) -> Tensor:
    """Embeddings at their tokens' positions, the whole sequence.

    Args:
        modality_embeddings: modality -> [N, H]; "text" holds one row for each position without a special token.
            Without "text" those positions are zero.
        input_ids: int64 or int32 [B, S].
        special_token_ids: modality -> token id.

    Returns:
        [S, B, H], contiguous, dtype of the text rows (of the first modality without text).

    Raises:
        ValueError: if nothing is given, a modality has no token id, or embeddings and tokens differ in number.

    Example:
        >>> text, image = torch.tensor([[1.0], [2.0]]), torch.tensor([[5.0]])
        >>> align_by_token_positions({"text": text, "images": image}, torch.tensor([[7, -200, 7]]), {"images": -200})
        tensor([[[1.]],
        <BLANKLINE>
                [[5.]],
        <BLANKLINE>
                [[2.]]])
    """
    if not modality_embeddings:
        raise ValueError("no embeddings to align: expected at least one modality in modality_embeddings.")
    text_table = "text" if "text" in modality_embeddings else None
    placement = build_placement(input_ids, special_token_ids, text_table=text_table)
    tables = in_order(modality_embeddings, placement)
    _check_rows(tables, placement)
    shard = sequence_shard(input_ids.shape[1], device=input_ids.device)
    reference = modality_embeddings.get("text", next(iter(modality_embeddings.values())))
    return _Align.apply(_Call(placement, shard, "zero", 0, None, reference.dtype), input_ids, None, *tables)


def _check_rows(tables: list[Tensor | None], placement: Placement) -> None:
    """Raises `ValueError` where tables and special tokens differ in number."""
    for name, table in zip(placement.names, tables, strict=True):
        placement.check_rows(name, 0 if table is None else table.shape[0])


def _check_layout(
    input_ids: Tensor,
    placement: Placement,
    shard: SequenceShard,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool,
) -> None:
    """Raises `ValueError` where ids, placement, shard and groups are not of one batch and layout."""
    if placement.source.shape != input_ids.shape or shard.sequence_length != input_ids.shape[1]:
        raise ValueError(
            f"input_ids is {list(input_ids.shape)}, but the placement was built for {list(placement.source.shape)} "
            f"and the shard for a sequence of {shard.sequence_length}. Build both from these input_ids."
        )
    if placement.device != input_ids.device:
        raise ValueError(
            f"input_ids is on {input_ids.device} and the placement on {placement.device}: move it with "
            "placement.to(device, non_blocking=True)."
        )
    size = tp_group.size() if sequence_parallel and tp_group is not None else 1
    if shard.tp_size != size:
        raise ValueError(
            f"the shard splits the sequence over {shard.tp_size} tensor-parallel ranks, but sequence parallelism "
            f"splits it over {size}."
        )


def _check_vocabulary(input_ids: Tensor, placement: Placement, num_embeddings: int) -> None:
    """Raises, deferred on the device, for a text id that the table lacks."""
    advice = "Declare those that are special tokens in special_token_ids, or mask them out of the batch."

    def verify(counts: Tensor) -> None:
        verify_vocabulary("token ids", counts.tolist(), num_embeddings, advice)

    def outside() -> Tensor:
        return ((placement.source < 0) & outside_vocabulary(input_ids, num_embeddings)).sum(1)

    placement.checks.look(outside, verify, "embedding table")


def _embed(
    language_embedding: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None,
    placement: Placement,
    shard: SequenceShard,
    tp_group: ProcessGroup | None,
    vocabulary: int | None,
) -> Tensor:
    """[S_local, B, H]: text rows as the language model's own embedding makes them, for this rank's positions.

    The rows at special positions are those of token 0 and are thrown away, with their gradient. Ids outside the
    vocabulary, if it is known, read its last row until their check reports them.
    """
    if position_ids is not None and position_ids.dim() == 3:
        position_ids = position_ids[0]
    text_ids = torch.where(placement.source < 0, input_ids, 0)
    if vocabulary is not None:
        text_ids = text_ids.clamp(0, vocabulary - 1)
    positions = None if position_ids is None else shard.cut(position_ids)
    text = language_embedding(input_ids=shard.cut(text_ids), position_ids=positions)
    if text.shape[0] != shard.length:
        text = scatter_to_sequence_parallel_region(text, group=tp_group)
    return text


class _Call(NamedTuple):
    """What one alignment needs beside its tensors.

    Attributes:
        text_rows: "lookup", "given" or "zero", as the kernels take it.
        vocabulary_start: first token id of this rank's vocabulary shard.
        group: the tensor-parallel group if it has several ranks, else None.
        dtype: of the result where there are no text rows to take it from.
    """

    placement: Placement
    shard: SequenceShard
    text_rows: str
    vocabulary_start: int
    group: ProcessGroup | None
    dtype: torch.dtype | None = None


class _Align(torch.autograd.Function):
    """Rows gathered to their places; backward, gradients gathered back to their rows."""

    @staticmethod
    def forward(ctx, call: _Call, input_ids_BS: Tensor, text: Tensor | None, *tables: Tensor | None) -> Tensor:
        placement, shard = call.placement, call.shard
        like = text if text is not None else next(table for table in tables if table is not None)
        hidden = like.shape[-1]
        for name, table in zip(placement.names, tables, strict=True):
            if table is not None and table.shape[1] != hidden:
                raise ValueError(
                    f"{name}: embeddings are {table.shape[1]} wide, the language model's text rows {hidden}. "
                    "Project them to the hidden size."
                )
        out_LBH = like.new_empty(shard.length, placement.batch_size, hidden, dtype=call.dtype)
        kernels = kernels_for(out_LBH.device)
        plan = (input_ids_BS, placement.source, placement.row)
        text_rows = call.text_rows
        if text_rows == "lookup" and call.group is not None:
            _reduced_lookup(out_LBH, like, plan, call)
            text_rows = "keep"
        start = call.vocabulary_start
        kernels.gather(out_LBH, text, tables, *plan, _held(shard), text_rows=text_rows, vocabulary_start=start)
        ctx.call = call
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in (text, *tables)]
        # Saved, not just kept, so that autograd notices a batch buffer overwritten before backward.
        ctx.save_for_backward(input_ids_BS)
        return out_LBH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LBH: Tensor):
        call, (input_ids_BS,) = ctx.call, ctx.saved_tensors
        placement, shard = call.placement, call.shard
        kernels = kernels_for(grad_LBH.device)
        wanted = ctx.needs_input_grad[2:]
        looked_up = call.text_rows == "lookup"
        grads = [
            None if not wants or (index == 0 and not looked_up) else grad_LBH.new_empty(like[0], dtype=like[1])
            for index, (wants, like) in enumerate(zip(wanted, ctx.like, strict=True))
        ]
        order, whole = None, shard.whole_cp
        if grads[0] is not None:
            grads[0].zero_()
            start, rows = call.vocabulary_start, grads[0].shape[0]
            order = kernels.vocabulary_order(input_ids_BS, placement.source, _held(whole), start, rows)
        if any(grad is not None for grad in grads):
            for columns in _slices(grad_LBH.shape[2], shard.tp_size):
                _gradients_of_columns(grads, grad_LBH, columns, order, call)
        if call.text_rows == "given" and wanted[0]:
            grads[0] = kernels.given_gradient(grad_LBH, placement.source, _held(shard))
        return None, None, *grads


def _gradients_of_columns(
    grads: list[Tensor | None], grad_LBH: Tensor, columns: slice, order: tuple[Tensor, Tensor] | None, call: _Call
) -> None:
    """Writes these columns of the gradients of text and tables from the gradient of all rows the group holds.

    Without sequence parallelism those are this rank's own. With it they are all-gathered, once for the vocabulary
    shard and the tables alike; a function of its own, so that one slice is freed before the next is gathered.
    """
    kernels, placement, whole = kernels_for(grad_LBH.device), call.placement, call.shard.whole_cp
    rows_LBh = grad_LBH[:, :, columns].contiguous()
    if call.shard.tp_size > 1:
        mine = rows_LBh
        rows_LBh = mine.new_empty(whole.length, *mine.shape[1:])
        torch.distributed.all_gather_into_tensor(rows_LBh, mine, group=call.group)
    parts = [None if grad is None else grad[:, columns] for grad in grads]
    local_row = None if whole.is_whole else whole.local_row
    kernels.table_gradients(parts[1:], rows_LBh, placement.positions, placement.sequence_length, local_row)
    if order is not None:
        kernels.vocabulary_gradient(parts[0], rows_LBh, order)


def _held(shard: SequenceShard) -> Tensor | None:
    """The shard's positions as the kernels take them: None spares them the look-up where it is the identity."""
    return None if shard.is_whole else shard.positions


def _reduced_lookup(out_LBH: Tensor, weight_VH: Tensor, plan: tuple[Tensor, ...], call: _Call) -> None:
    """Writes the text rows of a vocabulary spread over the tensor-parallel group; zeros at special positions.

    Each row has one owner and the others add zeros, so the sum is exact. Under sequence parallelism the hidden size
    is cut in as many slices as there are ranks: the whole sequence, one slice wide, is as much as one shard.
    """
    kernels, shard, start = kernels_for(out_LBH.device), call.shard, call.vocabulary_start
    if shard.tp_size == 1:
        kernels.gather(out_LBH, weight_VH, (), *plan, _held(shard), text_rows="lookup", vocabulary_start=start)
        torch.distributed.all_reduce(out_LBH, group=call.group)
        return
    for columns in _slices(out_LBH.shape[2], shard.tp_size):
        _reduced_columns(out_LBH, weight_VH, columns, plan, call)


def _reduced_columns(out_LBH: Tensor, weight_VH: Tensor, columns: slice, plan: tuple[Tensor, ...], call: _Call) -> None:
    """One slice of `_reduced_lookup`; a function of its own, so that one slice is freed before the next is made."""
    kernels, whole = kernels_for(out_LBH.device), call.shard.whole_cp
    part_VH = weight_VH[:, columns]
    partial = out_LBH.new_empty(whole.length, out_LBH.shape[1], part_VH.shape[1])
    start = call.vocabulary_start
    kernels.gather(partial, part_VH, (), *plan, _held(whole), text_rows="lookup", vocabulary_start=start)
    reduced = out_LBH.new_empty(call.shard.length, *partial.shape[1:])
    torch.distributed.reduce_scatter_tensor(reduced, partial, group=call.group)
    out_LBH[:, :, columns] = reduced


def _slices(width: int, count: int) -> list[slice]:
    """`width` cut in at most `count` slices that differ by at most one."""
    edges = [width * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]
