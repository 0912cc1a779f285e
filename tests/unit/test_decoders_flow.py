"""Rectified flow: the formulas, the solvers' accuracy, the draws, guidance, and both networks."""

import math
import warnings

import pytest
import torch

from megatron_mimo.decoders import FlowDecoder, FlowTransformerDecoder, RectifiedFlow
from megatron_mimo.decoders.rectified_flow import integrate, noised


def head(**options) -> FlowDecoder:
    settings = dict(width=6, target_width=4, hidden_width=16, depth=2)
    return FlowDecoder(**{**settings, **options})


def transformer(**options) -> FlowTransformerDecoder:
    settings = dict(width=6, target_width=4, targets_per_item=3, rows_per_item=2)
    settings |= dict(hidden_width=16, depth=2, heads=2)
    return FlowTransformerDecoder(**{**settings, **options})


def steered(**options) -> FlowTransformerDecoder:
    return transformer(rows_per_item=3, condition="own", **options)


KINDS = {
    "head": (head, 1, 1),
    "transformer": (transformer, 2, 3),
    "steered": (steered, 3, 3),
}


def randomised(decoder):
    """The decoder with every weight drawn: the networks start as zero maps, which hide mistakes."""
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_squared_distance_to_noise_minus_clean(kind):
    torch.manual_seed(0)
    make, rows_per_item, targets_per_item = KINDS[kind]
    decoder = randomised(make())
    rows, clean = torch.randn(5 * rows_per_item, 6), torch.randn(5 * targets_per_item, 4)
    time, noise = torch.rand(5), torch.randn_like(clean)
    given = {"target": clean, "time": time, "noise": noise}
    term = decoder.loss(rows, decoder.prepare(given))
    t = time.repeat_interleave(targets_per_item)[:, None]
    predicted = decoder.velocity(rows, (1 - t) * clean + t * noise, time)
    wanted = (predicted - (noise - clean)).square().mean()
    assert term.count == len(clean)
    torch.testing.assert_close(term.mean(), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_items_do_not_see_each_other(kind):
    torch.manual_seed(0)
    make, rows_per_item, targets_per_item = KINDS[kind]
    decoder = randomised(make())
    rows, x = torch.randn(3 * rows_per_item, 6), torch.randn(3 * targets_per_item, 4)
    time = torch.rand(3)
    together = decoder.velocity(rows, x, time)
    alone = [decoder.velocity(a, b, c[None]) for a, b, c in zip(rows.chunk(3), x.chunk(3), time)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_a_zero_one_without_rows(kind):
    make, rows_per_item, targets_per_item = KINDS[kind]
    decoder = randomised(make(condition_dropout=0.5))
    targets = decoder.prepare({"target": torch.randn(20 * targets_per_item, 4)})
    decoder.loss(torch.randn(20 * rows_per_item, 6), targets).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())
    decoder.zero_grad()
    nothing = decoder.prepare({"target": torch.zeros(0, 4)})
    term = decoder.loss(torch.zeros(0, 6), nothing)
    term.sum.backward()
    assert term.count == 0
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


def test_weights_leave_out_padding():
    decoder = randomised(head())
    targets = decoder.prepare({"target": torch.randn(4, 4)})
    rows = torch.randn(4, 6)
    masked = decoder.loss(rows, {**targets, "weight": torch.tensor([1, 1, 0, 0]).bool()})
    first = {name: value[:2] for name, value in targets.items()}
    torch.testing.assert_close(masked.mean(), decoder.loss(rows[:2], first).mean())


def test_one_time_serves_all_rows_of_an_item():
    decoder = head(rows_per_item=3)
    targets = decoder.prepare({"target": torch.zeros(6, 4)})
    assert targets["time"].shape == (2,)
    x = noised(torch.zeros(6, 4), torch.ones(6, 4), torch.tensor([0.0, 1.0]))
    assert torch.equal(x[:, 0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_draws_that_are_given_are_used_as_they_are():
    decoder = head(condition_dropout=0.5)
    given = {
        "target": torch.zeros(3, 4),
        "time": torch.full((3,), 0.5),
        "noise": torch.ones(3, 4),
        "drop": torch.tensor([True, False, True]),
    }
    prepared = decoder.prepare(given)
    assert all(prepared[name] is value for name, value in given.items())


def test_preparing_leaves_the_callers_targets_unchanged():
    given = {"target": torch.zeros(3, 4)}
    head().prepare(given)
    assert list(given) == ["target"]


def test_logit_normal_times_have_its_quantiles():
    flow = RectifiedFlow(time="logit-normal", logit_mean=1.0, logit_std=0.5)
    torch.manual_seed(0)
    time = flow.add_draws({"target": torch.zeros(40_000, 1)}, 40_000, "x")["time"]
    median, upper = time.quantile(torch.tensor([0.5, 0.8413]))
    # The quantiles' standard errors at 40,000 draws are below 0.001 here.
    assert median == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.005)
    assert upper == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.005)


def gaussian_velocity(mean, spread):
    """Velocity of the flow from Normal(0, I) to Normal(mean, spread @ spread.T), in closed form.

    x_t = (1 - t) x_0 + t z is Gaussian, so E[z - x_0 | x_t] is its linear regression on x_t.
    """
    covariance = spread @ spread.T

    def velocity(x, time):
        t = time.double()
        eye = torch.eye(len(mean), dtype=torch.double)
        of_x = (1 - t) ** 2 * covariance + t**2 * eye
        cross = t * eye - (1 - t) * covariance
        centred = x.double() - (1 - t) * mean
        return (centred @ torch.linalg.solve(of_x, cross) - mean).float()

    return velocity


@pytest.mark.parametrize(("solver", "steps"), [("euler", 200), ("heun", 40)])
def test_the_sampler_recovers_a_gaussians_mean_and_covariance(solver, steps):
    mean = torch.tensor([1.0, -2.0], dtype=torch.double)
    spread = torch.tensor([[0.8, 0.0], [0.5, 0.4]], dtype=torch.double)
    noise = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0))
    samples = integrate(gaussian_velocity(mean, spread), noise, steps=steps, solver=solver)
    # Sampling error: sqrt(0.64 / 50,000) = 0.004 a standard error; the rest is the solver's.
    torch.testing.assert_close(samples.double().mean(0), mean, atol=0.015, rtol=0)
    torch.testing.assert_close(samples.double().T.cov(), spread @ spread.T, atol=0.015, rtol=0)


