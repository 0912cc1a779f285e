"""Parameters as `megatron.core.dist_checkpointing` takes them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from megatron.core import parallel_state
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from megatron_mimo.compat.torch import own_state


@runtime_checkable
class Shardable(Protocol):
    """A module that knows how its parameters are split over ranks."""

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple, metadata: dict) -> dict: ...


def sharded_state_dict(
    module: nn.Module, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> dict:
    """Sharded tensors of `module` by parameter name.

    Containers are walked until a module knows its own sharding; what lies outside such a module
    is replicated. (Megatron's default takes a whole `ModuleDict` for replicated, which would
    save one shard of a tensor-parallel encoder as if it were all of it.)

    Args:
        module: a module that has no sharding of its own to say.
        prefix, sharded_offsets, metadata: as in Megatron's `sharded_state_dict`.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    state = {}
    state.update(
        make_sharded_tensors_for_checkpoint(
            own_state(module),
            prefix,
            {},
            sharded_offsets,
            # Replicated over both groups: without the first, every tensor-parallel rank would
            # claim to hold the copy that is written.
            tp_group=parallel_state.get_tensor_model_parallel_group(check_initialized=False),
            dp_cp_group=metadata["dp_cp_group"],
        )
    )
    for name, child in module.named_children():
        knows = isinstance(child, Shardable)
        walk = sharded_state_dict_default if knows else sharded_state_dict
        state.update(walk(child, f"{prefix}{name}.", sharded_offsets, metadata))
    return state
