"""Draws of training: coordinated between ranks, resumed from a checkpoint, unmoved by recomputation."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_mimo.decoders import FlowDecoder, NoisedTargetInput
from megatron_mimo.draws import STATE, draws, seed_draws
from tests import tiny
from tests.distributed.cases import decoders as cases


def numbers(stream: str) -> torch.Tensor:
    with draws(stream):
        return torch.randn(4)


def reseed(rank: int) -> None:
    """The tracker as a rank of this data-parallel index starts with it."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    seed_draws(1234, rank)


@pytest.fixture
def tracker(single_process):
    """Megatron's tracker, put back as it was after the test."""
    kept = get_cuda_rng_tracker().get_states()
    reseed(0)
    yield get_cuda_rng_tracker
    get_cuda_rng_tracker().set_states(kept)


def test_one_data_parallel_rank_repeats_itself_and_others_differ(tracker):
    first = numbers("images/pixels/noise")
    reseed(0)
    assert torch.equal(numbers("images/pixels/noise"), first)
    reseed(1)
    assert not torch.equal(numbers("images/pixels/noise"), first)


def test_a_stream_does_not_depend_on_what_others_drew(tracker):
    alone = [numbers("a"), numbers("a")]
    reseed(0)
    mixed = [numbers("a"), numbers("b"), numbers("a")]
    assert torch.equal(mixed[0], alone[0]) and torch.equal(mixed[2], alone[1])
    assert not torch.equal(mixed[1], alone[0]) and not torch.equal(*alone)


def test_draws_leave_the_default_generator_where_it_was(tracker):
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    numbers("a")
    assert torch.equal(torch.randn(3), wanted)


def test_a_checkpoint_of_the_trackers_states_resumes_them(tracker):
    numbers("a")
    saved = {name: state.clone() for name, state in tracker().get_states().items()}
    wanted = [numbers("a"), numbers("new")]
    reseed(7)  # a fresh process before it loads
    tracker().set_states(saved)
    assert torch.equal(numbers("a"), wanted[0])
    assert torch.equal(numbers("new"), wanted[1])


RECOMPUTED = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def trained_once(**language) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int]]:
    """Loss and gradients of one step of a model that draws time, noise, dropped conditions and dropout
    masks, and how often each layer of its language model ran."""
    reseed(0)
    torch.manual_seed(2)
    config = tiny.language_config(hidden_dropout=0.1, **language)
    kind = cases.kinds()["flow"]
    model = cases.build(kind, tiny.language_spec(config))
    cases.spread(model)
    runs = [0] * config.num_layers
    for index, layer in enumerate(model.language_model.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    given = kind.targets(3)
    tokens, targets = cases.batch(("two", "edge")), {key: given[key] for key in ("target", "weight")}
    counts = {"text": tokens["loss_mask"].sum(), "images/out": torch.tensor(9.0)}
    loss = cases.step(model, tokens, targets, counts)
    return loss, {name: p.grad for name, p in model.named_parameters()}, runs


def test_recomputation_repeats_the_draws_of_the_first_pass(tracker):
    loss, gradients, runs = trained_once()
    again, recomputed, twice = trained_once(**RECOMPUTED)
    assert (runs, twice) == ([1, 1], [2, 2])
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert gradient.any() or name.endswith("null"), name  # perhaps no condition was dropped
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def prepared_noise(module: torch.nn.Module) -> torch.Tensor:
    return module.prepare({"target": torch.zeros(3, 4)}, "images/out")["noise"]


@pytest.mark.parametrize("kind", ["decoder", "input"])
def test_training_draws_do_not_depend_on_whether_evaluation_ran(tracker, kind):
    if kind == "decoder":
        module = FlowDecoder(width=6, target_width=4, hidden_width=16)
    else:
        module = NoisedTargetInput(hidden_size=6, target_width=4)
    unbroken = [prepared_noise(module), prepared_noise(module)]
    reseed(0)
    assert torch.equal(prepared_noise(module), unbroken[0])
    evaluated = prepared_noise(module.eval())
    assert torch.equal(prepared_noise(module.train()), unbroken[1])
    assert not any(torch.equal(evaluated, noise) for noise in unbroken)


def test_decoder_and_input_evaluate_at_the_same_point_on_the_path(tracker):
    decoder = FlowDecoder(width=6, target_width=4, hidden_width=16).eval()
    feed = NoisedTargetInput(hidden_size=6, target_width=4).eval()
    noise = prepared_noise(decoder)
    reseed(0)
    assert torch.equal(prepared_noise(feed), noise)


def test_the_base_state_is_never_advanced(tracker):
    before = tracker().get_states()[STATE].clone()
    numbers("a")
    assert torch.equal(tracker().get_states()[STATE], before)


def test_without_a_seeded_tracker_one_process_draws_from_torchs_generator(tracker):
    tracker().set_states({})
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    assert torch.equal(numbers("a"), wanted)


def test_several_ranks_without_a_seeded_tracker_are_refused(tracker, monkeypatch):
    tracker().set_states({})
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="no state 'mimo-draws'.*seed_draws"):
        numbers("a")


def test_generators_of_a_graph_safe_tracker_seed_streams_too():
    from megatron_mimo.draws import _stream_seed

    state = torch.Generator().manual_seed(9)
    assert _stream_seed(state, "a") == _stream_seed(state.get_state(), "a")
    assert _stream_seed(state, "a") != _stream_seed(state, "b")
