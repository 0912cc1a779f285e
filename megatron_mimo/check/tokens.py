"""Token tensors that do not belong together, and values in them that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mimo.deferred import Checks
from megatron_mimo.tally import verify_boundaries

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

_INTEGERS = (torch.int64, torch.int32)


def check_token_tensors(
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None,
) -> None:
    """Refuse token tensors that do not belong together.

    Args:
        input_ids: `[B, S]` int64 or int32, global sequence.
        position_ids: `[B, S]`, or `[k, B, S]` for rotary embeddings with k sections.
        attention_mask: bool `[B or 1, heads or 1, S or 1, S]`, True where a position is hidden.
        labels, loss_mask: `[B, S]`.

    Raises:
        TypeError: not a tensor, ids that are no integers, or an attention mask that is not bool.
        ValueError: an empty batch, or shapes that differ from `input_ids`'.
    """
    given = {"input_ids": input_ids}
    optional = {
        "position_ids": position_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "loss_mask": loss_mask,
    }
    given.update((name, value) for name, value in optional.items() if value is not None)
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if input_ids.dtype not in _INTEGERS:
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, S], got {list(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError(f"empty batch: input_ids has shape {list(input_ids.shape)}")
    if labels is not None and labels.dtype not in _INTEGERS:
        raise TypeError(f"expected labels of int64 or int32, found {labels.dtype}: they are token ids")
    for name in ("labels", "loss_mask"):
        if name in given:
            _check_shape(name, given[name], given[name].shape == input_ids.shape, input_ids.shape)
    if position_ids is not None:
        fits = position_ids.dim() in (2, 3) and position_ids.shape[-2:] == input_ids.shape
        _check_shape("position_ids", position_ids, fits, input_ids.shape)
    if attention_mask is not None:
        _check_attention_mask(attention_mask, input_ids)


def _check_attention_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    if attention_mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be bool, True where a position is hidden, got {attention_mask.dtype}")
    batch_size, length = input_ids.shape
    if attention_mask.dim() == 2 and attention_mask.shape == (length, length) != (batch_size, length):
        return
    if attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask must be [B or 1, heads or 1, S or 1, S], got {list(attention_mask.shape)}. From "
            "a [B, S] mask of tokens to keep, make ~keep[:, None, None, :] and join the causal mask."
        )
    samples, _, queries, keys = attention_mask.shape
    fits = samples in (1, batch_size) and queries in (1, length) and keys == length
    _check_shape("attention_mask", attention_mask, fits, input_ids.shape)


def _check_shape(name: str, value: Tensor, fits: bool, shape: torch.Size) -> None:
    if not fits:
        raise ValueError(f"{name} has shape {list(value.shape)}, which does not fit input_ids {list(shape)} ([B, S])")


def check_loss_mask(loss_mask: Tensor, checks: Checks) -> None:
    """Refuses a mask that weighs losses with a negative number, infinity or NaN.

    Args:
        loss_mask: `[B, S]`, any dtype.
        checks: who owns the check of a device's values.

    Raises:
        ValueError: naming the sample; on a device at the latest one step later.
    """

    def bad() -> Tensor:
        if loss_mask.is_floating_point():
            return (~((loss_mask >= 0) & loss_mask.isfinite())).sum(dim=1)
        return ((loss_mask < 0) if loss_mask.dtype != torch.bool else torch.zeros_like(loss_mask)).sum(dim=1)

    def verify(counts: Tensor) -> None:
        for sample, count in enumerate(counts.tolist()):
            if count:
                raise ValueError(
                    f"text: sample {sample} has {count} weights in loss_mask that are negative, infinite or NaN, "
                    "expected finite ones of at least 0. Give what is not learned 0."
                )

    checks.look(bad, verify, "loss mask")


def check_padding_mask(padding_mask: Tensor, input_ids: Tensor) -> None:
    """Refuses a padding mask that is not bool `[B, S]`.

    Raises:
        TypeError: not a tensor, or not bool.
        ValueError: another shape.
    """
    if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
        found = padding_mask.dtype if isinstance(padding_mask, Tensor) else type(padding_mask).__name__
        raise TypeError(f"padding_mask must be a bool tensor, True where a position is padding, found {found}")
    _check_shape("padding_mask", padding_mask, padding_mask.shape == input_ids.shape, input_ids.shape)


def check_packed(packed_seq_params: PackedSeqParams, length: int, checks: Checks) -> None:
    """Refuses boundaries of packed sequences that do not describe a sequence of this length.

    Args:
        packed_seq_params: of the batch.
        length: `S`.
        checks: who owns the check of a device's values.

    Raises:
        TypeError: something else than Megatron's PackedSeqParams.
        ValueError: naming the boundaries; on a device at the latest one step later.
    """
    # By name, because importing Megatron's class would make this module need Megatron.
    if not any(base.__name__ == "PackedSeqParams" for base in type(packed_seq_params).__mro__):
        raise TypeError(
            f"packed_seq_params must be megatron.core.packed_seq_params.PackedSeqParams, found "
            f"{type(packed_seq_params).__name__}"
        )
    own, padded = packed_seq_params.cu_seqlens_q, packed_seq_params.cu_seqlens_q_padded
    if packed_seq_params.qkv_format != "thd" or own is None:
        return
    if own.dim() != 1 or own.numel() < 2 or own.dtype not in _INTEGERS:
        raise ValueError(
            f"expected cu_seqlens_q of int32 [sequences + 1] with at least two boundaries, found {own.dtype} "
            f"{list(own.shape)}"
        )
    longest = packed_seq_params.max_seqlen_q
    if padded is None:

        def verify_own(bounds: Tensor) -> None:
            verify_boundaries("cu_seqlens_q", bounds.tolist(), length)
            _verify_longest(bounds.tolist(), longest)

        checks.look(lambda: own, verify_own, "own")
        return
    if padded.shape != own.shape:
        raise ValueError(
            f"cu_seqlens_q has shape {list(own.shape)} but cu_seqlens_q_padded {list(padded.shape)}: both need one "
            "boundary a packed sequence, and one more."
        )

    def verify(both: Tensor) -> None:
        inner, outer = both.tolist()
        verify_boundaries("cu_seqlens_q_padded", outer, length)
        verify_boundaries("cu_seqlens_q", inner, None)
        _verify_longest(inner, longest)
        for index in range(len(inner) - 1):
            own_length, room = inner[index + 1] - inner[index], outer[index + 1] - outer[index]
            if own_length > room:
                raise ValueError(
                    f"packed sequence {index} is {own_length} long (cu_seqlens_q) in a room of {room} "
                    "(cu_seqlens_q_padded), expected at most that."
                )

    checks.look(lambda: torch.stack([own.long(), padded.to(own.device).long()]), verify, "own and padded")


def _verify_longest(bounds: Sequence[int], longest: int | None) -> None:
    """Refuses a `max_seqlen_q` below a sequence's own length: kernels and rotary angles would leave its end out."""
    found = max((stop - start for start, stop in pairwise(bounds)), default=0)
    if longest is not None and found > longest:
        raise ValueError(
            f"max_seqlen_q is {longest}, but a packed sequence is {found} long (cu_seqlens_q). Give the longest one's "
            "length, padding included where it has some."
        )


