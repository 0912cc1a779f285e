"""What a batch is made of: the keywords of `MimoModel.forward`, typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Required, TypedDict

from torch import Tensor

from megatron_mimo.moved import names_of
from megatron_mimo.placement import Placement

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

#: Modality -> encoder or decoder -> its keywords.
Nested = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
#: Modality -> keywords of its generation input.
Shown = Mapping[str, Mapping[str, Tensor]]


class Batch(TypedDict, total=False):
    """A microbatch of one data-parallel rank: keyword arguments of `MimoModel.forward`.

    A reader of batches gives tensors on the CPU; the forward step moves them.

    Attributes:
        input_ids: `[B, S]` int64, the whole sequence; so are the next four.
        position_ids: `[B, S]`.
        attention_mask: bool, True where a position is hidden.
        labels: `[B, S]` int64, the id that each position shall predict.
        loss_mask: `[B, S]`, weight of each label.
        modality_inputs: modality -> encoder -> its keyword inputs.
        modality_targets: modality -> decoder -> its keyword targets.
        packed_seq_params: boundaries of packed sequences, B = 1.
        placement: `MimoModel.place(input_ids)` made ahead.
        generation_inputs: modality -> keyword inputs of its generation input, in place of its targets.
        padding_mask: bool `[B, S]`, True where a position holds nothing.
        sources: int64 `[B, S]`, which source of a blend a position is of; kept by the forward step of a
            loop, which the model does not take.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> batch: Batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    """

    input_ids: Required[Tensor]
    position_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor | None
    loss_mask: Tensor | None
    modality_inputs: Nested | None
    modality_targets: Nested | None
    packed_seq_params: PackedSeqParams | None
    placement: Placement | None
    generation_inputs: Shown | None
    padding_mask: Tensor | None
    sources: Tensor | None


__getattr__ = names_of(__name__)
