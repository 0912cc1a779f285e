"""Media, labels and packed sequences in buckets of fixed size, so that batches with other numbers of them run by one
CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_mimo.batch import Batch, Nested
from megatron_mimo.model import MimoModel
from megatron_mimo.rotary import asks_for_no_boundaries
from megatron_mimo.segments import SegmentedParams, on_device, reads_boundaries_there, with_empty
from megatron_mimo.training.speed import counts as names


def with_packs_alike(batch: Batch, sequences: int, model: MimoModel) -> Batch:
    """The batch, whose host knows nothing of where its packed sequences begin, where the model's attention needs not.

    Args:
        batch: tensors on the CPU.
        sequences: their number is a multiple of this, by empty ones.
        model: whose attention runs.
    """
    packed, language = batch.get("packed_seq_params"), model.language_model
    if type(packed) is not SegmentedParams or packed.max_seqlen_q is None or not asks_for_no_boundaries(language):
        return batch
    if not reads_boundaries_there(cast(nn.Module, language.decoder), packed, next(model.parameters()).device):
        return batch
    alike: Batch = {**batch, "packed_seq_params": on_device(packed, sequences)}
    placement = batch.get("placement")
    if placement is not None and placement.cu_seqlens is not None:
        alike["placement"] = replace(placement, cu_seqlens=with_empty(placement.cu_seqlens, sequences))
    return alike


def in_buckets(batch: Batch, buckets: Mapping[str, int], model: MimoModel) -> Batch:
    """The batch with copies of its last item behind its media, up to a bucket, which no position reads.

    Args:
        batch: tensors on the CPU.
        buckets: modality -> items are a multiple of this.
        model: makes the placement, where the batch brings none.

    Raises:
        ValueError: inputs that are not a number of items alike, or tokens that are no equal number of rows an item.
    """
    inputs: Nested = batch.get("modality_inputs") or {}
    padded, spare = dict(inputs), {}
    placement = names.placement_of(batch, model)
    for modality, size in buckets.items():
        for encoder, keywords in (inputs.get(modality) or {}).items():
            where = f"modality_inputs[{modality!r}][{encoder!r}]"
            items = {value.shape[0] for value in keywords.values() if isinstance(value, Tensor) and value.dim()}
            if len(items) != 1 or len(inputs[modality]) != 1:
                raise ValueError(
                    f"graphs: {where} cannot be padded to a bucket of {size}: expected one encoder, whose tensors have "
                    f"one leading dim of items, found {sorted(items)}. Leave the modality out of buckets."
                )
            (number,) = items
            tokens = int(placement.counts(modality).sum())
            if number == 0:
                continue
            if tokens % number:
                raise ValueError(
                    f"graphs: {modality} has {tokens} special tokens for {number} items, expected as many for each: "
                    "only such items are padded to a bucket. Leave the modality out of buckets."
                )
            more = -number % size
            spare[modality] = more * (tokens // number)
            padded[modality] = {encoder: {name: _longer(value, more, number) for name, value in keywords.items()}}
    if not any(spare.values()) or placement.host is None:
        return {**batch, "placement": placement}
    placement = replace(placement, host=replace(placement.host, spare=spare))
    return {**batch, "modality_inputs": padded, "placement": placement}


def with_label_rows(batch: Batch, multiple: int, model: MimoModel) -> Batch:
    """The batch, whose language loss reads a multiple of so many rows on each context-parallel rank.

    Args:
        batch: tensors on the CPU.
        multiple: rows that count in no loss are read besides.
        model: makes the placement, where the batch brings none.
    """
    placement = names.placement_of(batch, model)
    if placement.host is None:
        return batch
    return {**batch, "placement": replace(placement, host=replace(placement.host, label_rows=multiple))}


def _longer(value: Any, more: int, number: int) -> Any:
    """A tensor of items, or what the host says of each, with `more` copies of the last; anything else as it is."""
    if isinstance(value, Tensor) and value.dim():
        return torch.cat([value, value[-1:].expand(more, *value.shape[1:])])
    if isinstance(value, list | tuple) and len(value) == number:
        return type(value)([*value, *[value[-1]] * more])
    return value
