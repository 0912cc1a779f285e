"""What a capture of an encoder serves, with recordings for the graphs, which need a GPU (`tests/gpu`)."""

import copy

import pytest
import torch
from megatron.core.tensor_parallel import random as tracking
from torch import nn

from megatron_mimo import specs
from megatron_mimo.compat.megatron import tracker_without_forks
from megatron_mimo.training.parts.graphed import GraphedForward
from tests import tiny
from tests.recorded_graphs import record_graphs


@pytest.fixture
def captures(monkeypatch):
    """Gives an encoder's `GraphedForward` and its captures, which are recordings."""
    record_graphs(monkeypatch)

    def make(encoder: nn.Module, trains: bool = False) -> tuple[GraphedForward, list]:
        forward = GraphedForward(encoder.requires_grad_(trains))
        return forward, forward._captures

    return make


def test_replays_give_the_outputs_and_add_up_the_gradients_of_the_encoder_itself(captures):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    itself = copy.deepcopy(encoder)
    forward, kept = captures(encoder, trains=True)
    for step in range(3):
        images, direction = torch.randn(5, 4), torch.randn(5, 3)
        ours, theirs = forward(images), itself(images)
        torch.testing.assert_close(ours, theirs)
        (ours * direction).sum().backward()
        (theirs * direction).sum().backward()
        for mine, other in zip(encoder.parameters(), itself.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
            with torch.no_grad():  # a replay reads the weights of its time
                mine -= 0.1 * (step + 1)
                other -= 0.1 * (step + 1)
    assert len(kept) == 1


def test_weights_that_moved_or_train_otherwise_are_captured_again(captures):
    encoder = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    forward, _ = captures(encoder, trains=True)
    changes = [
        lambda: None,
        lambda: [setattr(weight, "data", weight.data * 2) for weight in encoder.parameters()],
        lambda: encoder[0].requires_grad_(False),
        lambda: encoder[0].requires_grad_(True),
    ]
    for change in changes:
        change()
        encoder.zero_grad()
        images = torch.randn(5, 4)
        forward(images).sum().backward()
        found = [weight.grad for weight in encoder.parameters()]
        itself = copy.deepcopy(encoder)
        itself.zero_grad()
        itself(images).sum().backward()
        for mine, other in zip(found, itself.parameters(), strict=True):
            assert (mine is None) == (other.grad is None)
            if mine is not None:
                torch.testing.assert_close(mine, other.grad)


def test_a_second_forward_pass_before_the_backward_pass_leaves_the_first_ones_memory_alone(captures):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    itself = copy.deepcopy(encoder)
    forward, kept = captures(encoder, trains=True)
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    (forward(first).sum() - 2 * forward(second).sum()).backward()
    (itself(first).sum() - 2 * itself(second).sum()).backward()
    for mine, other in zip(encoder.parameters(), itself.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert len(kept) == 2


class Summed(nn.Module):
    """Sums all that it is given, and scales."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, *more, factor: float = 1.0, **named):
        return sum(image.sum() for image in [*images, *more, *named.values()]) * self.scale * factor


def test_nested_positional_and_collected_tensors_are_inputs_and_not_kept(captures):
    forward, kept = captures(Summed())
    # Large enough for repr to shorten them to their borders, which are equal.
    first, second = torch.zeros(40, 40), torch.zeros(40, 40)
    second[20, 20] = 1.0
    assert forward([first], first, other=first) == 0
    assert forward([second], second, other=second) == 6
    assert len(kept) == 1


def test_what_is_no_tensor_has_a_capture_of_its_own(captures):
    forward, kept = captures(Summed())
    assert forward([torch.ones(2)]) == 4 and forward([torch.ones(2)], factor=2.0) == 8
    assert len(kept) == 2
    assert forward([torch.ones(2)], factor=1) == 4, "an integer is not the float of its value, and there is no room"
    assert len(kept) == 2


def test_training_and_evaluation_have_captures_of_their_own(captures):
    encoder = nn.BatchNorm1d(4)
    forward, kept = captures(encoder)
    for mode in (True, False, True):
        encoder.train(mode)
        forward(torch.randn(8, 4))
    assert len(kept) == 2


def test_objects_and_tensors_on_another_device_run_without_a_graph(captures):
    forward, kept = captures(Summed())
    hidden = type("Hidden", (), {"sum": lambda self: 3.0})()
    assert forward([torch.ones(2)], hidden) == 10
    forward([torch.ones(2, device="meta")])
    assert not kept


def test_within_a_capture_layers_switch_no_random_number_generator(single_process, monkeypatch):
    encoder, images, switches = clip(), torch.randn(2, 3, 8, 8), []
    switch = tracking._set_cuda_rng_state
    monkeypatch.setattr(
        tracking, "_set_cuda_rng_state", lambda *args, **options: switches.append(switch(*args, **options))
    )
    with tracker_without_forks():
        encoder(x=images)
    assert not switches
    encoder(x=images)
    assert switches


@pytest.mark.parametrize(
    "encoder, message",
    [
        (lambda: clip(recompute_granularity="selective"), "activation recomputation .*'selective'. cannot be captured"),
        (lambda: nn.BatchNorm1d(4), "BatchNorm1d, whose running statistics"),
        (lambda: nn.Dropout(0.1), "has dropout"),
        (lambda: clip(hidden_dropout=0.1), "has dropout"),
    ],
)
def test_encoders_that_a_replay_would_get_wrong_are_refused(encoder, message, single_process, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=message):
        GraphedForward(encoder())


def clip(**changes) -> nn.Module:
    spec = specs.clip_vit_spec(tiny.language_config(**changes), "torch", patch_dim=4, img_h=8, img_w=8)
    return spec.module(**spec.params)
