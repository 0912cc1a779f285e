"""Parameters that a batch did not use get a gradient of zeros."""

import torch
from torch import nn

from megatron_mimo.idle import with_zero_gradients


def test_idle_parameters_get_zeros_and_used_ones_keep_their_gradient():
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    with_zero_gradients(used * 2, [idle, used]).sum().backward()
    assert used.grad.tolist() == [2.0] * 3
    assert idle.grad.eq(0).all() and idle.grad.shape == (2, 2)


def test_zeros_are_added_to_an_earlier_gradient():
    idle = nn.Parameter(torch.ones(2))
    idle.grad = torch.ones(2)
    with_zero_gradients(torch.ones(1, requires_grad=True), [idle]).sum().backward()
    assert idle.grad.tolist() == [1.0, 1.0]


def test_frozen_parameters_and_no_grad_change_nothing():
    x = torch.ones(2, requires_grad=True)
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    assert with_zero_gradients(x, [frozen]) is x
    with torch.no_grad():
        assert with_zero_gradients(x, [nn.Parameter(torch.ones(1))]) is x


def test_an_output_without_gradient_still_carries_the_zeros():
    idle = nn.Parameter(torch.ones(2))
    with_zero_gradients(torch.ones(3), [idle]).sum().backward()
    assert idle.grad.eq(0).all()
