"""`megatron_mimo.initialize` under torchrun."""

import torch
import torch.distributed as dist

from megatron_mimo.launch import Run
from tests.distributed.harness import case, relayout


@case(ranks=2)
@case(ranks=2, tensor_model_parallel_size=2)
@case(ranks=2, pipeline_model_parallel_size=2)
@case(ranks=2, context_parallel_size=2)
@case(ranks=2, expert_model_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, expert_model_parallel_size=2)
def run_describes_the_groups_that_were_built(run: Run) -> None:
    layout, groups = run.layout, run.groups
    assert (run.rank, run.world_size) == (dist.get_rank(), dist.get_world_size())
    assert (groups.tp.size(), groups.tp.rank()) == (layout.tensor_model_parallel_size, run.tensor_rank)
    assert (groups.pp.size(), groups.pp.rank()) == (layout.pipeline_model_parallel_size, run.pipeline_rank)
    assert (groups.cp.size(), groups.cp.rank()) == (layout.context_parallel_size, run.context_rank)
    assert (groups.ep.size(), groups.ep.rank()) == (layout.expert_model_parallel_size, run.expert_rank)
    assert (groups.dp.size(), groups.dp.rank()) == (layout.data_parallel_size, run.data_rank)
    assert groups.expt_tp.size() == layout.effective_expert_tensor_parallel_size


@case(ranks=2)
def several_layouts_follow_each_other_in_one_process(run: Run) -> None:
    for layout in ({"tensor_model_parallel_size": 2}, {}, {"pipeline_model_parallel_size": 2}):
        run = relayout(**layout)
        counted = torch.ones(1)
        dist.all_reduce(counted, group=run.groups.dp)
        assert counted.item() == run.layout.data_parallel_size


@case(ranks=2, tensor_model_parallel_size=2)
def tensor_ranks_draw_alike_outside_and_differently_inside_the_tracker(run: Run) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    outside = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(4)
    drawn = [torch.empty(8) for _ in range(2)]
    dist.all_gather(drawn, torch.cat([outside, inside]), group=run.groups.tp)
    assert torch.equal(drawn[0][:4], drawn[1][:4])
    assert not torch.equal(drawn[0][4:], drawn[1][4:])
