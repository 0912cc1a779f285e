"""Gradient norms of a model's parts, whatever ranks hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_mimo.compat.megatron_optimizers import shards_of
from megatron_mimo.config import SUBMODULE_KEYS, MimoModelConfig
from megatron_mimo.model import MimoModel
from megatron_mimo.training.parts.control import LANGUAGE_MODEL


def part_names(config: MimoModelConfig) -> list[str]:
    """The parts that are told apart, as `TrainingControl` names them: `language_model`, `images/encoders`, ...

    What a modality has besides its named parts is told under its own name.
    """
    named = [f"{modality}/{key}" for modality in config.modality_submodules for key in SUBMODULE_KEYS]
    return [LANGUAGE_MODEL, *named, *config.modality_submodules]


def part_of(name: str) -> str:
    """The part that a parameter of a bare `MimoModel` belongs to.

    Example:
        >>> part_of("modality_submodules.images.encoders.clip.weight"), part_of("language_model.output_layer.weight")
        ('images/encoders', 'language_model')
    """
    _, modality, *rest = name.split(".")
    if name.startswith("language_model."):
        return LANGUAGE_MODEL
    return f"{modality}/{rest[0]}" if rest[0] in SUBMODULE_KEYS else modality


def norms_of(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, groups: ProcessGroupCollection
) -> dict[str, float]:
    """Part -> L2 norm of its gradient, before clipping; the squares add up to that of the whole norm.

    Called between the last reduction of gradients and the optimizer's step. Collective over all ranks: one all-reduce
    of a number a part. The host waits for it.

    Args:
        chunks: of this rank, as Megatron wraps them.
        optimizer: of their parameters; with a distributed one a rank looks at its own shards.
        groups: of the layout.

    Returns:
        Parts that train. Equal on all ranks.
    """
    models = [_bare(chunk) for chunk in chunks]
    parts = part_names(models[0].mimo_config)
    device = next(chunks[0].parameters()).device
    squares = torch.zeros(2 * len(parts), dtype=torch.float64, device=device)
    shards = shards_of(optimizer)
    instances = _ddp(chunks[0]).ddp_config.num_distributed_optimizer_instances
    for model in models:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or not param_is_not_shared(parameter):
                continue
            expert = not getattr(parameter, "allreduce", True)
            tensor_group = groups.expt_tp if expert else groups.tp
            if not param_is_not_tensor_parallel_duplicate(parameter, tensor_group):
                continue
            gradient = parameter.main_grad.view(-1)  # DDP's
            copies = (groups.expt_dp if expert else groups.dp_cp).size()
            if shards is not None:
                gradient, copies = gradient[shards.get(parameter, slice(0, 0))], instances
            at = 2 * parts.index(part_of(name))
            squares[at] += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square() / copies
            squares[at + 1] += 1
    if dist.get_world_size() > 1:
        dist.all_reduce(squares)
    found = squares.tolist()
    scale = float(optimizer.get_loss_scale())
    return {
        part: math.sqrt(found[2 * at]) / scale if math.isfinite(found[2 * at]) else math.nan
        for at, part in enumerate(parts)
        if found[2 * at + 1]
    }


def _bare(chunk: nn.Module) -> MimoModel:
    model = unwrap_model(chunk)
    assert isinstance(model, MimoModel)
    return model


def _ddp(chunk: nn.Module) -> DistributedDataParallel:
    assert isinstance(chunk, DistributedDataParallel)
    return chunk
