"""Zero gradients for what a module that ran has of layers that nothing reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_mimo.compat.torch import leaves_of
from megatron_mimo.idle import with_idle, zeros_for


def with_zeros(x: Tensor, module: nn.Module, given: Tensor | None = None) -> Tensor:
    """What `module` gave, whose backward pass also gives zeros to those of its parameters that `x` does not depend on.

    A layer that ran and that nothing reads (the last one of an encoder whose second to last is taken) would get no
    gradient, and data parallelism waits for it. The autograd graph of `x` says which those are; to all others nothing
    is added. The zeros come before the module's other gradients, as `stand_in` gives them on a rank where it does not
    run. Not so where the module computes layers anew in its backward pass: its graph hides them, and what runs there
    is taken to be read.

    Args:
        x: a tensor that `module` gave, rank-local, at least one dim.
        module: which ran.
        given: what it was given that has a gradient of its own; the graph is followed up to there.

    Example:
        >>> pair = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> with_zeros(pair[0](torch.ones(1, 2)), pair).sum().backward()
        >>> pair[1].bias.grad, bool(pair[0].bias.grad.any())
        (tensor([0., 0.]), True)
    """
    if not torch.is_grad_enabled():
        return x
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        return x
    reached = leaves_of(x, given)
    if reached is None:
        return x
    unread = [parameter for parameter in trained if id(parameter) not in reached]
    return with_idle(x, [zeros_for(unread, x)]) if unread else x
