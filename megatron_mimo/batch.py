"""Everything about a batch that can be refused before the first collective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_mimo import deferred

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
    for name in ("labels", "loss_mask"):
        if name in given:
            _check_shape(name, given[name], given[name].shape == input_ids.shape, input_ids)
    if position_ids is not None:
        fits = position_ids.dim() in (2, 3) and position_ids.shape[-2:] == input_ids.shape
        _check_shape("position_ids", position_ids, fits, input_ids)
    if attention_mask is not None:
        _check_attention_mask(attention_mask, input_ids)


def check_modalities(name: str, given: Mapping[str, object] | None, known: Mapping) -> None:
    """Refuse `modality_inputs` or `modality_targets` for a modality that the model lacks.

    Raises:
        TypeError: not a mapping.
        ValueError: an unknown modality.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must map modality names, got {type(given).__name__}")
    for modality in given:
        if modality not in known:
            raise ValueError(f"{name} has modality {modality!r}, but the model's modalities are {sorted(known)}")


def _check_attention_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    if attention_mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be bool, True where a position is hidden, got {attention_mask.dtype}")
    batch_size, length = input_ids.shape
    if attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask must be [B or 1, heads or 1, S or 1, S], got {list(attention_mask.shape)}. From "
            "a [B, S] mask of tokens to keep, make ~keep[:, None, None, :] and join the causal mask."
        )
    samples, _, queries, keys = attention_mask.shape
    fits = samples in (1, batch_size) and queries in (1, length) and keys == length
    _check_shape("attention_mask", attention_mask, fits, input_ids)


def _check_shape(name: str, value: Tensor, fits: bool, input_ids: Tensor) -> None:
    if not fits:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, which does not fit input_ids {list(input_ids.shape)} ([B, S])"
        )


def packed_padding(
    input_ids: Tensor, cu_seqlens: Tensor, cu_seqlens_padded: Tensor, tokens: Mapping[str, int]
) -> Tensor:
    """Which positions are padding between packed sequences, bool `[1, S]`.

    Args:
        input_ids: `[1, S]`.
        cu_seqlens: `[sequences + 1]` boundaries of the sequences themselves.
        cu_seqlens_padded: `[sequences + 1]` where each starts in `input_ids`.
        tokens: what may not stand there, by what an error calls it: attention leaves padding out, so
            that nothing is read or written at it.

    Raises:
        ValueError: boundaries of unequal number; a token in padding, with its position, which on a
            device is reported at the latest one step later.

    Example:
        >>> ids = torch.zeros(1, 6, dtype=torch.long)
        >>> packed_padding(ids, torch.tensor([0, 2, 4]), torch.tensor([0, 3, 6]), {}).long()
        tensor([[0, 0, 1, 0, 0, 1]])
    """
    if cu_seqlens.shape != cu_seqlens_padded.shape:
        raise ValueError(
            f"cu_seqlens_q has shape {list(cu_seqlens.shape)} but cu_seqlens_q_padded "
            f"{list(cu_seqlens_padded.shape)}: both need one boundary a packed sequence, and one more."
        )
    starts = cu_seqlens_padded.to(input_ids.device, torch.int64)
    lengths = cu_seqlens.to(starts).diff()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    # Wrong boundaries are reported where the sequence is cut; until then they must not lead outside.
    sequence = (torch.searchsorted(starts, positions, right=True) - 1).clamp(0, len(lengths) - 1)
    padding = (positions - starts[sequence] >= lengths[sequence])[None]
    for what, token in tokens.items():
        found = torch.where(padding & (input_ids == token), positions, -1).amax()
        deferred.check(deferred.Arrival(found), lambda at, what=what: _check_padding(what, at), what)
    return padding


def _check_padding(what: str, position: Tensor) -> None:
    if position >= 0:
        raise ValueError(
            f"{what} at position {int(position)} stands in the padding of a packed sequence (between "
            "cu_seqlens_q and cu_seqlens_q_padded), where nothing is read or written. Pad with a text token."
        )


def default_loss_mask(labels: Tensor, padding: Tensor | None) -> Tensor:
    """Float `[B, S]`: 1 where a label is to be learned, 0 where it is negative or padding."""
    counts = labels >= 0
    return (counts if padding is None else counts & ~padding).float()


def check_labels(labels: Tensor, loss_mask: Tensor, vocabulary_size: int) -> None:
    """Refuses labels outside the vocabulary that count in the loss, which would be wrong without a word.

    Args:
        labels: `[B, S]`, global sequence.
        loss_mask: `[B, S]`; where it is 0, a label may be anything.
        vocabulary_size: V.

    Raises:
        ValueError: naming the sample and how many; on a device at the latest one step later.
    """
    outside = ((labels < 0) | (labels >= vocabulary_size)) & (loss_mask != 0)

    def verify(counts: Tensor) -> None:
        for sample, count in enumerate(counts.tolist()):
            if count:
                raise ValueError(
                    f"text: sample {sample} has {count} labels outside the vocabulary (0 to {vocabulary_size - 1}) "
                    "that count in the loss. Set loss_mask to 0 where nothing is to be learned."
                )

    deferred.check(deferred.Arrival(outside.sum(dim=1)), verify, "labels")


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
