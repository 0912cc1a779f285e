"""Regression: each objective is the one it is named after."""

import pytest
import torch
from torch.nn import functional as F

from megatron_mimo.decoders import RegressionDecoder

FORMULAS = {
    "mse": lambda p, t: F.mse_loss(p, t),
    "l1": lambda p, t: F.l1_loss(p, t),
    "huber": lambda p, t: F.huber_loss(p, t, delta=0.5),
    "cosine": lambda p, t: F.cosine_embedding_loss(p, t, torch.ones(len(p))),
}


@pytest.mark.parametrize("objective", FORMULAS)
def test_the_mean_of_the_term_is_torchs_own_loss(objective):
    torch.manual_seed(0)
    decoder = RegressionDecoder(width=5, target_width=3, hidden_width=7, objective=objective, huber_delta=0.5)
    rows, target = torch.randn(6, 5), torch.randn(6, 3)
    term = decoder.loss(rows, {"target": target})
    assert term.count == 6
    torch.testing.assert_close(term.mean(), FORMULAS[objective](decoder.sample(rows), target))


def test_without_a_target_width_the_rows_are_the_prediction():
    rows = torch.randn(4, 5, dtype=torch.bfloat16)
    assert torch.equal(RegressionDecoder(width=5).sample(rows), rows.float())


def test_rows_of_another_dtype_are_cast_to_the_networks():
    decoder = RegressionDecoder(width=5, target_width=3)
    assert decoder.sample(torch.ones(2, 5, dtype=torch.bfloat16)).dtype == torch.float32


def test_zero_rows_give_zero_gradients():
    decoder = RegressionDecoder(width=5, target_width=3)
    decoder.loss(torch.zeros(0, 5), {"target": torch.zeros(0, 3)}).sum.backward()
    assert not decoder.network.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"objective": "mae"}, "objective must be one of"),
        ({"huber_delta": 0}, "huber_delta must be positive"),
        ({"hidden_width": 4}, "hidden_width 4 needs a target_width"),
        ({"target_width": 0}, "target_width must be an int"),
        ({"target_width": 3, "hidden_width": 0}, "hidden_width must be an int"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        RegressionDecoder(width=5, **options)


def test_a_target_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"target must be \[N, 3\], got \[2, 4\]"):
        RegressionDecoder(width=5, target_width=3).num_rows({"target": torch.zeros(2, 4)})
