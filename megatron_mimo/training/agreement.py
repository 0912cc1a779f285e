"""What the ranks of a step have to agree on: lists of microbatches, and the means of their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def check_list(batches: object) -> None:
    """Refuses what is no list of microbatches; a generator's would be used up when their shapes are read."""
    expected = (
        "expected a list of microbatches, each a dict of MimoModel.forward's keyword arguments. Return [batch] for "
        "one microbatch, list(...) of a generator."
    )
    if not isinstance(batches, Sequence):
        raise TypeError(f"data(step, rank, size) gave a {type(batches).__name__}, {expected}")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(f"data(step, rank, size) gave a list with a {type(batch).__name__} at {index}, {expected}")


def means(logged: Sequence[Mapping[str, Tensor]], group: dist.ProcessGroup) -> dict[str, float]:
    """Each term's mean over microbatches and `group`; terms that counted nothing are left out."""
    names = list(logged[0])
    sums = torch.stack([torch.stack([each[name] for each in logged]).sum(0) for name in names])
    dist.all_reduce(sums, group=group)
    means = {name: total / count for name, (total, count) in zip(names, sums.tolist()) if count}
    return {name.removesuffix(" loss"): mean for name, mean in means.items()}
