"""The row movements of alignment fused for the GPU; `reference` says what each function does.

One program moves one row: it reads the plan (a few bytes), then copies H elements from the place the plan names.
Every row is read once and written once. Several modalities are one launch: the tables' pointers are arguments and
the program branches on the position's source, a scalar. Programs are independent, nothing is added atomically, so
results do not depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mimo.compat import triton as direct
from megatron_mimo.kernels.reference import TextRows, given_gradient, needed

__all__ = ["gather", "given_gradient", "plan", "table_gradients", "vocabulary_gradient", "vocabulary_order"]

TABLES_PER_LAUNCH = 4
PLAN_BLOCK = 1024
ROW_BLOCK = 4096
PIECE = 64  # rows of one token that one program adds up; a hot token's pieces are added in a second pass


# Launching -------------------------------------------------------------------------------------------------------

_launchers: dict[tuple, Callable[..., None]] = {}  # by kernel, device, constants and the tensors' dtypes


def _launch(
    kernel,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, *tuple[Tensor | None, ...]],
    sizes: tuple[int, ...],
    constants: tuple,
    tables: tuple[Tensor, ...] = (),
) -> None:
    """`kernel[grid](*tensors, tables, *sizes, *constants)`, with Triton's binding done once a variant.

    At every launch Triton looks at every argument to find the variant to run, which costs the host more than the
    smallest batches cost the device. Our sizes are unspecialised 64-bit, so the variant follows from the constants,
    the tensors' dtypes, and whether their addresses are multiples of 16, which nearly all are: a launch with one that
    is not goes the long way.

    Args:
        kernel: its parameters are the tensors, the tuple of tables if any, the sizes, and the constants.
        constants: compile-time values, then the number of warps.
        tables: tensors that the kernel takes as one tuple.
    """
    device = tensors[0].get_device()
    described: list[object] = [kernel, device, constants]
    pointers: list[Any] = []
    addresses = 0
    for x in (*tensors, *tables):
        if x is None:
            described.append(None)
            pointers.append(None)
        else:
            described.append(x.dtype)
            pointers.append(pointer := x.data_ptr())
            addresses |= pointer
    key = tuple(described)
    launch = _launchers.get(key) if addresses & 15 == 0 else None
    if launch is None:
        given = (*tensors, tables) if tables else tensors
        compiled = kernel[grid](*given, *sizes, *constants[:-1], num_warps=constants[-1])
        if compiled is not None and addresses & 15 == 0 and direct.DIRECT:  # Triton's interpreter compiles nothing
            _launchers[key] = direct.launcher(compiled, device)
        return
    if tables:
        count = len(tensors)
        pointers[count:] = [tuple(pointers[count:])]
    launch(grid, *pointers, *sizes, *constants[:-1])


@cache
def _row_blocks(width: int) -> tuple[int, int, int]:
    """Elements a program moves at once, how many such blocks make a row, and the warps for it.

    Sixteen elements a thread: two 16-byte loads in flight for each of them in bfloat16. On an H100 fewer or more warps
    and smaller blocks were slower, by 1 to 9 %.
    """
    block = min(_power_of_two(width), ROW_BLOCK)
    return block, _divided(width, block), max(1, min(8, block // 512))


def _divided(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own function of the host costs as much as a launch."""
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


# Plan ------------------------------------------------------------------------------------------------------------


