"""What a pipeline stage reads of a batch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mimo.batch import Batch
from megatron_mimo.data.step import part_for_stage
from megatron_mimo.model import MimoModel
from megatron_mimo.training.speed.counts import mask_of, placement_of, submodules_of


def placed_batches(batches: Iterator[Batch] | None, model: MimoModel) -> Iterator[Batch] | None:
    """Batches with their placement, where the stage places or counts rows, and with their loss mask; None for None.

    Both are made once, on the CPU, where the batch's collator did not: the host then knows the counts, which a first
    stage without decoders learns from nothing else, and which labels a last stage has to compute the loss of.
    For a GPU a batch is checked here too (`MimoModel.settle`), on stages in the middle as well.

    Args:
        batches: tensors on the CPU.
        model: of the stage.
    """
    if batches is None:
        return batches
    # Megatron's iterators over data have a next batch and are no iterables.
    each: Iterator[Batch | None] = iter(lambda: next(batches, None), None)
    return (_placed(batch, model) for batch in each if batch is not None)


def _placed(batch: Batch, model: MimoModel) -> Batch:
    placed = batch
    if model.pre_process or model.post_process:
        placement, mask = placement_of(batch, model), mask_of(batch, model) if model.post_process else None
        placed = {**batch, "placement": placement}
        if mask is not None:
            placed = {**placed, "loss_mask": mask, "placement": placement.counting(mask)}
    # On the CPU the model checks at once what it is given.
    if next(model.parameters()).device.type != "cpu" and (settled := model.settle(placed)) is not None:
        placed = {**placed, "placement": settled}
    return placed


def part_for(batch: Batch, model: MimoModel) -> Batch:
    """What a model's pipeline stage needs of a batch.

    A first stage needs the targets of modalities whose generation tokens are fed from them, no other.

    Args:
        batch: of all stages.
        model: of the stage.
    """
    part = part_for_stage(batch, first=model.pre_process, last=model.post_process)
    targets = part.get("modality_targets")
    if model.post_process or not targets:
        return part
    parts = submodules_of(model)
    fed = {
        modality: target
        for modality, target in targets.items()
        if modality not in parts  # the model refuses it with a message
        or parts[modality].generation_input is not None
    }
    return {**part, "modality_targets": fed}
