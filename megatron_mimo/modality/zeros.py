"""Zero gradients for what a module that ran has of layers that nothing reads."""

from __future__ import annotations

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mimo.idle import stand_in, with_idle

# Of a module with 336 parameters a node for each doubled the step on the CPU; one for 16 added a fifth.
_TOGETHER = 16


def with_zeros(x: Tensor, module: nn.Module) -> Tensor:
    """What `module` gave, whose backward pass gives zeros to those of its parameters that nothing reads.

    They come before the module's other gradients and after those of what follows it, as `stand_in` gives them on a
    rank where it does not run: DDP's buckets are reduced in one order on both. Not so where the module computes
    layers anew in its backward pass: those accumulate in a pass of their own, and DDP would count two gradients
    there and one on the other ranks.

    Args:
        x: a tensor that `module` gave, rank-local.
        module: which ran.
    """
    return x if _recomputes(module) else with_idle(x, [stand_in([module], x, together=_TOGETHER)])


def _recomputes(module: nn.Module) -> bool:
    configs = (part.config for part in module.modules() if isinstance(part, MegatronModule))
    return any(isinstance(one, TransformerConfig) and one.recompute_granularity is not None for one in configs)