def plan(
    input_ids_BS: Tensor,
    reading_ids: Sequence[int],
    generation_ids: Sequence[int],
    *,
    text_is_table: bool,
    vocabulary_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.plan`, in two launches and without a host sync.

    The first counts each token in each block of positions; in the second every block adds up the counts before it
    and numbers its own tokens from there.
    """
    input_ids_BS = input_ids_BS.contiguous()
    batch_size, length = input_ids_BS.shape
    blocks = _divided(length, PLAN_BLOCK)
    reads, generates = len(reading_ids), len(generation_ids)
    lists = reads + text_is_table + generates
    new = input_ids_BS.new_empty
    source_BS, row_BS = (new(batch_size, length, dtype=torch.int32) for _ in range(2))
    positions_TP = new(lists, batch_size * length, dtype=torch.int32)
    counts_TB = new(lists + 1, batch_size, dtype=torch.int64)
    block_counts = new(lists + 1, batch_size * blocks, dtype=torch.int32)
    ids = (tuple(reading_ids), tuple(generation_ids), bool(text_is_table))
    grid = (blocks, batch_size, 1)
    vocabulary = 2**63 - 1 if vocabulary_size is None else vocabulary_size
    lowest = -(2**63) if vocabulary_size is None else 0
    _launch(_count_tokens, grid, (block_counts, input_ids_BS), (length, lowest, vocabulary), (*ids, PLAN_BLOCK, 4))
    _launch(
        _number_tokens,
        grid,
        (source_BS, row_BS, positions_TP, counts_TB, block_counts, input_ids_BS),
        (length,),
        (*ids, _power_of_two(batch_size * blocks), PLAN_BLOCK, 4),
    )
    return source_BS, row_BS, positions_TP, counts_TB


@triton.jit(do_not_specialize=["length", "lowest", "vocabulary"])
def _count_tokens(
    block_counts_ptr,
    ids_ptr,
    length: tl.int64,
    lowest: tl.int64,
    vocabulary: tl.int64,
    READ: tl.constexpr,
    GENERATE: tl.constexpr,
    TEXT_IS_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    blocks = tl.num_programs(0) * tl.num_programs(1)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = s < length
    ids = tl.load(ids_ptr + tl.program_id(1) * length + s, mask=inside, other=0).to(tl.int64)
    text = inside
    for t in tl.static_range(len(READ)):
        match = inside & (ids == READ[t])
        text = text & (ids != READ[t])
        tl.store(block_counts_ptr + t * blocks + block, tl.sum(match.to(tl.int32)))
    if TEXT_IS_TABLE:
        tl.store(block_counts_ptr + len(READ) * blocks + block, tl.sum(text.to(tl.int32)))
    lists = len(READ) + TEXT_IS_TABLE
    for t in tl.static_range(len(GENERATE)):
        match = inside & (ids == GENERATE[t])
        tl.store(block_counts_ptr + (lists + t) * blocks + block, tl.sum(match.to(tl.int32)))
    outside = text & ((ids < lowest) | (ids >= vocabulary))
    tl.store(block_counts_ptr + (lists + len(GENERATE)) * blocks + block, tl.sum(outside.to(tl.int32)))


@triton.jit(do_not_specialize=["length"])
def _number_tokens(
    source_ptr,
    row_ptr,
    positions_ptr,
    counts_ptr,
    block_counts_ptr,
    ids_ptr,
    length: tl.int64,
    READ: tl.constexpr,
    GENERATE: tl.constexpr,
    TEXT_IS_TABLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = s < length
    flat = tl.program_id(1) * length + s
    ids = tl.load(ids_ptr + flat, mask=inside, other=0).to(tl.int64)
    source = tl.full([BLOCK], -1, tl.int32)
    row = tl.zeros([BLOCK], tl.int32)
    text = inside
    for t in tl.static_range(len(READ)):
        match = inside & (ids == READ[t])
        text = text & (ids != READ[t])
        number = _number(match, flat, inside, positions_ptr, counts_ptr, block_counts_ptr, length, t, BLOCKS)
        source = tl.where(match, t, source)
        row = tl.where(match, number, row)
    if TEXT_IS_TABLE:
        number = _number(text, flat, inside, positions_ptr, counts_ptr, block_counts_ptr, length, len(READ), BLOCKS)
        source = tl.where(text, len(READ), source)
        row = tl.where(text, number, row)
    lists = len(READ) + TEXT_IS_TABLE
    for t in tl.static_range(len(GENERATE)):
        match = inside & (ids == GENERATE[t])
        _number(match, flat, inside, positions_ptr, counts_ptr, block_counts_ptr, length, lists + t, BLOCKS)
    tl.store(source_ptr + flat, source, mask=inside)
    tl.store(row_ptr + flat, row, mask=inside)
    _sum_counts(counts_ptr, block_counts_ptr, lists + len(GENERATE), BLOCKS)


@triton.jit
def _number(match, flat, inside, positions_ptr, counts_ptr, block_counts_ptr, length, t, BLOCKS: tl.constexpr):
    """The number of each matching position in the batch; lists it, and ends the list with -1."""
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    blocks = tl.num_programs(0) * tl.num_programs(1)
    every = tl.arange(0, BLOCKS)
    counts = tl.load(block_counts_ptr + t * blocks + every, mask=every < blocks, other=0)
    before = tl.sum(tl.where(every < block, counts, 0))
    number = before + tl.cumsum(match.to(tl.int32)) - 1
    list_ptr = positions_ptr + t * length * tl.num_programs(1)
    tl.store(list_ptr + number, flat.to(tl.int32), mask=match)
    tl.store(list_ptr + flat, -1, mask=inside & (flat >= tl.sum(counts)))
    _sum_counts(counts_ptr, block_counts_ptr, t, BLOCKS)
    return number


@triton.jit
def _sum_counts(counts_ptr, block_counts_ptr, t, BLOCKS: tl.constexpr):
    """The first block of each sample writes the sample's count of token `t`."""
    if tl.program_id(0) == 0:
        sample = tl.program_id(1)
        a_sample = tl.num_programs(0)
        every = tl.arange(0, BLOCKS)
        mine = (every >= sample * a_sample) & (every < (sample + 1) * a_sample)
        counts = tl.load(block_counts_ptr + t * a_sample * tl.num_programs(1) + every, mask=mine, other=0)
        tl.store(counts_ptr + t * tl.num_programs(1) + sample, tl.sum(counts).to(tl.int64))


# Forward ---------------------------------------------------------------------------------------------------------


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
    """As `reference.gather`; one launch for up to `TABLES_PER_LAUNCH` tables."""
    length, batch_size, hidden = out_LBH.shape
    if out_LBH.numel() == 0:
        return
    text_stride, vocabulary = 0, 0
    if text_rows == "given":
        text = needed(text, text_rows).contiguous()
    elif text_rows == "lookup":
        text = _unit_stride(needed(text, text_rows))
        text_stride, vocabulary = text.stride(0), text.shape[0]
    else:
        text = None
    block, blocks, warps = _row_blocks(hidden)
    sizes = (batch_size, input_ids_BS.shape[1], vocabulary_start, vocabulary)
    for first in range(0, max(len(tables), 1), TABLES_PER_LAUNCH):
        group = [None if x is None else _unit_stride(x) for x in tables[first : first + TABLES_PER_LAUNCH]]
        rows = [0 if x is None else x.shape[0] for x in group]
        rows += [0] * (TABLES_PER_LAUNCH - len(rows))
        strides = tuple([0 if x is None else x.stride(0) for x in group])
        # A launch takes no empty tuple and no empty tensor's null pointer; where N is 0 nothing is read.
        _launch(
            _gather_rows,
            (length * batch_size, blocks, 1),
            (out_LBH, text, input_ids_BS, source_BS, row_BS, held),
            (*sizes, *rows),
            (text_rows, text_stride, strides, first, hidden, block, warps),
            tables=tuple([x if n and x is not None else out_LBH for x, n in zip(group, rows, strict=False)])
            or (out_LBH,),
        )
        text, text_rows, text_stride = None, "keep", 0


def _unit_stride(x: Tensor) -> Tensor:
    """`x` with its columns side by side; copied only if they are not."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["batch_size", "length", "vocabulary_start", "vocabulary", "n0", "n1", "n2", "n3"])
def _gather_rows(
    out_ptr,
    text_ptr,
    ids_ptr,
    source_ptr,
    row_ptr,
    held_ptr,
    tables,
    batch_size: tl.int64,
    length: tl.int64,
    vocabulary_start: tl.int64,
    vocabulary: tl.int64,
    n0: tl.int64,
    n1: tl.int64,
    n2: tl.int64,
    n3: tl.int64,
    TEXT: tl.constexpr,
    TEXT_STRIDE: tl.constexpr,
    STRIDES: tl.constexpr,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    local = r // batch_size.to(tl.int32)
    sample = r - local * batch_size.to(tl.int32)
    s = local.to(tl.int64)
    if held_ptr is not None:
        s = tl.load(held_ptr + local)
    flat = sample * length + s
    # Loaded side by side: their latency is paid once.
    source = tl.load(source_ptr + flat)
    row = tl.load(row_ptr + flat).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < H
    out = out_ptr + r.to(tl.int64) * H + cols
    if TEXT == "lookup":
        token = tl.load(ids_ptr + flat).to(tl.int64) - vocabulary_start
        if source < 0:
            owned = (token >= 0) & (token < vocabulary)
            at = text_ptr + tl.where(owned, token, 0) * TEXT_STRIDE + cols
            tl.store(out, tl.load(at, mask=inside & owned, other=0.0).to(out_ptr.dtype.element_ty), mask=inside)
    if TEXT == "given":
        if source < 0:
            x = tl.load(text_ptr + r.to(tl.int64) * H + cols, mask=inside, other=0.0)
            tl.store(out, x.to(out_ptr.dtype.element_ty), mask=inside)
    sizes = (n0, n1, n2, n3)
    for k in tl.static_range(len(STRIDES)):
        if source == FIRST + k:
            last = sizes[k] - 1
            at = tables[k] + tl.maximum(tl.minimum(row, last), 0) * STRIDES[k] + cols
            x = tl.load(at, mask=inside & (last >= 0), other=0.0)
            tl.store(out, x.to(out_ptr.dtype.element_ty), mask=inside)
    if TEXT != "keep":
        # Tables of another launch, and text where there is none.
        if (source >= len(STRIDES)) | ((source < 0) & (TEXT == "zero")):
            tl.store(out, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=inside)


# Backward --------------------------------------------------------------------------------------------------------


def table_gradients(
    gradients: Sequence[Tensor | None],
    grad_LBH: Tensor,
    positions_TP: Tensor,
    sequence_length: int,
    local_row: Tensor | None,
) -> None:
    """As `reference.table_gradients`; one launch for up to `TABLES_PER_LAUNCH` tables."""
    batch_size, hidden = grad_LBH.shape[1:]
    block, blocks, warps = _row_blocks(hidden)
    wanted = [(index, x) for index, x in enumerate(gradients) if x is not None and x.numel() > 0]
    for first in range(0, len(wanted), TABLES_PER_LAUNCH):
        group = wanted[first : first + TABLES_PER_LAUNCH]
        rows = [x.shape[0] for _, x in group]
        _launch(
            _gather_gradients,
            (sum(rows), blocks, 1),
            (grad_LBH, positions_TP, local_row),
            (batch_size, sequence_length, *rows, *([0] * (TABLES_PER_LAUNCH - len(rows)))),
            (tuple([index for index, _ in group]), tuple([x.stride(0) for _, x in group]), hidden, block, warps),
            tables=tuple([x for _, x in group]),
        )


@triton.jit(do_not_specialize=["batch_size", "length", "n0", "n1", "n2", "n3"])
def _gather_gradients(
    grad_ptr,
    positions_ptr,
    local_row_ptr,
    gradients,
    batch_size: tl.int64,
    length: tl.int64,
    n0: tl.int64,
    n1: tl.int64,
    n2: tl.int64,
    n3: tl.int64,
    LISTS: tl.constexpr,
    STRIDES: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < H
    sizes = (n0, n1, n2, n3)
    row = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(len(STRIDES)):
        if (row >= 0) & (row < sizes[k]):
            listed = row < batch_size * length
            flat = tl.load(positions_ptr + LISTS[k] * batch_size * length + row, mask=listed, other=-1)
            sample = flat // length.to(tl.int32)
            local = flat - sample * length.to(tl.int32)
            if local_row_ptr is not None:
                local = tl.load(local_row_ptr + local, mask=flat >= 0, other=-1)
            held = (flat >= 0) & (local >= 0)
            at = grad_ptr + (local.to(tl.int64) * batch_size + sample) * H + cols
            x = tl.load(at, mask=inside & held, other=0.0)
            tl.store(gradients[k] + row * STRIDES[k] + cols, x.to(gradients[k].dtype.element_ty), mask=inside)
        row -= sizes[k]


def vocabulary_order(
    input_ids_BS: Tensor, source_BS: Tensor, held: Tensor | None, vocabulary_start: int, vocabulary_rows: int
) -> tuple[Tensor, Tensor]:
    """Local rows sorted by their token, for `vocabulary_gradient`.

    Returns:
        int32 [L * B], the shard's row of each local row's token in ascending order, `vocabulary_rows` for rows that
        are no text of this shard; int64 [L * B], the local rows in that order.
    """
    batch_size, length = input_ids_BS.shape
    count = batch_size * (length if held is None else held.shape[0])
    tokens = input_ids_BS.new_empty(count, dtype=torch.int32)
    _launch(
        _shard_rows,
        (_divided(count, PLAN_BLOCK), 1, 1),
        (tokens, input_ids_BS, source_BS, held),
        (count, batch_size, length, vocabulary_start, vocabulary_rows),
        (PLAN_BLOCK, 4),
    )
    return torch.sort(tokens, stable=True)


@triton.jit(do_not_specialize=["count", "batch_size", "length", "vocabulary_start", "vocabulary"])
def _shard_rows(
    tokens_ptr,
    ids_ptr,
    source_ptr,
    held_ptr,
    count: tl.int64,
    batch_size: tl.int64,
    length: tl.int64,
    vocabulary_start: tl.int64,
    vocabulary: tl.int64,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < count
    local = r // batch_size.to(tl.int32)
    s = local.to(tl.int64)
    if held_ptr is not None:
        s = tl.load(held_ptr + local, mask=inside, other=0)
    flat = (r - local * batch_size.to(tl.int32)) * length + s
    token = tl.load(ids_ptr + flat, mask=inside, other=0).to(tl.int64) - vocabulary_start
    text = tl.load(source_ptr + flat, mask=inside, other=0) < 0
    token = tl.where(text & (token >= 0) & (token < vocabulary), token, vocabulary)
    tl.store(tokens_ptr + r, token.to(tl.int32), mask=inside)


def vocabulary_gradient(gradient_VH: Tensor, grad_LBH: Tensor, order: tuple[Tensor, Tensor]) -> None:
    """As `reference.vocabulary_gradient`: sums in float32, rounds once, the same at every run.

    Equal tokens lie side by side in `order`, cut in pieces at every multiple of `PIECE`. A program adds up one piece;
    if that is all of its token it writes the result, otherwise a partial sum. A second pass adds the partial sums of
    the tokens that run over several pieces, so that a token that fills half the batch does not keep one program busy
    with all of it.
    """
    tokens, rows = order
    count, hidden = tokens.numel(), grad_LBH.shape[2]
    pieces = _divided(count, PIECE)
    block, blocks, warps = _row_blocks(hidden)
    wide = torch.float64 if grad_LBH.dtype == torch.float64 else torch.float32
    partial = grad_LBH.new_empty(2 * pieces, hidden, dtype=wide)
    sizes = (count, gradient_VH.shape[0])
    tensors = (gradient_VH, partial, tokens)
    constants = (gradient_VH.stride(0), hidden, PIECE)
    _launch(_add_pieces, (count, blocks, 1), (*tensors, rows, grad_LBH), sizes, (*constants, block, warps))
    _launch(_add_partial_sums, (pieces, _divided(hidden, 512), 1), tensors, sizes, (*constants, 512, 4))


@triton.jit(do_not_specialize=["count", "vocabulary"])
def _add_pieces(
    gradient_ptr,
    partial_ptr,
    tokens_ptr,
    rows_ptr,
    grad_ptr,
    count: tl.int64,
    vocabulary: tl.int64,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    token = tl.load(tokens_ptr + i)
    before = tl.load(tokens_ptr + i - 1, mask=i > 0, other=-1)
    opens = before != token
    if (token < vocabulary) & (opens | (i % PIECE == 0)):
        end = tl.minimum((i // PIECE + 1) * PIECE, count).to(tl.int32)
        ahead = i + tl.arange(0, PIECE)
        same = tl.load(tokens_ptr + ahead, mask=ahead < end, other=-1) == token
        stop = i + tl.sum(same.to(tl.int32))
        after = tl.load(tokens_ptr + stop, mask=stop < count, other=-1)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < H
        total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
        j = i
        while j < stop:
            at = grad_ptr + tl.load(rows_ptr + j) * H + cols
            total += tl.load(at, mask=inside, other=0.0).to(partial_ptr.dtype.element_ty)
            j += 1
        if opens & (after != token):
            at = gradient_ptr + token.to(tl.int64) * STRIDE + cols
            tl.store(at, total.to(gradient_ptr.dtype.element_ty), mask=inside)
        else:
            # Of one stretch of PIECE tokens only its first and its last piece can run over its edge.
            slot = 2 * (i // PIECE) + (i % PIECE != 0)
            tl.store(partial_ptr + slot.to(tl.int64) * H + cols, total, mask=inside)


@triton.jit(do_not_specialize=["count", "vocabulary"])
def _add_partial_sums(
    gradient_ptr,
    partial_ptr,
    tokens_ptr,
    count: tl.int64,
    vocabulary: tl.int64,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each stretch whose last token runs on into the next, and did not run into this one, adds up that token."""
    stretch = tl.program_id(0)
    next_ = (stretch + 1) * PIECE
    token = tl.load(tokens_ptr + next_ - 1, mask=next_ < count, other=-1)
    after = tl.load(tokens_ptr + next_, mask=next_ < count, other=-2)
    first = tl.load(tokens_ptr + stretch * PIECE)
    before = tl.load(tokens_ptr + stretch * PIECE - 1, mask=stretch > 0, other=-1)
    fills = first == token
    if (token == after) & (token < vocabulary) & ~(fills & (before == token)):
        end = stretch + 1
        while after == token:
            end += 1
            after = tl.load(tokens_ptr + end * PIECE, mask=end * PIECE < count, other=-2)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < H
        slot = 2 * stretch + (1 - fills.to(tl.int32))
        total = tl.load(partial_ptr + slot.to(tl.int64) * H + cols, mask=inside, other=0.0)
        later = stretch + 1
        while later < end:
            total += tl.load(partial_ptr + later.to(tl.int64) * 2 * H + cols, mask=inside, other=0.0)
            later += 1
        at = gradient_ptr + token.to(tl.int64) * STRIDE + cols
        tl.store(at, total.to(gradient_ptr.dtype.element_ty), mask=inside)
