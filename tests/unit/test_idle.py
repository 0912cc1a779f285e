"""Modules that a batch did not use get a gradient of zeros, in the order of their own backward pass."""

import torch
from torch import nn

from megatron_mimo.idle import stand_in, with_idle, without_gathering


def test_idle_modules_get_zeros_and_used_ones_keep_their_gradient():
    used, idle = nn.Parameter(torch.ones(3)), nn.Linear(2, 2)
    with_idle(used * 2, [stand_in([idle])]).sum().backward()
    assert used.grad.tolist() == [2.0] * 3
    assert idle.weight.grad.eq(0).all() and idle.weight.grad.shape == (2, 2)


def test_zeros_are_added_to_other_gradients():
    layer = nn.Linear(2, 1, bias=False)
    with_idle(layer(torch.ones(1, 2)), [stand_in([layer])]).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]
    with_idle(torch.ones(1, requires_grad=True), [stand_in([layer])]).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]


def test_zeros_come_from_the_last_parameter_to_the_first():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    order = []
    for name, parameter in layers.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    with_idle(torch.ones(1, requires_grad=True), [stand_in([layers])]).sum().backward()
    assert order == ["1.bias", "1.weight", "0.bias", "0.weight"]


def test_frozen_parameters_and_no_grad_change_nothing():
    x, frozen = torch.ones(2, requires_grad=True), nn.Linear(1, 1).requires_grad_(False)
    assert with_idle(x, [stand_in([frozen])]) is x
    with torch.no_grad():
        assert with_idle(x, [stand_in([nn.Linear(1, 1)])]) is x


def test_stand_in_is_empty_rows_like_those_that_are_missing():
    like = torch.ones(3, 7, dtype=torch.bfloat16)
    for modules in ([nn.Linear(1, 1)], [nn.Identity()], []):
        rows = stand_in(modules, like)
        assert rows.shape == (0, 7) and rows.dtype == torch.bfloat16
    assert stand_in([nn.Linear(1, 1).half()]).dtype == torch.float16
    assert stand_in([]).shape == (0, 1)


def test_an_output_without_gradient_still_carries_the_zeros():
    idle = nn.Linear(1, 1)
    with_idle(torch.ones(3), [stand_in([idle])]).sum().backward()
    assert idle.weight.grad.eq(0).all()


def test_hooks_of_ddp_rest_and_come_back_in_their_order_and_their_handles_still_remove_them():
    calls = []

    def hook(name: str, ddp: bool):
        def call(module, inputs) -> None:
            calls.append(name)

        if ddp:
            call.__module__ = "megatron.core.distributed.distributed_data_parallel"
        return call

    layer = nn.Linear(1, 1)
    handles = [layer.register_forward_pre_hook(hook(*each)) for each in (("a", False), ("ddp", True), ("b", False))]
    with without_gathering([layer]):
        layer(torch.ones(1))
    assert calls == ["a", "b"]
    layer(torch.ones(1))
    assert calls[2:] == ["a", "ddp", "b"]
    for handle in handles:
        handle.remove()
    layer(torch.ones(1))
    assert len(calls) == 5
