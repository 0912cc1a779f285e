"""Draws of training: coordinated between ranks, resumed from a checkpoint, unmoved by recomputation."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_mimo.decoders import FlowDecoder
from megatron_mimo.draws import STATE, draws, seed_draws


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


def test_recomputation_repeats_the_draws_of_the_first_pass(tracker):
    decoder = FlowDecoder(width=6, target_width=4, hidden_width=16)
    torch.nn.init.normal_(decoder.out.weight)
    rows = torch.randn(3, 6, requires_grad=True)
    target = torch.randn(3, 4)

    def gradient(recompute: bool) -> torch.Tensor:
        reseed(0)
        targets = decoder.prepare({"target": target}, "images/pixels")

        def loss(rows):
            return decoder.loss(rows, targets).sum

        term = tensor_parallel.checkpoint(loss, False, rows) if recompute else loss(rows)
        return torch.autograd.grad(term, rows)[0] if not recompute else _backward(term, rows)

    torch.testing.assert_close(gradient(True), gradient(False))


def _backward(term: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Megatron's recomputation works with backward() alone."""
    rows.grad = None
    term.backward()
    return rows.grad


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
