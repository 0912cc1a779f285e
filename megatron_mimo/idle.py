"""What a module that this batch does not need does in its place, so that no rank waits for another.

Data-parallel ranks meet in collectives that modules set off one by one: Megatron's DDP gathers a
bucket of parameters when the first module that needs it runs, and reduces a bucket of gradients when
the last of them is there. A rank whose batch has no image must join both, at the same point of the
sequence as the ranks that run the image encoder, or the ranks' collectives no longer match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_mimo.compat.megatron import gather_hooks, without_gather_hooks


def stand_in(modules: Iterable[nn.Module], like: Tensor | None = None) -> Tensor:
    """An empty tensor `[0, H]` in place of what `modules` would have computed here.

    Call it where they would have run. It sets off the parameter gathers that they would have set
    off, and its backward pass gives each of their trainable parameters a gradient of zeros, one after
    the other from the last to the first, as theirs would have come. Nothing is computed.

    Args:
        modules: in the order in which they would have run.
        like: any tensor whose last dim is `H`, with the dtype and device of the missing rows; None
            for `[0, 1]` like the first parameter.

    Returns:
        `[0, H]`, rank-local.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with_idle(torch.ones(3), [stand_in([layer], like=torch.ones(2))]).sum().backward()
        >>> layer.bias.grad
        tensor([0., 0.])
    """
    modules = list(modules)
    for module in modules:
        gather_parameters(module.modules())
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
    if like is None:
        like = parameters[0].detach().flatten()[:1] if parameters else torch.empty(1)
    return zeros_for(parameters, like)


def zeros_for(parameters: Iterable[nn.Parameter], like: Tensor) -> Tensor:
    """An empty tensor `[0, H]` whose backward pass gives each trainable parameter zeros, from the last to the first.

    Args:
        parameters: in the order in which they would have been used.
        like: any tensor whose last dim is `H`.
    """
    anchor = like.new_empty(0, like.shape[-1])
    for parameter in parameters:
        if parameter.requires_grad and torch.is_grad_enabled():
            anchor = _ZeroGradient.apply(anchor, parameter)
    return anchor


def with_idle(x: Tensor, stand_ins: Sequence[Tensor]) -> Tensor:
    """`x`, whose backward pass is also that of `stand_ins`.

    Args:
        x: a tensor that the loss depends on, any shape, rank-local.
        stand_ins: from `stand_in`.

    Returns:
        A view of `x`; `x` itself where no stand-in has a gradient to give.
    """
    needed = [anchor for anchor in stand_ins if anchor.requires_grad]
    if not needed or not torch.is_grad_enabled():
        return x
    return _Carry.apply(x, *needed)


def gather_parameters(parts: Iterable[nn.Module]) -> None:
    """What running a module's parts would have made DDP do first: wait for their parameters, fetch the next.

    DDP hangs that on each part's forward pass (`overlap_param_gather`); call it where the parts do not run.
    """
    for part in parts:
        for hook in gather_hooks(part):
            hook(part, ())


@contextmanager
def without_gathering(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, forward passes of a module's parts ask nothing of DDP; `gather_parameters` has asked before."""
    with without_gather_hooks(tuple(parts)):
        yield


class _ZeroGradient(torch.autograd.Function):
    """One node a parameter: the nodes run in a fixed order, the outputs of a single one do not."""

    @staticmethod
    def forward(ctx, anchor, parameter):
        # Not save_for_backward: only the shape is read, and a parameter gathered in place between
        # forward and backward must not trip autograd's version check.
        ctx.parameter = parameter
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.parameter.new_zeros(()).expand_as(ctx.parameter)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *stand_ins):
        ctx.save_for_backward(*stand_ins)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(anchor) for anchor in ctx.saved_tensors)
