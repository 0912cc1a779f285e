"""Microbatches from the one rank that reads them to the ranks that need them.

Rank 0 of a tensor-parallel group reads; every pipeline stage reads for itself and keeps what its stage
needs. At the start of a step all its microbatches are read into host memory and what their losses
count is added up over the data-parallel ranks, because each loss is divided by the count of the whole
step. Group by group, a step takes

    one all-reduce of the counts over the data-parallel group (readers on the last stage alone),
    one message with counts and manifests over the tensor-parallel group, or a host group of its ranks,
    one broadcast of bytes over the tensor-parallel group for each microbatch, when its turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.data.transfer import Manifest, from_bytes, to_bytes

#: What a batch counts: kind and names of what is counted -> how many.
Counts = dict[tuple[str, ...], float]

# Keywords of MimoModel.forward by where in the pipeline they are needed; others go to every stage.
FIRST_ONLY = ("modality_inputs",)
LAST_ONLY = ("labels", "loss_mask", "sources")
ENDS_ONLY = ("modality_targets", "placement")


def part_for_stage(batch: Batch, *, first: bool, last: bool) -> Batch:
    """What one pipeline stage needs of a batch: middle stages see token ids, positions and masks.

    Args:
        batch: keyword arguments of `MimoModel.forward`.
        first, last: whether the stage is the first, the last; both without a pipeline.

    Example:
        >>> batch = {"input_ids": 1, "labels": 2, "modality_inputs": 3, "modality_targets": 4}
        >>> part_for_stage(batch, first=True, last=False)
        {'input_ids': 1, 'modality_inputs': 3, 'modality_targets': 4}
    """
    unneeded = {
        *(() if first else FIRST_ONLY),
        *(() if last else LAST_ONLY),
        *(() if first or last else ENDS_ONLY),
    }
    return cast(Batch, {name: value for name, value in batch.items() if name not in unneeded})


@dataclass
class StepBatches:
    """The microbatches of one step that are still to come, and what the whole step counts.

    Attributes:
        counts: name -> sum over all microbatches and data-parallel ranks.
        microbatch_counts: the same of each microbatch of this data-parallel rank.
    """

    counts: Counts
    microbatch_counts: deque[Counts]
    _manifests: deque[Manifest]
    _buffers: deque[Tensor]
    _device: torch.device
    _group: dist.ProcessGroup

    def __len__(self) -> int:
        return len(self._manifests)

    def next(self) -> tuple[Batch, Counts]:
        """The next microbatch on this rank's device, and its counts.

        Collective over the tensor-parallel group: one broadcast from its rank 0.
        """
        manifest, buffer, counts = self.next_bytes()
        return from_bytes(manifest, buffer), counts

    def next_bytes(self) -> tuple[Manifest, Tensor, Counts]:
        """The next microbatch as `from_bytes` takes it, uint8 on this rank's device, and its counts. As `next`."""
        manifest, counts = self._manifests.popleft(), self.microbatch_counts.popleft()
        if self._buffers:
            buffer = self._buffers.popleft().to(self._device, non_blocking=True)
        else:
            buffer = torch.empty(manifest.size, dtype=torch.uint8, device=self._device)
        if self._group.size() > 1 and manifest.size:
            dist.broadcast(buffer, group=self._group, group_src=0)
        return manifest, buffer, counts


def read_step(
    iterator: Iterator[Batch] | None,
    microbatches: int,
    *,
    keep: Callable[[Batch], Batch],
    count: Callable[[Batch], Counts],
    tensor_group: dist.ProcessGroup,
    data_group: dist.ProcessGroup | None,
    device: torch.device,
    manifest_group: dist.ProcessGroup | None = None,
) -> StepBatches:
    """Reads the next `microbatches` batches; every rank of the tensor-parallel group calls it.

    Args:
        iterator: gives batches of CPU tensors; used on rank 0 of the tensor-parallel group alone.
        microbatches: how many.
        keep: what this pipeline stage needs of a batch.
        count: what a batch counts, under the same names, in the same order, for every batch.
        tensor_group: gets the batches.
        data_group: to add the counts up over, which waits for no GPU where it is a gloo group; None leaves them this
            rank's.
        device: where the batches are wanted.
        manifest_group: of the same ranks as `tensor_group`, gets counts and manifests; None for that group.

    Raises:
        RuntimeError: the data ended within the step.
        ValueError: no iterator on a rank that reads.
    """
    manifests: list[Manifest] = []
    buffers: list[Tensor] = []
    counts: list[Counts] = []
    total: Counts = {}
    if tensor_group.rank() == 0:
        pin = device.type == "cuda"
        for index in range(microbatches):
            batch = _next_batch(iterator, index, microbatches)
            manifest, buffer = to_bytes(keep(batch), pin)
            manifests.append(manifest)
            buffers.append(buffer)
            counts.append(count(batch))
        total = _sum_over(counts, data_group, device)
    if tensor_group.size() > 1:
        message = [(total, counts, manifests)]
        dist.broadcast_object_list(message, group=manifest_group or tensor_group, group_src=0)
        ((total, counts, manifests),) = message
    return StepBatches(total, deque(counts), deque(manifests), deque(buffers), device, tensor_group)


def _next_batch(iterator: Iterator[Batch] | None, index: int, microbatches: int) -> Batch:
    if iterator is None:
        raise ValueError(
            "read_step: expected an iterator over batches on rank 0 of the tensor-parallel group, found None. Give "
            "the data to every rank that reads."
        )
    try:
        return next(iterator)
    except StopIteration:
        raise RuntimeError(
            f"the data ended after {index} of the step's {microbatches} microbatches. Give an iterator "
            "that does not end before training does, or train fewer steps."
        ) from None


def _sum_over(counts: list[Counts], group: dist.ProcessGroup | None, device: torch.device) -> Counts:
    """Each name's sum over microbatches and `group`. float64: counts of tokens pass 2 ** 24."""
    names = list(counts[0])
    summed = [sum(each[name] for each in counts) for name in names]
    if group is not None and group.size() > 1:
        where = torch.device("cpu") if dist.get_backend(group) == "gloo" else device
        packed = torch.tensor(summed, dtype=torch.float64, device=where)
        dist.all_reduce(packed, group=group)
        summed = packed.tolist()
    return dict(zip(names, summed))
