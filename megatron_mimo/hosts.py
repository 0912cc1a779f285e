"""Groups whose hosts tell each other what they have to know before they go on: counts, shapes, errors, manifests.

Over a group of NCCL's a host would wait for all that its GPU has queued. These are gloo's, of the same ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Self

import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class HostGroups:
    """This rank's groups for what lies on the host, of the same ranks as Megatron's of those axes.

    Attributes:
        world: all ranks.
        tensor, context, pipeline, data: ranks of one axis; data without context-parallel ranks.
        model: tensor- and pipeline-parallel ranks of one model.
    """

    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup
    data: dist.ProcessGroup

    @classmethod
    def of(cls, groups: ProcessGroupCollection) -> Self:
        """Those that there are already: the groups themselves, but for Megatron's own host group of the data."""
        world = dist.group.WORLD
        assert world is not None
        return cls(world, groups.tp, groups.cp, groups.pp, groups.mp, data_host_group(groups.dp))

    @classmethod
    def made(cls, groups: ProcessGroupCollection, timeout: timedelta) -> Self:
        """New gloo groups beside groups of another backend. Collective over all ranks.

        Each group is made on every rank, in one order: where its own ranks alone make it
        (`use_local_synchronization`), four of them hung in torch 2.11.

        Args:
            groups: Megatron's.
            timeout: of their collectives.
        """
        world = dist.new_group(backend="gloo", timeout=timeout)
        twins: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(world.size())): world}

        def twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
            if group.size() == 1:
                return group  # which nobody talks over
            mine = tuple(dist.get_process_group_ranks(group))
            told: list[Sequence[int]] = [mine] * world.size()
            dist.all_gather_object(told, mine, group=world)
            for ranks in sorted({tuple(each) for each in told} - twins.keys()):
                twins[ranks] = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
            return twins[mine]

        tensor, context, pipeline, model = (twin(group) for group in (groups.tp, groups.cp, groups.pp, groups.mp))
        return cls(world, tensor, context, pipeline, model, data_host_group(groups.dp))


def data_host_group(data_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Megatron's gloo group of the same data-parallel ranks, as it makes one at its start.

    The group itself, where there is no host group of these ranks (`--disable-gloo-process-groups`, process groups of
    one's own) or the group is gloo's already.
    """
    from megatron.core import parallel_state  # not at the top: importing this package says nothing

    if data_group.size() == 1 or dist.get_backend(data_group) == "gloo":
        return data_group
    try:
        host = parallel_state.get_data_parallel_group_gloo()
    except AssertionError:
        return data_group
    same = dist.get_process_group_ranks(host) == dist.get_process_group_ranks(data_group)
    return host if same else data_group
