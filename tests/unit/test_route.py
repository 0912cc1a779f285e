"""Routing gathers rows and its backward pass is the inverse, on any shard of the sequence."""

import torch

from megatron_mimo.route import route
from megatron_mimo.sharding import sequence_shard


def test_rows_and_gradients_on_one_rank():
    hidden = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([1, 4, 5, 9])  # b * S + s with S = 5
    shard = sequence_shard(5)
    rows = route(hidden, positions, shard)
    expected = hidden.transpose(0, 1).reshape(10, 3)[positions]
    assert torch.equal(rows, expected)
    assert torch.autograd.gradcheck(lambda h: route(h, positions, shard), (hidden,))


def test_no_rows():
    hidden = torch.randn(4, 1, 3, requires_grad=True)
    rows = route(hidden, torch.empty(0, dtype=torch.long), sequence_shard(4))
    assert rows.shape == (0, 3)
    rows.sum().backward()
    assert hidden.grad.eq(0).all()


def test_rows_of_other_ranks_have_no_gradient_here():
    shard = sequence_shard(8, cp_rank=0, cp_size=2)  # positions 0, 1, 6, 7
    hidden = torch.randn(4, 1, 2, requires_grad=True)
    _, owned = shard.local_index(torch.tensor([0, 3, 7]), 1)
    assert owned.tolist() == [True, False, True]
    route(hidden, torch.tensor([0, 3, 7]), shard).sum().backward()
    assert hidden.grad[:, 0, 0].tolist() == [1, 0, 0, 1]
