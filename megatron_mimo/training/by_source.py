"""The language loss of each source of a blend: reported beside the losses, trained on as a part of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.data.step import Counts
from megatron_mimo.losses import LossTerm, language_term
from megatron_mimo.model import MimoModel
from megatron_mimo.output import MimoOutput
from megatron_mimo.packed import boundaries_of
from megatron_mimo.sharding import sequence_shard
from megatron_mimo.training.speed.counts import LOSS, mask_of, term

PREFIX = "text of "


def count_sources(batch: Batch, names: Sequence[str], model: MimoModel) -> Counts:
    """What each source's language loss counts in a batch, under the same names for every batch.

    Args:
        batch: whole, on the CPU.
        names: of the sources; empty counts none.
        model: of the last pipeline stage.
    """
    if not names:
        return {}
    sources, mask = batch.get("sources"), mask_of(batch, model)
    if sources is None or mask is None:
        return {term(PREFIX + name): 0.0 for name in names}
    return {term(PREFIX + name): float(mask[sources == index].sum()) for index, name in enumerate(names)}


def counted_sources(counts: Counts) -> list[str]:
    """The terms of sources that counts know, in their order."""
    return [key[1] for key in counts if key[0] == LOSS and key[1].startswith(PREFIX)]


def source_terms(
    outputs: Tensor | MimoOutput, loss_mask: Tensor | None, sources: Tensor | None, names: Sequence[str],
    batch: Batch, model: MimoModel,
) -> dict[str, LossTerm]:  # fmt: skip
    """Each source's language loss in a microbatch, without gradient.

    Args:
        outputs, loss_mask: from `MimoModel.forward` on the last pipeline stage.
        sources: int64 `[B, S]`, the whole sequence; None of a batch that says nothing.
        names: of the terms.
        batch: of this stage.
        model: of this stage.
    """
    language = outputs.language if isinstance(outputs, MimoOutput) else outputs
    if not names or sources is None or loss_mask is None or language.dim() != 2:
        return {}
    cp = model.pg_collection.cp
    boundaries = boundaries_of(batch.get("packed_seq_params")) if cp.size() > 1 else None
    shard = sequence_shard(
        sources.shape[1],
        cp_rank=cp.rank(),
        cp_size=cp.size(),
        cu_seqlens=boundaries,
        device=sources.device,
        checks=model.checks,
    )
    mine = shard.cut(sources)
    with torch.no_grad():
        return {name: language_term(language, loss_mask * (mine == index)) for index, name in enumerate(names)}
