"""Log-probabilities of what was generated, by one training forward over the whole sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.fp8 import row_multiple
from megatron_mimo.generation.borrow import evaluating
from megatron_mimo.generation.drawing import Drawing
from megatron_mimo.generation.events import Finished, Sample
from megatron_mimo.generation.placing import following
from megatron_mimo.generation.prompts import Batch, Known, Request, batched, joined
from megatron_mimo.generation.results import TextPart
from megatron_mimo.generation.stage import Stage


def rescored(
    model: Any, stage: Stage, known: Known, finished: Sequence[Finished], samples: Sequence[Sample]
) -> Iterator[Finished]:
    """The finished samples with `rescored_logprobs`, from the loss that training would have of their text.

    The model's own attention, sequence parallelism and output layer run, in evaluation mode.

    Args:
        model: a `MimoModel`, this rank's part, no longer borrowed.
        stage: its part on this rank.
        known: of the model.
        finished: events to give on.
        samples: of the call.

    Collectives: those of a forward pass, a send between neighbouring pipeline stages, and as `Stage.shared`.
    """
    said = [sample for sample in samples if sample.learned]
    ranks = model.pg_collection.tp.size() if model.config.sequence_parallel else 1
    multiple = math.lcm(ranks, row_multiple(model.config, 1))
    drawing = Drawing(model, stage) if stage.first else None
    whole = [_whole(sample, drawing, known.sections) for sample in said]
    together = batched(whole, known, stage.device, multiple) if whole else None
    fits = stage.told(together is not None)
    batches = [together] if fits else [batched([request], known, stage.device, multiple) for request in whole]
    groups = [said] if fits else [[sample] for sample in said]
    with evaluating(model):
        for batch, group in zip(batches, groups):
            if batch is not None and group:
                _rescore(model, stage, batch, group)
    yield from finished


def _whole(sample: Sample, drawing: Drawing | None, sections: int) -> Request:
    """The request that a sample's whole sequence would make."""
    request, inputs, shown = sample.request, sample.request.inputs, sample.request.shown
    for read in sample.read:
        inputs = joined([inputs, read])
    for rule, drawn in sample.shown:
        if drawing is not None and rule.style != "pass":
            shown = joined([shown, {rule.modality: drawing.shown(rule, drawn)}])
    positions = request.positions
    if positions is None and sample.placed:
        positions = torch.arange(len(request.ids)).expand(sections, -1)
    if positions is not None:
        positions = following(positions, request.delta, len(sample.sequence), sample.placed)
    return replace(request, ids=list(sample.sequence), inputs=inputs, shown=shown, positions=positions)


def _rescore(model: Any, stage: Stage, batch: Batch, samples: Sequence[Sample]) -> None:
    counts = torch.zeros(batch.ids.shape)
    for row, sample in enumerate(samples):
        counts[row, [place - 1 for place in sample.learned]] = 1
    counts = counts.to(stage.device)
    labels = batch.ids.roll(-1, dims=1).masked_fill(counts == 0, 0)
    losses = _losses(model, stage, batch, labels, counts)
    for row, sample in enumerate(samples):
        own, at = -losses[row, [place - 1 for place in sample.learned]], 0
        for part in sample.output.parts:
            if isinstance(part, TextPart):
                part.rescored_logprobs = own[at : at + len(part.ids)].clone()
                at += len(part.ids)


def _losses(model: Any, stage: Stage, batch: Batch, labels: Tensor, counts: Tensor) -> Tensor:
    """Loss of every token, float32 `[B, S]` on the CPU, by the model's own forward pass."""
    group, rank = model.pg_collection.pp, model.pg_collection.pp.rank()
    size = model.pg_collection.tp.size() if model.config.sequence_parallel else 1
    media: Mapping[str, Any] = {}
    if stage.first:
        media = {"modality_inputs": batch.inputs, "generation_inputs": batch.shown}
    else:
        shape = (batch.ids.shape[1] // size, batch.ids.shape[0], stage.hidden_size)
        received = torch.empty(shape, dtype=stage.wire, device=stage.device)
        dist.recv(received, group_src=rank - 1, group=group)
        model.set_input_tensor(received)
    output, _ = model(batch.ids, batch.positions, labels=labels, loss_mask=counts, **media)
    model.finish_checks()
    losses = None
    if stage.last:
        losses = (output if isinstance(output, Tensor) else output.language).float()
    else:
        dist.send(output.to(stage.wire).contiguous(), group_dst=rank + 1, group=group)
    return stage.shared(losses).cpu()
