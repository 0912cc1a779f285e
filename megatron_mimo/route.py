"""Hidden states + positions -> the rows that one modality's decoders read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mimo.sharding import SequenceShard

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def route(
    hidden: Tensor,
    positions: Tensor,
    shard: SequenceShard,
    groups: tuple[torch.distributed.ProcessGroup, ...] = (),
    context_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Rows of `hidden` at `positions`, all of them on every rank, with gradient.

    Each rank contributes the rows that it owns and zeros for the others; one all-reduce a group
    adds them up, which is exact because each row has one owner. Only the `N` rows travel.

    In the backward pass a row's gradient is first summed over `context_group`, whose ranks each
    decode a share of the rows, and then written to its owner. Tensor-parallel ranks decode the
    same rows and already hold the whole gradient.

    Args:
        hidden: `[S_local, B, H]`, rank-local rows of the language model after its final norm.
        positions: `[N]` int64, global flat positions `b * S + s`, each listed once.
        shard: which global positions this rank's rows are.
        groups: process groups whose ranks own different rows: tensor-parallel under sequence
            parallelism, and context-parallel.
        context_group: the context-parallel group, if its ranks decode different rows.

    Returns:
        `[N, H]` in the order of `positions`, dtype of `hidden`, equal on all ranks of `groups`.
    """
    _, batch_size, _ = hidden.shape
    index, owned = shard.local_index(positions, batch_size)
    return _Route.apply(hidden, index, owned, groups, context_group)


def row_groups(
    groups: ProcessGroupCollection, sequence_parallel: bool
) -> tuple[tuple[torch.distributed.ProcessGroup, ...], torch.distributed.ProcessGroup | None]:
    """Groups whose ranks own different rows, and the one whose ranks decode different rows, None for one rank.

    Args:
        groups: of the language model, of which `tp` and `cp` are used.
        sequence_parallel: whether tensor-parallel ranks own different rows.
    """
    context_group = groups.cp if groups.cp.size() > 1 else None
    tensor_group = groups.tp if sequence_parallel and groups.tp.size() > 1 else None
    return tuple(group for group in (tensor_group, context_group) if group is not None), context_group


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SBH, index_N, owned_N, groups, context_group):
        local_rows = hidden_SBH.flatten(0, 1)
        rows_NH = local_rows.index_select(0, index_N)
        if groups:
            rows_NH = rows_NH.masked_fill_(~owned_N.unsqueeze(1), 0)
        for group in groups:
            torch.distributed.all_reduce(rows_NH, group=group)
        ctx.save_for_backward(index_N, owned_N)
        ctx.hidden_shape = hidden_SBH.shape
        ctx.context_group = context_group
        return rows_NH

    @staticmethod
    def backward(ctx, grad_NH):
        index_N, owned_N = ctx.saved_tensors
        if ctx.context_group is not None:
            grad_NH = _sum_over(grad_NH, ctx.context_group)
        grad_NH = grad_NH.masked_fill(~owned_N.unsqueeze(1), 0)
        grad_hidden = grad_NH.new_zeros(ctx.hidden_shape)
        # index_add_, not index_copy_: rows of other ranks all point at row 0, with zero gradient.
        grad_hidden.flatten(0, 1).index_add_(0, index_N, grad_NH)
        return grad_hidden, None, None, None, None


def _sum_over(grad: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    total = grad.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total