def check_spans(packed_seq_params: PackedSeqParams, blind: str | None, context_parallel: int) -> None:
    """Refuses media spans that see the whole of themselves where attention would see them as text.

    Args:
        packed_seq_params: of the batch; those of `segments.segmented` may have spans.
        blind: the name of an attention that ignores them, or None.
        context_parallel: size of the context-parallel group.

    Raises:
        ValueError: naming the attention or the layout.
    """
    if getattr(packed_seq_params, "spans", None) is not None:
        check_whole_spans("packed_seq_params has", "whole=True of the Handling", blind, context_parallel)


def check_whole_spans(which: str, asked_by: str, blind: str | None, context_parallel: int) -> None:
    """Refuses media spans that see the whole of themselves where attention cannot show it to them.

    Args:
        which: how a message begins: who has such spans.
        asked_by: what to leave out for none.
        blind: the name of an attention that ignores them, or None.
        context_parallel: size of the context-parallel group.

    Raises:
        ValueError: naming the attention or the layout.
    """
    without = f"or leave out {asked_by}, and attention is causal everywhere."
    if context_parallel > 1:
        raise ValueError(
            f"{which} media spans that see the whole of themselves, expected none under context "
            f"parallelism: a span may lie on several ranks. Use context_parallel_size=1, {without}"
        )
    if blind is not None:
        raise ValueError(
            f"{which} media spans that see the whole of themselves, expected none in front of "
            f"{blind}, which ignores them. Build the layers with backend='torch' (--transformer-impl local), {without}"
        )


def check_counted(loss_mask: Tensor, told: int, checks: Checks) -> None:
    """Refuses a placement that counts fewer or more labels than the loss mask: a loss would be left out without a word.

    Args:
        loss_mask: `[B, S / CP]`, rank-local, on the device.
        told: how many labels the placement counts here.
        checks: who owns the check.

    Raises:
        ValueError: with both counts; on a device at the latest one step later.
    """

    def verify(masked: Tensor) -> None:
        if int(masked) != told:
            raise ValueError(
                f"loss_mask counts {int(masked)} labels, expected the {told} that the placement counts. Give "
                "placement.counting(loss_mask) of this very mask."
            )

    checks.look(lambda: loss_mask.count_nonzero(), verify, "counted labels")


def furthest_inside(padding: Tensor, positions: Tensor) -> Tensor:
    """The last of `positions` that lies in `padding`, -1 where none does."""
    positions = positions.long()
    inside = padding.flatten()[positions.clamp(min=0)] & (positions >= 0)
    return torch.where(inside, positions, -1).amax()


def refuse_padding(what: str, position: Tensor, length: int) -> None:
    """Raises `ValueError` for a token of a modality in padding.

    Args:
        what: modality and token, for the message.
        position: flat position `b * S + s` of one, -1 where there is none.
        length: `S`.
    """
    if position >= 0:
        sample, at = divmod(int(position), length)
        raise ValueError(
            f"{what} at position {at} of sample {sample} stands in padding (of padding_mask, or between cu_seqlens_q "
            "and cu_seqlens_q_padded), where nothing is read or written. Pad with a text token."
        )
