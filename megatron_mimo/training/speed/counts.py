"""What a batch counts, told on the host before anything runs.

Every loss term is divided by its count over the whole step, which must be known at the step's first
backward pass. Masks and the shapes of targets say it; so do they say how many tokens and images went
through, which the throughput and FLOPs of the step are reckoned from.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mimo.data.step import Batch, Counts
from megatron_mimo.labels import default_loss_mask
from megatron_mimo.model import MimoModel
from megatron_mimo.plan import padding_of

TOKENS = "tokens"  # positions that the language loss looks at
POSITIONS = "positions"
SAMPLES = "samples"  # sequences, of which a packed row has several


def term(name: str) -> str:
    """Name of a loss term's count."""
    return f"loss {name}"


def rows_read(modality: str) -> str:
    """Name of the count of a modality's special tokens."""
    return f"rows read {modality}"


def rows_written(modality: str) -> str:
    """Name of the count of a modality's generation tokens."""
    return f"rows written {modality}"


def items(modality: str, encoder: str) -> str:
    """Name of the count of images, clips, ... that went through an encoder."""
    return f"items {modality}/{encoder}"


def decoders_of(model: MimoModel) -> dict[str, tuple[str, str]]:
    """Loss term -> (modality, decoder), for every decoder on this pipeline stage."""
    return {
        f"{modality}/{name}": (modality, name)
        for modality in model.mimo_config.generation_token_ids
        for name in model.modality_submodules[modality].decoders
    }


def count_batch(batch: Batch, model: MimoModel) -> Counts:
    """What one batch counts, by name; the same names in the same order for every batch.

    Args:
        batch: keyword arguments of `MimoModel.forward`, tensors on the CPU, the whole sequence.
        model: of the last pipeline stage, whose decoders know what their losses count.

    Raises:
        ValueError: a batch without labels, which gives no language loss.
    """
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("loss_mask")
    if labels is None:
        raise ValueError(
            f"a training batch has no labels, found {sorted(batch)}. Give labels [B, S], the id that "
            "each position shall predict, and a loss_mask of zeros where nothing is to be learned."
        )
    if mask is None:
        padding = padding_of(batch.get("packed_seq_params"), ids)
        reads = [modality for modality, given in (batch.get("modality_inputs") or {}).items() if given]
        mask = default_loss_mask(ids, labels, padding, model.mimo_config, model.modality_submodules, reads)
    counts = {
        term("text"): float(mask.sum()),
        TOKENS: float(mask.count_nonzero()),
        POSITIONS: float(ids.numel()),
        SAMPLES: float(_sequences(ids, batch.get("packed_seq_params"))),
    }
    targets = batch.get("modality_targets") or {}
    for name, (modality, decoder) in decoders_of(model).items():
        target = (targets.get(modality) or {}).get(decoder)
        takes = model.modality_submodules[modality].decoders[decoder]
        counts[term(name)] = 0.0 if target is None else takes.count(target)
    return counts | _traffic(ids, batch.get("modality_inputs") or {}, model)


def _sequences(ids: Tensor, packed: PackedSeqParams | None) -> int:
    """Sequences that attend to themselves alone: rows of `[B, S]`, or what is packed in the one row."""
    if packed is None:
        return ids.shape[0]
    return int((packed.cu_seqlens_q.diff() > 0).sum())


def _traffic(ids: Tensor, inputs: Mapping[str, Mapping], model: MimoModel) -> Counts:
    """Rows that each modality reads and writes, and items through each encoder."""
    config = model.mimo_config
    counts = {rows_read(name): float((ids == token).sum()) for name, token in config.special_token_ids.items()}
    counts |= {rows_written(name): float((ids == token).sum()) for name, token in config.generation_token_ids.items()}
    for modality in config.modality_submodules:
        given = inputs.get(modality) or {}
        for encoder in config.submodule_specs(modality).get("encoders") or {}:
            counts[items(modality, encoder)] = float(_items(given.get(encoder) or {}))
    return counts


def _items(keywords: Mapping[str, object]) -> int:
    """Leading dim of an encoder's first tensor."""
    tensors = (value for value in keywords.values() if isinstance(value, Tensor) and value.dim())
    return next((tensor.shape[0] for tensor in tensors), 0)