def solver_error(solver: str, steps: int) -> float:
    """Distance to the exact end of dx/dt = x from x(1) = 1: x(0) = 1 / e."""
    end = integrate(lambda x, t: x, torch.ones(1), steps=steps, solver=solver)
    return abs(end.item() - math.exp(-1))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    gain = solver_error(solver, 10) / solver_error(solver, 20)
    assert math.log2(gain) == pytest.approx(order, abs=0.15)


def test_shift_moves_the_steps_towards_the_noise():
    seen = []

    def velocity(x, time):
        seen.append(time.item())
        return torch.zeros_like(x)

    integrate(velocity, torch.zeros(1), steps=2, shift=3.0)
    assert seen == pytest.approx([1.0, 3 * 0.5 / (1 + 2 * 0.5)])


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_starts_from_the_noise_given_or_the_generators(kind):
    make, rows_per_item, targets_per_item = KINDS[kind]
    decoder = randomised(make())
    rows = torch.randn(2 * rows_per_item, 6)
    noise = torch.randn(2 * targets_per_item, 4, generator=torch.Generator().manual_seed(7))
    drawn = decoder.sample(rows, steps=3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(decoder.sample(rows, steps=3, noise=noise), drawn)
    assert not drawn.requires_grad
    assert decoder.sample(rows[:0], steps=3).shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_another_number_of_rows_is_refused_not_broadcast(kind):
    make, rows_per_item, targets_per_item = KINDS[kind]
    decoder, rows = make(), torch.randn(rows_per_item, 6)
    for count in (1, 5 * targets_per_item):
        if count != targets_per_item:
            with pytest.raises(ValueError, match=rf"noise must be \[{targets_per_item}, 4\] for these rows, got"):
                decoder.sample(rows, steps=1, noise=torch.randn(count, 4))


def test_guidance_extrapolates_from_the_null_conditions_velocity():
    torch.manual_seed(0)
    decoder = randomised(head(condition_dropout=0.1))
    rows, noise = torch.randn(3, 6), torch.randn(3, 4)
    one = torch.ones(())
    null = decoder.velocity(decoder.condition_dropout.null.expand(3, 6), noise, one)
    wanted = noise - (null + 3 * (decoder.velocity(rows, noise, one) - null))
    torch.testing.assert_close(decoder.sample(rows, steps=1, guidance=3, noise=noise), wanted)


def test_guidance_without_dropped_conditions_warns_once():
    decoder, rows = head(), torch.zeros(2, 6)
    with pytest.warns(UserWarning, match="trained without dropped conditions"):
        decoder.sample(rows, steps=1, guidance=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.sample(rows, steps=1, guidance=2)


def test_dropped_items_train_the_null_condition_and_not_the_rows():
    decoder = randomised(transformer(condition_dropout=0.5))
    rows = torch.randn(4, 6, requires_grad=True)
    targets = decoder.prepare({"target": torch.randn(6, 4), "drop": torch.tensor([True, False])})
    decoder.loss(rows, targets).sum.backward()
    assert not rows.grad[:2].any() and rows.grad[2:].any()
    assert decoder.condition_dropout.null.grad.any()


def test_dropping_without_a_null_condition_is_refused():
    decoder = head()
    targets = decoder.prepare({"target": torch.zeros(1, 4), "drop": torch.tensor([True])})
    with pytest.raises(ValueError, match="learns no null condition"):
        decoder.loss(torch.zeros(1, 6), targets)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time", torch.zeros(1)),
        ("noise", torch.zeros(1, 4)),
        ("drop", torch.zeros(1).bool()),
        ("weight", torch.zeros(1)),
    ],
)
def test_draws_of_another_shape_are_refused_not_broadcast(name, value):
    decoder = head(condition_dropout=0.1)
    with pytest.raises(ValueError, match=rf"{name} must have shape \[2"):
        decoder.prepare({"target": torch.zeros(2, 4), name: value})


