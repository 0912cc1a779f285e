"""Discrete codes: the loss, the narrowed draws, guidance, and what is refused."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from megatron_mimo.decoders import DiscreteDecoder
from megatron_mimo.decoders.discrete import draw_codes, in_codebooks


def test_one_codebook_is_plain_cross_entropy():
    torch.manual_seed(0)
    decoder = DiscreteDecoder(width=6, codebook_sizes=11, hidden_width=8)
    rows, codes = torch.randn(5, 6), torch.randint(11, (5,))
    (logits,) = decoder.logits(rows)
    term = decoder.loss(rows, {"codes": codes})
    torch.testing.assert_close(term.mean(), F.cross_entropy(logits, codes))
    assert term.count == 5


def test_several_codebooks_each_have_a_head_and_count_their_codes():
    torch.manual_seed(0)
    decoder = DiscreteDecoder(width=6, codebook_sizes=(11, 4))
    rows = torch.randn(5, 6)
    codes = torch.stack([torch.randint(11, (5,)), torch.randint(4, (5,))], dim=1)
    term = decoder.loss(rows, {"codes": codes})
    wanted = sum(
        F.cross_entropy(part, code, reduction="sum") for part, code in zip(decoder.logits(rows), codes.unbind(1))
    )
    torch.testing.assert_close(term.sum, wanted)
    assert term.count == 10
    masked = decoder.loss(rows, {"codes": codes, "weight": torch.tensor([1, 0, 0, 0, 0])})
    assert masked.count == 2
    assert decoder.sample(rows).shape == (5, 2)


def test_a_code_outside_its_codebook_raises_on_the_cpu():
    decoder = DiscreteDecoder(width=6, codebook_sizes=4)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 4\), found 4 in row 1, codebook 0"):
        decoder.loss(torch.zeros(2, 6), {"codes": torch.tensor([1, 4])})


def test_zero_rows_give_zero_gradients():
    decoder = DiscreteDecoder(width=6, codebook_sizes=4, hidden_width=3, condition_dropout=0.1)
    targets = decoder.prepare({"codes": torch.zeros(0, dtype=torch.long)})
    decoder.loss(torch.zeros(0, 6), targets).sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


def test_temperature_zero_takes_the_likeliest_code():
    logits = torch.randn(20, 9)
    assert torch.equal(draw_codes(logits, temperature=0), logits.argmax(1))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    drawn = draw_codes(logits, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    # Three standard errors of a share of 20,000 draws are at most 3 * 0.5 / sqrt(20,000) = 0.011.
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.011, rtol=0)


def test_top_k_and_top_p_leave_only_the_likeliest():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(500, 4)
    draw = torch.Generator().manual_seed(0)
    assert set(draw_codes(logits, top_k=2, generator=draw).tolist()) == {1, 3}
    assert set(draw_codes(logits, top_p=0.4, generator=draw).tolist()) == {1}
    assert set(draw_codes(logits, top_p=0.41, generator=draw).tolist()) == {1, 3}
    assert set(draw_codes(logits, top_k=3, top_p=0.75, generator=draw).tolist()) == {1, 3}
    assert set(draw_codes(logits, top_p=1.0, generator=draw).tolist()) == {0, 1, 2, 3}


def test_the_callers_logits_are_left_unchanged():
    logits = torch.randn(3, 5)
    kept = logits.clone()
    draw_codes(logits, top_k=1, top_p=0.5)
    assert torch.equal(logits, kept)


def test_no_rows_draw_no_codes():
    assert draw_codes(torch.zeros(0, 5)).shape == (0,)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1}, "temperature must be finite and at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
    ],
)
def test_bad_sampling_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        draw_codes(torch.zeros(1, 2), **options)


def test_guidance_extrapolates_from_the_unconditional_logits():
    torch.manual_seed(0)
    decoder = DiscreteDecoder(width=6, codebook_sizes=50, condition_dropout=0.5)
    torch.nn.init.normal_(decoder.condition_dropout.null)
    rows = torch.randn(30, 6)
    (conditional,), (null,) = decoder.logits(rows), decoder.logits(decoder.condition_dropout.null.expand(30, 6))
    wanted = (null + 4 * (conditional - null)).argmax(1)
    assert torch.equal(decoder.sample(rows, temperature=0, guidance=4), wanted)
    given = torch.randn(30, 6)
    (other,) = decoder.logits(given)
    wanted = (other + 4 * (conditional - other)).argmax(1)
    drawn = decoder.sample(rows, temperature=0, guidance=4, unconditional_rows=given)
    assert torch.equal(drawn, wanted)


def test_guidance_without_dropped_conditions_warns_once():
    decoder = DiscreteDecoder(width=6, codebook_sizes=4)
    rows = torch.zeros(2, 6)
    with pytest.warns(UserWarning, match="trained without dropped conditions"):
        decoder.sample(rows, guidance=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.sample(rows, guidance=2)
        DiscreteDecoder(width=6, codebook_sizes=4).sample(rows, guidance=2, unconditional_rows=rows)


def test_unconditional_rows_of_another_shape_are_refused():
    decoder = DiscreteDecoder(width=6, codebook_sizes=4)
    with pytest.raises(ValueError, match=r"\[3, 6\], the rows \[2, 6\]"):
        decoder.sample(torch.zeros(2, 6), guidance=2, unconditional_rows=torch.zeros(3, 6))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"codebook_sizes": ()}, "at least one codebook"),
        ({"codebook_sizes": (4, 0)}, "codebook_sizes must be an int of at least 1"),
        ({"codebook_sizes": 4, "hidden_width": 0}, "hidden_width must be an int"),
        ({"codebook_sizes": 4, "condition_dropout": 1.0}, r"must lie in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        DiscreteDecoder(width=6, **options)


@pytest.mark.parametrize("codes", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)])
def test_codes_of_another_shape_or_type_are_refused(codes):
    with pytest.raises(ValueError, match=r"codes must be int64 \[N\]"):
        DiscreteDecoder(width=6, codebook_sizes=4).num_rows({"codes": codes})


def test_codes_of_several_codebooks_need_their_second_dim():
    with pytest.raises(ValueError, match=r"codes must be int64 \[N, 2\]"):
        DiscreteDecoder(width=6, codebook_sizes=(4, 4)).num_rows({"codes": torch.zeros(3, dtype=torch.long)})


def test_a_drop_of_another_shape_is_refused():
    decoder = DiscreteDecoder(width=6, codebook_sizes=4, condition_dropout=0.1)
    targets = {"codes": torch.zeros(3, dtype=torch.long), "drop": torch.ones(1).bool()}
    with pytest.raises(ValueError, match=r"drop must have shape \[3\].*got \[1\]"):
        decoder.prepare(targets)


def test_media_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="hold media, but nothing here encodes them to .codes."):
        DiscreteDecoder(width=6, codebook_sizes=4).num_rows({"media": torch.zeros(1, 3, 4, 4)})


@pytest.mark.parametrize("weight", [torch.tensor([1, 0]), torch.tensor([[True], [False]])])
def test_codes_of_weight_zero_may_be_anything(weight):
    decoder = DiscreteDecoder(width=6, codebook_sizes=4)
    rows = torch.randn(2, 6, requires_grad=True)
    term = decoder.loss(rows, {"codes": torch.tensor([1, -100]), "weight": weight})
    alone = decoder.loss(rows[:1], {"codes": torch.tensor([1])})
    torch.testing.assert_close((term.sum, term.count), (alone.sum, alone.count))
    term.sum.backward()
    assert rows.grad[0].any() and not rows.grad[1].any()


def test_a_code_is_judged_by_its_own_codebook():
    codes = torch.tensor([[3, 1], [0, 3]])
    assert torch.equal(in_codebooks(codes, (4, 4), None)[0], codes)
    with pytest.raises(ValueError, match=r"in \[0, 2\), found 3 in row 1, codebook 1"):
        in_codebooks(codes, (4, 2), None)


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(3, 1), torch.ones(())])
def test_a_weight_of_another_shape_is_refused_before_the_loss(weight):
    decoder = DiscreteDecoder(width=6, codebook_sizes=(4, 4))
    targets = {"codes": torch.zeros(3, 2, dtype=torch.long), "weight": weight}
    with pytest.raises(ValueError, match="weight must have shape"):
        decoder.num_rows(targets)


def test_evaluation_drops_no_conditions():
    decoder = DiscreteDecoder(width=6, codebook_sizes=4, condition_dropout=0.9)
    targets = {"codes": torch.zeros(3, dtype=torch.long)}
    assert "drop" in decoder.prepare(targets)
    assert "drop" not in decoder.eval().prepare(targets)
