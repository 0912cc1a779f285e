"""What a batch counts, told on the host before anything runs.

Every loss term is divided by its count over the whole step, which must be known at the step's first
backward pass. Masks and the shapes of targets say it; so do they say how many tokens and images went
through, which the throughput and FLOPs of the step are reckoned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mimo.batch import Batch, Nested
from megatron_mimo.check import with_data
from megatron_mimo.data.step import Counts
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.labels import default_loss_mask
from megatron_mimo.modality.submodules import ModalitySubmodules
from megatron_mimo.model import MimoModel
from megatron_mimo.packed import padding_of
from megatron_mimo.placement import Placement

# Kinds of counts, the first entry of a key; the others name what is counted.
LOSS, READ, WRITTEN, ITEMS = "loss", "rows read", "rows written", "media items"

Key = tuple[str, ...]
TOKENS: Key = ("tokens",)  # positions that the language loss looks at
POSITIONS: Key = ("positions",)
HELD: Key = ("positions held",)  # those that are not padding
SAMPLES: Key = ("samples",)  # sequences, of which a packed row has several


def term(name: str) -> Key:
    """Key of a loss term's count."""
    return LOSS, name


def rows_read(modality: str) -> Key:
    """Key of the count of a modality's special tokens."""
    return READ, modality


def rows_written(modality: str) -> Key:
    """Key of the count of a modality's generation tokens."""
    return WRITTEN, modality


def items(modality: str, encoder: str) -> Key:
    """Key of the count of media items that went through an encoder."""
    return ITEMS, modality, encoder


def submodules_of(model: MimoModel) -> dict[str, ModalitySubmodules]:
    """Modality -> its parts on this pipeline stage."""
    return cast(dict[str, ModalitySubmodules], dict(model.modality_submodules.items()))


def decoders_of(model: MimoModel) -> dict[str, tuple[str, Decoder]]:
    """Loss term -> (modality, decoder), for every decoder on this pipeline stage."""
    parts = submodules_of(model)
    return {
        f"{modality}/{name}": (modality, decoder)
        for modality in model.mimo_config.generation_token_ids
        for name, decoder in parts[modality].decoders.items()
    }


def placement_of(batch: Batch, model: MimoModel) -> Placement:
    """The placement that a batch brings, or else one made of its token ids."""
    placement = batch.get("placement")
    return placement or model.place(batch["input_ids"], batch.get("packed_seq_params")).bound()


def mask_of(batch: Batch, model: MimoModel) -> Tensor | None:
    """The loss mask `[B, S]` that a batch brings, or else the default one of its labels; None without labels.

    Args:
        batch: tensors on the CPU, the whole sequence.
        model: of the last pipeline stage, which knows how spans are written.
    """
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("loss_mask")
    if labels is None or mask is not None:
        return mask
    padding = padding_of(batch.get("packed_seq_params"), ids.shape[1], padding_mask=batch.get("padding_mask"))
    reads = with_data(batch.get("modality_inputs"))
    return default_loss_mask(ids, labels, padding, model.mimo_config, submodules_of(model), reads)


def count_batch(batch: Batch, model: MimoModel) -> Counts:
    """What one batch counts; the same keys in the same order for every batch.

    Args:
        batch: tensors on the CPU, the whole sequence. Rows read and written are looked up in its placement.
        model: of the last pipeline stage, whose decoders know what their losses count.

    Raises:
        ValueError: a batch without labels, which gives no language loss.
    """
    ids, mask = batch["input_ids"], mask_of(batch, model)
    if batch.get("labels") is None or mask is None:
        given = sorted(batch.keys() - {"placement"})  # which the reader of batches added
        raise ValueError(
            f"a training batch has no labels, found {given}. Give labels [B, S], the id that "
            "each position shall predict, and a loss_mask of zeros where nothing is to be learned."
        )
    padding = padding_of(batch.get("packed_seq_params"), ids.shape[1], padding_mask=batch.get("padding_mask"))
    counts: Counts = {
        term("text"): float(mask.sum()),
        TOKENS: float(mask.count_nonzero()),
        POSITIONS: float(ids.numel()),
        HELD: float(ids.numel() if padding is None else (~padding).expand_as(ids).sum()),
        SAMPLES: float(_sequences(ids, batch.get("packed_seq_params"))),
    }
    targets = batch.get("modality_targets") or {}
    for name, (modality, decoder) in decoders_of(model).items():
        target = (targets.get(modality) or {}).get(name.removeprefix(f"{modality}/"))
        counts[term(name)] = 0.0 if target is None else decoder.count(target)
    return counts | _traffic(placement_of(batch, model), batch.get("modality_inputs") or {}, model)


def _sequences(ids: Tensor, packed: PackedSeqParams | None) -> int:
    """Sequences that attend to themselves alone: rows of `[B, S]`, or what is packed in the one row."""
    if packed is None:
        return ids.shape[0]
    return int((packed.cu_seqlens_q.diff() > 0).sum())


def _traffic(placement: Placement, inputs: Nested, model: MimoModel) -> Counts:
    """Rows that each modality reads and writes, and media items through each encoder."""
    config = model.mimo_config
    counts: Counts = {rows_read(name): float(placement.counts(name).sum()) for name in config.special_token_ids}
    counts |= {rows_written(name): float(placement.generation_total(name)) for name in config.generation_token_ids}
    for modality in config.modality_submodules:
        given = inputs.get(modality) or {}
        for encoder in cast(Mapping, config.submodule_specs(modality).get("encoders") or {}):
            # Those that pad a bucket are no items of the batch.
            read = counts.get(rows_read(modality), 0.0)
            spare = placement.host.spare.get(modality, 0) if placement.host is not None else 0
            share = read / (read + spare) if spare else 1.0
            counts[items(modality, encoder)] = float(_items(given.get(encoder) or {})) * share
    return counts


def _items(keywords: Mapping[str, object]) -> int:
    """Leading dim of an encoder's first tensor."""
    tensors = (value for value in keywords.values() if isinstance(value, Tensor) and value.dim())
    return next((tensor.shape[0] for tensor in tensors), 0)
