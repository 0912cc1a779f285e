"""A run as one of its ranks sees it: layout, place, device, process groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_mimo.axes import Layout
from megatron_mimo.compat.cuda_on_cpu import cpu_backend_enabled
from megatron_mimo.hosts import HostGroups

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Run:
    """What `initialize` set up, seen from this rank.

    Attributes:
        layout: the size of every parallel axis.
        rank: this rank in the world; `local_rank` is its place on this host.
        tensor_rank, pipeline_rank, data_rank, context_rank, expert_rank: its place on each axis.
        device: where this rank's tensors live.
        backend: ``"nccl"`` or ``"gloo"``.
        seed: what the random numbers started from.
        groups: Megatron's process groups, to hand to models and optimizers.
        hosts: groups of the same ranks for what lies on the host; over them nobody waits for a GPU.
        graph_safe_rng: whether CUDA graphs can draw from Megatron's random numbers.
    """

    layout: Layout
    rank: int
    local_rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    context_rank: int
    expert_rank: int
    device: torch.device
    backend: str
    seed: int
    groups: ProcessGroupCollection
    hosts: HostGroups
    graph_safe_rng: bool = False

    @property
    def world_size(self) -> int:
        """Ranks in this run."""
        return self.layout.world_size


def run_over_megatrons_groups(layout: Layout, seed: int, timeout_s: float) -> Run:
    """The `Run` of process groups, device and random numbers that other code has set up, as `megatron.training` does.

    Collective over all ranks; it is not the run that `initialize` gives and `shutdown` ends.

    Args:
        layout: that the groups have.
        seed: what the random numbers started from.
        timeout_s: of collectives between hosts.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, is_graph_safe_cuda_rng_tracker

    on_cpu = cpu_backend_enabled()
    local_rank = 0 if on_cpu else torch.cuda.current_device()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    graph_safe = is_graph_safe_cuda_rng_tracker(get_cuda_rng_tracker())
    return described(layout, local_rank, device, dist.get_backend(), seed, timeout_s, graph_safe)


def described(
    layout: Layout,
    local_rank: int,
    device: torch.device,
    backend: str,
    seed: int,
    timeout_s: float,
    graph_safe_rng: bool,
) -> Run:
    """The run whose process groups Megatron has, with new groups of hosts beside NCCL's. Collective over all ranks."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = backend == "nccl"
    return Run(
        layout=layout,
        rank=dist.get_rank(),
        local_rank=local_rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        device=device,
        backend=backend,
        seed=seed,
        groups=groups,
        hosts=HostGroups.made(groups, timedelta(seconds=timeout_s)) if made else HostGroups.of(groups),
        graph_safe_rng=graph_safe_rng,
    )