def test_plain_targets_are_prepared_where_the_loss_gets_them(no_run):
    decoder, rows, targets = head(), torch.randn(3, 6), {"target": torch.randn(3, 4)}
    torch.manual_seed(0)
    given = decoder.loss(rows, targets)
    torch.manual_seed(0)
    assert given == decoder.loss(rows, decoder.prepare(targets))


@pytest.mark.parametrize("steps", [0, 2.5])
def test_steps_must_be_a_positive_int(steps):
    with pytest.raises(ValueError, match="steps must be an int"):
        head().sample(torch.zeros(1, 6), steps=steps)


@pytest.mark.parametrize(("options", "match"), [({"solver": "rk4"}, "solver must be"), ({"shift": 0}, "shift must be")])
def test_bad_solver_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        head().sample(torch.zeros(1, 6), **options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: head(hidden_width=15), "even width, got 15"),
        (lambda: head(depth=0), "depth must be an int"),
        (lambda: head(target_width=0), "target_width must be an int"),
        (lambda: transformer(heads=3), "3 attention heads must divide the width 16"),
        (lambda: transformer(targets_per_item=0), "targets_per_item must be an int"),
        (lambda: transformer(condition="rows"), "condition must be one of"),
        (lambda: transformer(condition="own"), "each of 3 targets by its own row.* has 2 rows"),
        (lambda: RectifiedFlow(time="cosine"), "time must be one of"),
        (lambda: RectifiedFlow(logit_std=0), "logit_std must be positive"),
    ],
)
def test_bad_options_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_targets_that_fill_no_whole_item_are_refused():
    with pytest.raises(ValueError, match="got 4 targets, which is no whole number of items of 3"):
        transformer().num_rows({"target": torch.zeros(4, 4)})


def test_a_target_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"target must be \[N, 4\], got \[2, 5\]"):
        head().num_rows({"target": torch.zeros(2, 5)})


def test_a_tiny_head_learns_two_clusters():
    torch.manual_seed(0)
    decoder = head(width=2, target_width=1, hidden_width=32)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    labels = torch.arange(256) % 2
    rows = torch.nn.functional.one_hot(labels, 2).float()
    for _ in range(300):
        clean = (2.0 * labels - 1)[:, None] + 0.1 * torch.randn(256, 1)
        decoder.loss(rows, decoder.prepare({"target": clean})).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    samples = decoder.sample(rows, steps=20)[:, 0]
    for label, centre in ((0, -1.0), (1, 1.0)):
        cluster = samples[labels == label]
        assert cluster.mean().item() == pytest.approx(centre, abs=0.1)
        assert 0.03 < cluster.std().item() < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_does_not_count_may_be_nan(kind):
    torch.manual_seed(0)
    make, rows_per_item, targets_per_item = KINDS[kind]
    decoder = randomised(make())
    rows = torch.randn(2 * rows_per_item, 6, requires_grad=True)
    target = torch.randn(2 * targets_per_item, 4)
    weight = torch.arange(2 * targets_per_item) < targets_per_item
    target[~weight] = torch.nan
    term = decoder.loss(rows, decoder.prepare({"target": target, "weight": weight}))
    term.mean().backward()
    assert term.sum.isfinite() and term.count == targets_per_item
    assert rows.grad.isfinite().all() and rows.grad[0].any()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_what_does_not_count_is_still_seen_by_its_neighbours():
    decoder = randomised(transformer())
    rows, weight = torch.randn(2, 6), torch.tensor([1.0, 1.0, 0.0])
    given = {"time": torch.tensor([0.3]), "noise": torch.randn(3, 4), "weight": weight}
    target = torch.randn(3, 4)
    changed = target + (weight == 0)[:, None]
    losses = [decoder.loss(rows, {"target": t, **given}).sum for t in (target, changed)]
    assert losses[0] != losses[1]


def test_evaluation_drops_no_conditions():
    decoder = head(condition_dropout=0.9)
    assert "drop" in decoder.prepare({"target": torch.zeros(3, 4)})
    assert "drop" not in decoder.eval().prepare({"target": torch.zeros(3, 4)})


def test_a_row_steers_its_own_token_where_attention_mixes_nothing():
    torch.manual_seed(0)
    decoder = randomised(steered())
    for block in decoder.blocks:  # attention carries a row's news on to the other tokens
        torch.nn.init.zeros_(block.attention.out.weight)
    rows, x = torch.randn(6, 6), torch.randn(6, 4)
    changed = rows.clone()
    changed[4] += 1
    time = torch.tensor([0.2, 0.7])
    moved = decoder.velocity(rows, x, time) != decoder.velocity(changed, x, time)
    assert moved.any(dim=1).tolist() == [False, False, False, False, True, False]


def test_a_steered_transformer_has_no_places_for_a_prefix():
    assert steered().places.shape == (3, 16)
    assert transformer().places.shape == (5, 16)
    assert dict(steered().named_parameters()).keys() == dict(transformer().named_parameters()).keys()
