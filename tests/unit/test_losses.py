"""Terms are divided by counts once, so no cut of the batch changes loss or gradient."""

import torch

from megatron_mimo.losses import LossTerm, global_counts, language_term, total_loss


def test_microbatches_of_uneven_counts_give_the_gradient_of_the_whole():
    weight = torch.tensor([2.0], requires_grad=True)
    values = torch.arange(6.0)
    whole = LossTerm((weight * values).sum(), torch.tensor(6.0))
    (expected,) = torch.autograd.grad(total_loss({"text": whole}), weight)

    parts = [values[:1], values[1:6], values[6:]]
    counts = {"text": torch.tensor(6.0)}
    total = sum(total_loss({"text": LossTerm((weight * p).sum(), torch.tensor(len(p)))}, counts=counts) for p in parts)
    (found,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found, expected)


def test_a_term_that_counted_nothing_is_zero_with_zero_gradient():
    weight = torch.ones(3, requires_grad=True)
    term = LossTerm(weight[:0].sum(), torch.tensor(0.0))
    total_loss({"images/pixels": term}).backward()
    assert weight.grad.eq(0).all()


def test_masked_tokens_with_an_infinite_loss_do_not_count():
    loss = torch.tensor([[1.0, float("inf"), 3.0]], requires_grad=True)
    term = language_term(loss, torch.tensor([[1, 0, 1]]))
    assert term.mean().item() == 2.0
    term.sum.backward()
    assert loss.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_language_term_without_a_mask_counts_every_token():
    assert language_term(torch.ones(2, 3)).count.item() == 6


def test_weights_go_by_modality():
    one = LossTerm(torch.tensor(4.0), torch.tensor(2))
    terms = {"text": one, "images/pixels": one, "images/codes": one, "audio/wave": one}
    assert total_loss(terms, {"images": 0.5}).item() == 2 + 1 + 1 + 2


def test_counts_without_a_group_are_local():
    terms = {"text": LossTerm(torch.tensor(1.0), torch.tensor(3))}
    assert global_counts(terms)["text"].item() == 3
    assert global_counts({}) == {}
