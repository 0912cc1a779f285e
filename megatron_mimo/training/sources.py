"""Training from a data source: one rank reads for each data-parallel rank, and the checkpoint knows how far."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_mimo.batch import Batch
from megatron_mimo.data.loading import PackedData
from megatron_mimo.data.packs import Pack
from megatron_mimo.data.progress import State, joined_states
from megatron_mimo.data.transfer import Manifest, from_bytes, to_bytes
from megatron_mimo.launch import Run
from megatron_mimo.segments import segmented

logger = logging.getLogger(__name__)

_FILE = "data.json"


class DataSource(ABC):
    """Microbatches step by step, and how far it is as plain JSON.

    Every rank has one; it is asked on one rank of each data-parallel rank alone, and what it gives is sent to the
    others.
    """

    #: Of a blend, told apart in a step's report: a microbatch's `sources` are indices of it.
    source_names: Sequence[str] = ()

    @abstractmethod
    def next_step(self) -> Sequence[Batch]:
        """The microbatches of the next step of this data-parallel rank, on the CPU."""

    @abstractmethod
    def state_dict(self) -> State:
        """How far this data-parallel rank is: JSON with `ranks`, see `joined_states`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the joined states of all data-parallel ranks."""


class PackSource(DataSource):
    """Microbatches of one pack each.

    Args:
        data: of this data-parallel rank: `PackedData(..., rank=run.data_rank, size=run.layout.data_parallel_size)`.
        microbatches: of a step on each data-parallel rank.

    Raises:
        ValueError: no microbatch.

    Example:
        >>> trainer.train(PackSource(data, microbatches=4))                       # doctest: +SKIP
    """

    def __init__(self, data: PackedData, microbatches: int = 1) -> None:
        if microbatches < 1:
            raise ValueError(f"PackSource: microbatches should be at least 1, found {microbatches}")
        self.data, self._microbatches = data, microbatches
        self.source_names = data.source_names

    def next_step(self) -> Sequence[Batch]:
        return [traced(next(self.data)) for _ in range(self._microbatches)]

    def state_dict(self) -> State:
        return self.data.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.data.load_state_dict(state)


def batch_of(pack: Pack) -> Batch:
    """A pack as the keyword arguments of `MimoModel.forward`, the boundaries of its samples included."""
    batch = cast(Batch, pack.batch())
    if pack.cu_seqlens is not None:
        batch["packed_seq_params"] = segmented(pack.cu_seqlens, pack.cu_seqlens_padded, pack.spans)
    return batch


def traced(pack: Pack) -> Batch:
    """As `batch_of`, for the forward step of a loop, which tells the sources of a blend apart."""
    batch = batch_of(pack)
    if pack.sources is not None:
        batch["sources"] = pack.sources
    return batch


class Reader:
    """Gives every pipeline stage and context-parallel rank what one of them read.

    Args:
        source: this rank's.
        run: says which rank reads: the first of its tensor-, context- and pipeline-parallel groups.
    """

    def __init__(self, source: DataSource, run: Run) -> None:
        self.source, self._run = source, run

    def __call__(self, step: int, rank: int, size: int) -> Sequence[Batch]:
        """The step's microbatches. Collective over the context- and pipeline-parallel ranks with tensor rank 0."""
        del step, rank, size
        groups = self._run.groups
        batches: Sequence[Batch] | None = None
        if groups.pp.rank() == 0:
            if groups.cp.rank() == 0:
                batches = list(self.source.next_step())
            batches = self._sent(batches, groups.cp, self._run.hosts.context)
        return cast(Sequence[Batch], self._sent(batches, groups.pp, self._run.hosts.pipeline))

    @property
    def reads(self) -> bool:
        """Whether this rank is the one that reads."""
        groups = self._run.groups
        return groups.tp.rank() == groups.cp.rank() == groups.pp.rank() == 0

    def _sent(
        self, batches: Sequence[Batch] | None, group: dist.ProcessGroup, hosts: dist.ProcessGroup
    ) -> Sequence[Batch] | None:
        """What the group's rank 0 has, on every rank of it: one message of the hosts' and one broadcast of bytes."""
        if group.size() == 1:
            return batches
        message: list[Manifest | None] = [None]
        buffer = None
        if group.rank() == 0:
            message[0], buffer = to_bytes(batches)
        dist.broadcast_object_list(message, group=hosts, group_src=0)
        manifest = cast(Manifest, message[0])
        device = self._run.device
        buffer = torch.empty(manifest.size, dtype=torch.uint8, device=device) if buffer is None else buffer.to(device)
        if manifest.size:
            dist.broadcast(buffer, group=group, group_src=0)
        return cast(Sequence[Batch], from_bytes(manifest, buffer.cpu())) if group.rank() else batches

    def state(self) -> State:
        """How far all data-parallel ranks are. Collective over all ranks."""
        states: list[State | None] = [None] * self._run.world_size
        dist.all_gather_object(states, self.source.state_dict() if self.reads else None, group=self._run.hosts.world)
        return joined_states([state for state in states if state is not None])


def write_state(directory: Path, state: State) -> None:
    """Writes how far the data is into a checkpoint that is being made."""
    (directory / _FILE).write_text(json.dumps(state))


def read_state(path: Path) -> State | None:
    """How far the data was when a checkpoint was made; None if that run had no data source."""
    file = path / _FILE
    return json.loads(file.read_text()) if file.exists() else None
