"""Whole weights <-> the shards of tensor-parallel ranks, for comparing N ranks with one."""

from collections.abc import Mapping

import torch
import torch.distributed as dist


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters of a model whose tensor-parallel size is 1, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def load_whole_weights(
    model: torch.nn.Module, whole: Mapping[str, torch.Tensor], tensor_group: dist.ProcessGroup, gated: bool = False
) -> None:
    """Puts this rank's part of `whole` into `model`.

    `gated`: ``linear_fc1`` holds gate and value one above the other, and each is cut for itself.
    """
    rank, size = tensor_group.rank(), tensor_group.size()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = whole[name]
            if _is_sharded(parameter):
                halves = tensor.chunk(2 if gated and "linear_fc1" in name else 1, dim=parameter.partition_dim)
                parts = [half.chunk(size, dim=parameter.partition_dim)[rank] for half in halves]
                tensor = torch.cat(parts, dim=parameter.partition_dim)
            parameter.copy_(tensor)


def whole_gradients(
    model: torch.nn.Module, tensor_group: dist.ProcessGroup, gated: bool = False
) -> dict[str, torch.Tensor]:
    """The gradient of every parameter, put together from all ranks of `tensor_group`, by name.

    A parameter that sequence parallelism sees a part of the sequence with is summed over the group, as
    ``finalize_model_grads`` would; every other replicated gradient is checked to be equal on all ranks.
    """
    size = tensor_group.size()
    whole = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.detach().clone()
        if _is_sharded(parameter):
            parts = _all_gather(gradient, tensor_group)
            if gated and "linear_fc1" in name:
                halves = [part.chunk(2, dim=parameter.partition_dim) for part in parts]
                parts = [half[0] for half in halves] + [half[1] for half in halves]
            gradient = torch.cat(parts, dim=parameter.partition_dim)
        elif getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=tensor_group)
        elif size > 1:
            for other in _all_gather(gradient, tensor_group):
                torch.testing.assert_close(other, gradient, msg=f"{name}: replicated gradients differ between ranks")
        whole[name] = gradient
    return whole


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
