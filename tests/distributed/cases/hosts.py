"""What hosts tell each other goes over groups of their own, and waits for no device."""

import sys
from dataclasses import fields, replace
from datetime import timedelta

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mimo.hosts import HostGroups, data_host_group
from megatron_mimo.launch import Run
from megatron_mimo.training import forward
from tests.distributed.cases.steps import few_labels, trainer
from tests.distributed.harness import case

#: Files that speak for the host alone.
SPEAKERS = ("training/agreement.py", "data/step.py", "training/stop.py")
#: What they call to do so; their broadcasts of bytes are a device's.
CALLS = ("all_reduce", "all_gather_into_tensor", "all_gather_object", "broadcast_object_list")


@case(ranks=4, tensor_model_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, context_parallel_size=2)
def every_axis_has_a_group_of_hosts_of_the_same_ranks(run: Run) -> None:
    groups, ours = run.groups, HostGroups.made(run.groups, timedelta(seconds=60))
    of_axes = dict(tensor=groups.tp, context=groups.cp, pipeline=groups.pp, model=groups.mp, data=groups.dp)
    assert dist.get_process_group_ranks(ours.world) == [0, 1, 2, 3]
    assert of_axes.keys() | {"world"} == {field.name for field in fields(HostGroups)}
    for axis, theirs in of_axes.items():
        found = getattr(ours, axis)
        assert dist.get_process_group_ranks(found) == dist.get_process_group_ranks(theirs), axis
        assert dist.get_backend(found) == "gloo"
        told: list[int] = [-1] * found.size()
        if found.size() > 1:
            assert found is not theirs or axis == "data", axis
            dist.all_gather_object(told, run.rank, group=found)
            assert told == dist.get_process_group_ranks(theirs)


@case(ranks=4, tensor_model_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
def a_step_agrees_and_sends_manifests_over_groups_of_hosts(run: Run) -> None:
    expected = trainer(run).train_step(few_labels)
    hosts = HostGroups.made(run.groups, timedelta(seconds=60))
    ours = trainer(replace(run, hosts=hosts))
    used: dict[str, set[dist.ProcessGroup]] = {}

    def told(name: str):
        call = getattr(dist, name)

        def calling(*given, **named):
            file = sys._getframe(1).f_code.co_filename
            if file.endswith(SPEAKERS):
                used.setdefault(name, set()).add(named.get("group"))
            return call(*given, **named)

        return calling

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(dist, name, told(name))
        found = ours.train_step(few_labels)
        ours._patience_is_over = lambda: run.rank == 3
        assert ours._compare({}) == (False, True)
    assert dict(found.losses) == dict(expected.losses)
    groups = set().union(*used.values())
    # One all-gather in `finite` is the device's, whose numbers it brings.
    assert groups - {None} == {hosts.world, hosts.tensor, hosts.model} | ({hosts.data} & groups)
    assert used["all_gather_into_tensor"] == {hosts.world, None} and used["broadcast_object_list"] == {hosts.tensor}
    assert None not in used["all_reduce"] | used["all_gather_object"]


@case(ranks=2)
def counts_are_added_up_over_megatrons_own_host_group_that_is_looked_up_once(run: Run) -> None:
    """Where the data-parallel group says that it is a GPU's, as it does meanwhile, and nobody made host groups."""
    ours = trainer(run)
    real, add, data = dist.get_backend, dist.all_reduce, run.groups.dp
    used: list[tuple[dist.ProcessGroup, str]] = []
    looked: list[object] = []

    def read() -> dict:
        batches = iter(few_labels(0, run.data_rank, 2))
        return ours._forward_step._read(batches, ours.models[0], 2).counts

    def added(tensor, *given, group: dist.ProcessGroup, **named) -> object:
        used.append((group, tensor.device.type))
        return add(tensor, *given, group=group, **named)

    expected = read()
    ours._forward_step._hosts = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group=None: "nccl" if group is data else real(group))
        patch.setattr(dist, "all_reduce", added)
        patch.setattr(forward, "data_host_group", lambda group: (looked.append(group), data_host_group(group))[1])
        assert read() == expected == read()
        (group, device), again = used
        assert group is not data and real(group) == "gloo" and device == "cpu" and again == (group, device)
        assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(data) == [0, 1]
        assert looked == [data]
        with pytest.MonkeyPatch.context() as without:  # --disable-gloo-process-groups
            without.setattr(parallel_state, "get_data_parallel_group_gloo", _no_host_group)
            assert data_host_group(data) is data


def _no_host_group() -> dist.ProcessGroup:
    raise AssertionError("data parallel group-gloo is not initialized")
