"""What the ranks of a step have to agree on: its microbatches, the means of its losses, an error that ends it.

An error of one rank is raised on all of them, so that none is left waiting in a collective for one that is gone.
"""

from __future__ import annotations

import builtins
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.data.step import Counts
from megatron_mimo.fp8 import check_fp8_rows
from megatron_mimo.launch import Run
from megatron_mimo.layout import check_sequence_length
from megatron_mimo.training.speed.counts import term

#: Number of microbatches, and `(B, S)` of the first.
Shape = tuple[int, tuple[int, int]]


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


def error_of(act: Callable[[], object]) -> Exception | None:
    """What `act` raises, for `raise_together`; None where it returns."""
    try:
        act()
    except Exception as error:
        return error
    return None


def agree(error: Exception | None, run: Run) -> None:
    """Raises the error of any rank on all of them. Collective over all ranks' hosts: one all-reduce of one number.

    Args:
        error: of this rank, None where there is none.
        run: the layout and its process groups.
    """
    if any(agreed([error is not None], run)):
        raise_together(error, run.hosts.world)


def agreed(flags: Iterable[bool], run: Run) -> list[bool]:
    """Flags that any rank has set. Collective over the hosts of a run of several ranks: one all-reduce."""
    told = torch.tensor([int(flag) for flag in flags])
    if run.world_size > 1:
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=run.hosts.world)
    return [bool(flag) for flag in told.tolist()]


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises, on every rank, its own error, or else that of the first rank that has one. Collective over all ranks.

    Args:
        error: of this rank, None where there is none.
        group: of all ranks; None for the device's.
    """
    told = gathered(None if error is None else (type(error).__name__, str(error)), group)
    if error is not None:
        raise error
    for rank, each in enumerate(told):
        if each is not None:
            kind = getattr(builtins, each[0], RuntimeError)
            raise kind(f"rank {rank}: {each[1]}")


def agree_on_microbatches(batches: object, error: Exception | None, run: Run, config: TransformerConfig) -> Shape:
    """How many microbatches a step has on this rank, and `(B, S)` of the first, once the ranks agree.

    Pipeline stages and context-parallel ranks of one model read for themselves, and each would wait for the others'
    microbatches. With experts data-parallel ranks wait for each other too. Collective over all ranks' hosts: one
    all-gather of eight numbers, which also tells the ranks of a tensor-parallel group that do not read.

    Args:
        batches: what this rank has read; not looked at where it does not read.
        error: of this rank before the step, which ends it on every rank.
        run: the layout and its process groups.
        config: of the language model.

    Raises:
        ValueError: on every rank, naming ranks and numbers that differ.
        Exception: on every rank, what one of them found.
    """
    reads = run.groups.tp.rank() == 0
    shapes: list[tuple[int, int]] = []
    if reads and error is None:
        try:
            shapes = _shapes_of(batches, run, config)
        except Exception as found:
            error = found
    first = shapes[0] if shapes else (0, 0)
    if run.world_size == 1:
        if error is not None:
            raise error
        return len(shapes), first
    reader = dist.get_global_rank(run.groups.tp, 0)
    kinds = zlib.crc32(repr(shapes).encode())  # of shapes after the first
    own = [int(error is not None), int(reads), reader, run.data_rank, len(shapes), *first, kinds]
    told = all_gathered(torch.tensor(own), run.hosts.world).tolist()
    if any(line[0] for line in told):
        raise_together(error, run.hosts.world)
    # Of a tensor-parallel group its reader speaks.
    spoken = {rank: line for rank, line in enumerate(told) if line[1]}
    if _differ(spoken, config.num_moe_experts is not None):
        _refuse(gathered(shapes if reads else None, run.hosts.world), told, config.num_moe_experts is not None)
    _, _, _, _, number, size, length, _ = told[reader]
    return number, (size, length)


def shared(
    losses: Mapping[str, float], norm: float | None, succeeded: bool, counts: Counts, run: Run
) -> tuple[dict[str, float], float | None, bool]:
    """Losses, gradient norm and success as all ranks shall know them. Collective over the model-parallel hosts.

    Args:
        losses: term -> mean, on the last pipeline stage.
        norm: of this stage's gradients, None where it has none.
        succeeded: whether this stage's optimizer stepped.
        counts: of the whole step; terms that it has nothing of are left out.
        run: the layout and its process groups.
    """
    kept = {name: mean for name, mean in losses.items() if counts.get(term(name)) != 0}
    group, last = run.hosts.model, run.groups.pp.rank() == run.groups.pp.size() - 1
    if group.size() > 1:
        told: list = [None] * group.size()
        dist.all_gather_object(told, (kept if last else None, norm, bool(succeeded)), group=group)
        kept = next(each for each, _, _ in told if each is not None)
        # A stage where everything is frozen has no norm and cannot fail.
        norm = max((one for _, one, _ in told if one is not None), default=None)
        succeeded = all(one for _, _, one in told)
    return kept, norm, bool(succeeded)


def _shapes_of(batches: object, run: Run, config: TransformerConfig) -> list[tuple[int, int]]:
    check_list(batches)
    found = [cast(tuple[int, int], tuple(batch["input_ids"].shape)) for batch in cast(Sequence[Batch], batches)]
    if not found:
        raise ValueError("a step has no microbatch: the data must give at least one for every step")
    one_shape = run.layout.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths
    if one_shape and len(set(found)) > 1:
        raise ValueError(
            f"microbatches of shapes {sorted(set(found))}: pipeline stages exchange hidden "
            "states of one shape. Pad them alike, or set TransformerConfig.variable_seq_lengths."
        )
    for size, length in set(found):
        check_sequence_length(length, run.layout, config)
        check_fp8_rows(size * length, config, run.layout.context_parallel_size)
    return found


def _differ(spoken: Mapping[int, Sequence[int]], experts: bool) -> bool:
    of_model: dict[int, set[tuple[int, ...]]] = {}
    for line in spoken.values():
        of_model.setdefault(line[3], set()).add(tuple(line[4:]))
    numbers = {line[4] for line in spoken.values()}
    return any(len(found) > 1 for found in of_model.values()) or (experts and len(numbers) > 1)


def _refuse(shapes: Sequence[list | None], told: Sequence[Sequence[int]], experts: bool) -> None:
    """Says which ranks differ, in what."""
    read = {rank: (line[3], shapes[rank] or []) for rank, line in enumerate(told) if line[1]}
    pairs = [(a, b) for a, b in combinations(read, 2) if read[a][0] == read[b][0] or experts]
    unequal = [(a, b) for a, b in pairs if len(read[a][1]) != len(read[b][1])]
    one, other = (unequal or [(a, b) for a, b in pairs if read[a][0] == read[b][0] and read[a] != read[b]])[0]
    ours, theirs = read[one][1], read[other][1]
    if len(ours) != len(theirs):
        numbers = ", ".join(f"rank {rank} has {len(read[rank][1])}" for rank in read)
        what = f"expected as many microbatches on every rank, found other numbers: {numbers}"
    else:
        index = next(index for index, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
        what = (
            f"expected the same microbatches, found microbatch {index} of shape [B, S] = {list(ours[index])} on rank "
            f"{one} and {list(theirs[index])} on rank {other}"
        )
    raise ValueError(
        f"{what}. Pipeline stages and context-parallel ranks of one model (and, with experts, data-parallel ranks) "
        "each ask data(step, rank, size) for themselves and wait for each other's microbatches: give them the same "
        "number, of the same shapes, for the same arguments."
    )


def all_gathered(own: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`[world, n]` of `[n]` on every rank. Collective over all ranks: of the device's group, or another of them all."""
    if dist.get_world_size() == 1:
        return own.view(1, -1)
    told = own.new_empty(dist.get_world_size() * own.numel())
    dist.all_gather_into_tensor(told, own, group=group)
    return told.view(-1, own.numel())


def gathered[Value](own: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every rank's value on every rank. Collective over all ranks: of the device's group, or another of them all."""
    told: list = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        told = told * dist.get_world_size()
        dist.all_gather_object(told, own, group=group)
    return told
