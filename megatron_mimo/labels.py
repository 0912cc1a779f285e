"""Which labels the language model learns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mimo.config import MimoModelConfig

if TYPE_CHECKING:
    from megatron_mimo.modality.submodules import ModalitySubmodules


def default_loss_mask(
    input_ids: Tensor,
    labels: Tensor,
    padding: Tensor | None,
    config: MimoModelConfig,
    submodules: Mapping[str, ModalitySubmodules],
    reads: Collection[str],
) -> Tensor:
    """Float `[B, S]`: 1 where a label is learned as text.

    Learned is every label that is not negative, not padding and not the token of a modality, save for what opens a
    written span: the begin token where the configuration names one (it is text), else the first generation token of
    each media item, so that the model learns to begin. The generation tokens after it are the decoder's to predict,
    unless spans vary in length: there each of them says that the span goes on, and the end token that it ends.

    Args:
        input_ids, labels: `[B, S]` int64, global sequence; `labels[b, s]` is what follows `input_ids[b, s]`.
        padding: bool `[1, S]`, padding of packed sequences, or None.
        config: token ids.
        submodules: modality -> its `ModalitySubmodules` on the last pipeline stage.
        reads: modalities that this batch reads, for those whose special and generation token is one.
    """
    counts = labels >= 0
    if padding is not None:
        counts = counts & ~padding
    for modality, token in config.special_token_ids.items():
        if config.generation_token_ids.get(modality) != token or modality in reads:
            counts = counts & (labels != token)
    for modality, token in config.generation_token_ids.items():
        if config.special_token_ids.get(modality) == token and modality in reads:
            continue
        written = labels == token
        if submodules[modality].spans_vary:
            continue  # each generation token says that the span goes on
        if modality in config.begin_token_ids:
            counts = counts & ~written
        else:
            opened = _opened(input_ids, token, _rows_per_medium(submodules[modality]))
            counts = counts & (~written | opened)
    return counts.float()


def _opened(input_ids: Tensor, token: int, rows: int) -> Tensor:
    """Bool `[B, S]`: where the next position opens a media item of `rows` generation tokens (1: a run of them)."""
    writes = input_ids == token
    opens = writes.clone()
    opens[:, 1:] &= ~writes[:, :-1]
    if rows > 1:  # items may stand side by side; each sample holds whole ones, so that ranks in the batch tell
        rank = writes.flatten().cumsum(0).view_as(writes) - 1
        opens |= writes & (rank % rows == 0)
    return torch.cat([opens[:, 1:], ~writes[:, -1:]], dim=1)


def _rows_per_medium(submodule: ModalitySubmodules) -> int:
    """Generation tokens of one media item; 1 where decoders differ or do not say."""
    rows = {submodule.medium_of(name) for name in submodule.decoders}
    return rows.pop() if len(rows) == 1 else 1
