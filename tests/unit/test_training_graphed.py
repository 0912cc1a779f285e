"""What a capture of an encoder may serve, with a stand-in for the graphs, which need a GPU (`tests/gpu`)."""

import pytest
import torch
from megatron.core.tensor_parallel import random as tracking
from torch import nn

from megatron_mimo import specs
from megatron_mimo.compat.megatron import tracker_without_forks
from megatron_mimo.training.parts import graphed
from megatron_mimo.training.parts.graphed import GraphedForward
from tests import tiny


class Eager:
    """In place of a capture: runs what would have been captured."""

    def __init__(self, key, call, inputs, parameters) -> None:
        self.key, self.busy, self.call = key, False, call

    def replay(self, tensors):
        return self.call(*tensors)


@pytest.fixture
def captures(monkeypatch):
    """Gives an encoder's `GraphedForward` and its captures."""
    monkeypatch.setattr(graphed, "_Capture", Eager)
    monkeypatch.setattr(graphed, "_check", lambda encoder: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def make(encoder: nn.Module) -> tuple[GraphedForward, list]:
        forward = GraphedForward(encoder.requires_grad_(False))
        return forward, forward._captures

    return make


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
