"""Zero gradients for parameters that a batch did not use.

Data-parallel gradient reduction waits for every trainable parameter. A rank whose batch has no
image must hand in zeros for the image encoder, without running it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def with_zero_gradients(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`x`, whose backward pass also gives each of `parameters` a gradient of zeros.

    Args:
        x: a tensor that the loss depends on, any shape, rank-local.
        parameters: those that took no part in computing `x`; frozen ones are left alone.

    Returns:
        A view of `x`; `x` itself where there is nothing to add. No memory of the size of a
        parameter is allocated for the zeros until autograd stores them.

    Example:
        >>> weight = nn.Parameter(torch.ones(3))
        >>> with_zero_gradients(torch.ones(2, requires_grad=True), [weight]).sum().backward()
        >>> weight.grad
        tensor([0., 0., 0.])
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable or not torch.is_grad_enabled():
        return x
    return _ZeroGradients.apply(x, *trainable)


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        # Not save_for_backward: only shapes are read, and a parameter gathered in place between
        # forward and backward must not trip autograd's version check.
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        zeros = (p.new_zeros(()).expand_as(p) for p in ctx.parameters)
        return grad, *zeros
