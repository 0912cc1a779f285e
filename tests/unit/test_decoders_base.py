"""The decoder protocol: shares, zero losses, weights, and what it refuses."""

import pytest
import torch
from torch import nn

from megatron_mimo.decoders import Decoder, RegressionDecoder
from megatron_mimo.decoders.base import one_of, weighted_sum
from megatron_mimo.losses import LossTerm


class Pairs(Decoder):
    """Trains only: squared error of each pair's sum."""

    def __init__(self):
        super().__init__(width=3, rows_per_item=2)
        self.linear = nn.Linear(6, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def num_rows(self, targets):
        return 2 * targets["target"].shape[0]

    def loss(self, rows, targets):
        self.check_rows(rows, expected=self.num_rows(targets))
        if rows.shape[0] == 0:
            return self.zero_loss(rows)
        error = self.linear(rows.reshape(-1, 6)).squeeze(1) - targets["target"]
        return weighted_sum(error.square(), targets.get("weight"))


def test_shares_of_items_add_up_to_the_whole_loss_and_gradient():
    torch.manual_seed(0)
    decoder, rows = Pairs(), torch.randn(10, 3)
    targets = {"target": torch.randn(5), "weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])}
    decoder.loss(rows, targets).mean().backward()
    whole = decoder.linear.weight.grad.clone()
    decoder.zero_grad()
    total = LossTerm(torch.zeros(()), torch.zeros(()))
    for start, stop in ((0, 2), (2, 2), (2, 5)):
        total += decoder.loss(rows[2 * start : 2 * stop], decoder.share(targets, start, stop))
    assert total.count == 5
    total.mean().backward()
    torch.testing.assert_close(decoder.linear.weight.grad, whole)


def test_no_rows_give_zero_sum_zero_count_and_a_zero_gradient_to_every_trainable_parameter():
    decoder, rows = Pairs(), torch.randn(4, 3, requires_grad=True)
    targets = {"target": torch.zeros(2)}
    term = decoder.loss(rows[:0], decoder.share(targets, 1, 1))
    assert term.sum == term.count == term.mean() == 0
    assert term.sum.dtype == term.count.dtype == torch.float32
    term.sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.linear.parameters())
    assert decoder.frozen.grad is None
    assert not rows.grad.any()


def test_sharing_out_no_items_gives_the_targets_back():
    targets = {"target": torch.zeros(0)}
    assert Pairs().share(targets, 0, 0)["target"] is targets["target"]


def test_a_target_that_is_no_multiple_of_the_items_cannot_be_shared_out():
    with pytest.raises(ValueError, match=r"\[3\] cannot be shared out over 2 items"):
        Pairs().share({"target": torch.zeros(2), "extra": torch.zeros(3)}, 0, 1)


def test_a_decoder_without_a_sampler_says_so_when_asked_to_sample():
    with pytest.raises(NotImplementedError, match="Pairs was asked to sample from 4 rows"):
        Pairs().sample(torch.zeros(4, 3))


def test_weights_count_what_they_weigh():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert weighted_sum(values, None) == LossTerm(values.sum(), torch.tensor(4.0))
    masked = weighted_sum(values, torch.tensor([True, False]))
    assert (masked.sum, masked.count) == (3, 2)
    single = weighted_sum(values, torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    assert (single.sum, single.count) == (1, 0.5)


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"weight has shape \[3\].*\[2, 2\]"):
        weighted_sum(torch.zeros(2, 2), torch.ones(3))


def test_a_negative_weight_is_refused():
    with pytest.raises(
        ValueError, match="weight has 1 elements of 2 that are negative, infinite or NaN.*what does not count 0"
    ):
        weighted_sum(torch.zeros(2, 2), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("rows", "targets", "match"),
    [
        (torch.zeros(4, 5), 2, r"takes rows \[N, 3\] but got \[4, 5\]"),
        (torch.zeros(4, 3), 3, "got 4 rows and targets for 6"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, targets, match):
    with pytest.raises(ValueError, match=match):
        Pairs().loss(rows, {"target": torch.zeros(targets)})


def test_rows_that_are_no_whole_spans_are_refused():
    with pytest.raises(ValueError, match="spans of 2 rows but got 3 rows"):
        Pairs().check_rows(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("targets", "match"),
    [({}, r"lack \['target'\]"), ({"target": 0, "tarteg": 0}, r"unknown \['tarteg'\]")],
)
def test_targets_with_missing_or_unknown_keywords_are_refused(targets, match):
    with pytest.raises(ValueError, match=match):
        RegressionDecoder(width=2).num_rows(targets)


@pytest.mark.parametrize("options", [{"width": 0}, {"width": 2, "position_rule": "next"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="RegressionDecoder: (width|position_rule) must be"):
        RegressionDecoder(**options)


def test_rows_per_item_must_be_positive():
    with pytest.raises(ValueError, match="rows_per_item must be an int of at least 1, got 0"):
        Decoder.__init__(Pairs(), width=1, rows_per_item=0)


def test_an_option_is_named_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"X: y must be one of \['a'\], got 'b'"):
        one_of("X", "y", "b", ("a",))


def test_what_does_not_count_may_be_nan():
    term = weighted_sum(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    assert (term.sum, term.count, term.mean()) == (1, 1, 1)


@pytest.mark.parametrize("objective", ["mse", "l1", "huber", "cosine"])
def test_a_target_that_does_not_count_sends_no_nan_into_a_gradient(objective):
    torch.manual_seed(0)
    decoder = RegressionDecoder(width=3, target_width=2, objective=objective)
    rows, target = torch.randn(3, 3, requires_grad=True), torch.randn(3, 2)
    target[1] = torch.nan
    term = decoder.loss(rows, {"target": target, "weight": torch.tensor([1.0, 0.0, 2.0])})
    term.mean().backward()
    assert term.count == 3
    assert rows.grad.isfinite().all() and not rows.grad[1].any() and rows.grad[0].any()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_a_target_that_counts_keeps_its_nan():
    decoder = RegressionDecoder(width=2)
    target = torch.tensor([[torch.nan, 0.0]])
    assert decoder.loss(torch.ones(1, 2), {"target": target}).sum.isnan()


def test_targets_that_are_no_tensors_are_refused_before_the_loss():
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        RegressionDecoder(width=2).num_rows({"target": [[1.0, 2.0]]})


def test_a_regressions_weight_of_another_shape_is_refused_before_the_loss():
    with pytest.raises(ValueError, match=r"weight must have shape \[3\].*got \[2\]"):
        RegressionDecoder(width=2).num_rows({"target": torch.zeros(3, 2), "weight": torch.ones(2)})
