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
from megatron_mimo.torchrun import torchrun_number, under_torchrun

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


def place_on_host() -> int:
    """This process's place on its host; 0 where torchrun did not start it."""
    return torchrun_number("LOCAL_RANK", 0, 0) if under_torchrun() else 0


def run_over_megatrons_groups(layout: Layout, seed: int, timeout_s: float) -> Run:
    """The `Run` of process groups, device and random numbers that other code has set up, as `megatron.training` does.

    Collective over all ranks; it is not the run that `initialize` gives and `shutdown` ends.

    Args:
        layout: that the groups have.
        seed: what the random numbers started from.
        timeout_s: of collectives between hosts.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, is_graph_safe_cuda_rng_tracker

    device = torch.device("cpu") if cpu_backend_enabled() else torch.device("cuda", torch.cuda.current_device())
    return described(layout, device, seed, timeout_s, is_graph_safe_cuda_rng_tracker(get_cuda_rng_tracker()))


def described(layout: Layout, device: torch.device, seed: int, timeout_s: float, graph_safe_rng: bool) -> Run:
    """The run whose process groups Megatron has, with new groups of hosts beside NCCL's. Collective over all ranks.

    Args:
        layout, device, seed, graph_safe_rng: as `Run` has them.
        timeout_s: of collectives between hosts.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    backend = dist.get_backend()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = backend == "nccl"
    return Run(
        layout=layout,
        rank=dist.get_rank(),
        local_rank=place_on_host(),
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
