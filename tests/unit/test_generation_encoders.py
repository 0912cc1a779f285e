"""Encoders that a session records: which of them, from which call on, and that they come back as they were."""

import numpy
import torch
from torch import nn

from megatron_mimo.generation.encoders import MOST_FORMS, RecordedForward, recorded_encoders
from tests.generating import model_of

NUMBER = numpy.float32(0.5)  # not among the kinds of values that are known to hold no tensor


class Steps:
    """In place of a recorder of CUDA graphs: the first run of a key captures, and every later one replays."""

    def __init__(self) -> None:
        self.captured: dict = {}
        self.replays = 0

    def run(self, key, step, changing) -> None:
        assert changing == []
        if key not in self.captured:
            self.captured[key] = step
        else:
            self.replays += 1
        self.captured[key]()


class Encoder(nn.Module):
    """Counts its calls by what they ask of the host."""

    def __init__(self, waits: bool = False) -> None:
        super().__init__()
        self.linear, self.waits, self.calls = nn.Linear(4, 3), waits, 0

    def forward(self, x, scale=1.0, mask=None):
        self.calls += 1
        if self.waits:
            x = x[: int(x.shape[0] * x.new_ones(()).item())]
        return self.linear(x if mask is None else x * mask) * scale


def recorded(encoder: nn.Module) -> tuple[RecordedForward, Steps]:
    steps = Steps()
    return RecordedForward("images/vit", encoder, steps, torch.device("cpu")), steps


@torch.no_grad()
def test_from_the_second_call_of_a_form_on_other_values_go_through_the_recording():
    encoder = Encoder()
    forward, steps = recorded(encoder)
    for call, keywords in enumerate([dict(), dict(scale=2.0), dict(), dict(scale=2.0), dict(), dict(scale=2.0)]):
        x = torch.randn(2, 4)
        torch.testing.assert_close(forward(x=x, **keywords), encoder.linear(x) * keywords.get("scale", 1.0))
        assert len(steps.captured) == (0, 0, 1, 2, 2, 2)[call]
    assert steps.replays == 2
    x = torch.randn(2, 4)
    kept = x.clone()
    forward(x=x)
    assert torch.equal(x, kept)


@torch.no_grad()
def test_inputs_of_another_form_are_recorded_apart_up_to_a_number():
    encoder = Encoder()
    forward, steps = recorded(encoder)
    for rows in range(20, 60):  # forms that come once take no place
        forward(torch.randn(rows, 4))
    for rows in range(1, MOST_FORMS + 3):
        for _ in range(2):
            x, mask = torch.randn(rows, 4), torch.randn(rows, 4)
            torch.testing.assert_close(forward(x, mask=mask), encoder.linear(x * mask))
    assert len(steps.captured) == MOST_FORMS


@torch.no_grad()
def test_numbers_that_are_equal_and_of_other_types_are_other_forms():
    encoder = Encoder()
    forward, steps = recorded(encoder)
    for scale in (1, 1.0, True) * 2:
        forward(x=torch.randn(2, 4), scale=scale)
    assert len(steps.captured) == 3


@torch.no_grad()
def test_an_encoder_that_waits_for_the_host_runs_as_it_is(caplog):
    encoder = Encoder(waits=True)
    forward, steps = recorded(encoder)
    with caplog.at_level("INFO", logger="megatron_mimo.generation.encoders"):
        for _ in range(4):
            x = torch.randn(2, 4)
            torch.testing.assert_close(forward(x=x), encoder.linear(x))
    assert not steps.captured and encoder.calls == 4
    assert [record.getMessage() for record in caplog.records] == [
        "generation: encoder images/vit is not recorded, because of aten._local_scalar_dense.default, which the host "
        "waits for"
    ]


def test_gradients_tensors_elsewhere_and_other_objects_go_through_no_recording():
    encoder = Encoder()
    forward, steps = recorded(encoder)
    for _ in range(3):
        x = torch.randn(2, 4, requires_grad=True)
        forward(x=x).sum().backward()
        assert x.grad is not None
    with torch.no_grad():
        for _ in range(3):
            forward(x=torch.randn(2, 4), scale=NUMBER)
            encoder.to("meta")
            assert forward(x=torch.randn(2, 4, device="meta")).device.type == "meta"
            encoder.to_empty(device="cpu")
    assert not steps.captured and encoder.calls == 9


def test_encoders_come_back_as_they_were(single_process):
    model = model_of("rope")
    encoders = [encoder for one in model.modality_submodules.values() for encoder in one.encoders.values()]
    own, replaced = encoders[0], encoders[0].forward
    own.forward = replaced
    with recorded_encoders(model, Steps()):
        assert own.forward is replaced
    del own.forward
    with recorded_encoders(model, Steps()):
        assert all(isinstance(encoder.forward, RecordedForward) for encoder in encoders)
    assert encoders and not any("forward" in vars(encoder) for encoder in encoders)
