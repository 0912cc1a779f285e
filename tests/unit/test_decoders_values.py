"""Numbers that mean nothing to a decoder: refused, instead of a loss or samples that are NaN."""

import pytest
import torch

from megatron_mimo import MimoModel, VisionModalitySubmodules, sample_flow, sample_one_by_one
from megatron_mimo.decoders import (
    CodeInput,
    DiscreteDecoder,
    FlowDecoder,
    FlowTargets,
    NoisedTargetInput,
    RectifiedFlow,
    RegressionDecoder,
)
from megatron_mimo.decoders.image_targets import ImageTargets
from megatron_mimo.decoders.path import integrate
from tests import tiny

NAN, INF = float("nan"), float("inf")


def flow(**changes) -> FlowDecoder:
    return FlowDecoder(**{**dict(width=8, target_width=4, hidden_width=8, depth=1), **changes})


def discrete() -> DiscreteDecoder:
    return DiscreteDecoder(width=8, codebook_sizes=4)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, "3", None, True])
@pytest.mark.parametrize("decoder", [flow, discrete])
def test_a_guidance_that_is_no_finite_number_is_refused(decoder, bad):
    with pytest.raises(ValueError, match=f"Decoder: guidance must be a finite number, got {bad!r}"):
        decoder().sample(torch.zeros(2, 8), guidance=bad)


def test_a_guidance_that_is_no_finite_number_is_refused_by_a_decoder_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from megatron_mimo.decoders import DiffusersDecoder

    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    decoder = DiffusersDecoder(
        model=unet, scheduler=diffusers.DDPMScheduler(), width=16, rows_per_item=4, sample_shape=(1, 8, 8)
    )
    with pytest.raises(ValueError, match="DiffusersDecoder: guidance must be a finite number, got nan"):
        decoder.sample(torch.zeros(4, 16), guidance=NAN)


def test_loops_with_the_language_model_refuse_what_decoders_refuse(single_process):
    feeds = {flow: NoisedTargetInput, discrete: CodeInput}
    for decoder, feed in feeds.items():
        parts = dict(
            decoders={"out": decoder()},
            output_projections=[tiny.linear(tiny.HIDDEN, 8)],
            generation_input=feed(hidden_size=tiny.HIDDEN, targets=decoder().targets),
        )
        model = MimoModel(tiny.mimo_config(), {"images": tiny.image_spec(**parts)}).eval()
        ids = torch.tensor([[1, 2, tiny.WRITE, 3]])
        with pytest.raises(ValueError, match="guidance must be a finite number, got nan"):
            if decoder is flow:
                sample_flow(model, ids, "images", guidance=NAN)
            else:
                sample_one_by_one(model, ids, "images", options={"guidance": NAN})
    with pytest.raises(TypeError, match=r"options has \['steps'\], which DiscreteDecoder does not take"):
        sample_one_by_one(model, ids, "images", options={"steps": 3})


@pytest.mark.parametrize("bad", [-0.1, 1.5, NAN, INF])
@pytest.mark.parametrize("takes", [FlowTargets(4), flow(), NoisedTargetInput(hidden_size=8, targets=FlowTargets(4))])
def test_a_flow_time_outside_its_path_is_refused(takes, bad):
    time = torch.tensor([0.5, bad])
    with pytest.raises(ValueError, match=rf"targets of images/out: time must lie in \[0, 1\], found {bad:.2}"):
        takes.prepare({"target": torch.zeros(2, 4), "time": time}, "images/out")
    assert takes.prepare({"target": torch.zeros(2, 4), "time": torch.tensor([0.0, 1.0])}).num_rows == 2


def test_a_samplers_time_outside_its_path_is_refused():
    feed = NoisedTargetInput(hidden_size=8, targets=FlowTargets(4))
    with pytest.raises(ValueError, match=r"images: time must lie in \[0, 1\], found 2.0"):
        feed.prepared({"x": torch.zeros(2, 4), "time": torch.tensor([0.5, 2.0])}, "images")


@pytest.mark.parametrize("bad", [-1, 10])
def test_a_step_that_a_scheduler_lacks_is_refused(bad):
    targets = ImageTargets(sample_shape=(1, 2, 2), rows_per_item=3, steps=10)
    with pytest.raises(ValueError, match=rf"targets of images/out: step must lie in \[0, 9\], found {bad}"):
        targets.prepare({"target": torch.zeros(1, 1, 2, 2), "step": torch.tensor([bad])}, "images/out")


TARGETS = {
    "codes": (discrete, {"codes": torch.arange(2)}),
    "vectors": (lambda: RegressionDecoder(width=8, target_width=4), {"target": torch.zeros(2, 4)}),
    "a flow": (flow, {"target": torch.zeros(2, 4)}),
}


@pytest.mark.parametrize("bad", [NAN, INF, -1.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_weight_that_means_nothing_is_refused_before_anything_runs(kind, bad):
    decoder, targets = TARGETS[kind]
    one = VisionModalitySubmodules(decoders={"out": decoder()})
    message = "targets of images/out: weight has 1 elements of 2 that are negative, infinite or NaN"
    with pytest.raises(ValueError, match=message):
        one.prepare({"out": {**targets, "weight": torch.tensor([1.0, bad])}}, "images")
    for fine in (torch.tensor([0.0, 2.5]), torch.tensor([True, False]), torch.tensor([0, 1])):
        assert one.prepare({"out": {**targets, "weight": fine}}, "images")["out"].num_rows == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectifiedFlow("logit-normal", logit_mean=NAN), "logit_mean must be a finite number, got nan"),
        (lambda: RectifiedFlow("logit-normal", logit_std=INF), "logit_std must be a finite number, got inf"),
        (lambda: RegressionDecoder(width=8, huber_delta=INF), "huber_delta must be a finite number, got inf"),
        (
            lambda: integrate(lambda x, t: x, torch.ones(1), steps=1, shift=INF),
            "shift must be a finite number, got inf",
        ),
    ],
)
def test_settings_that_are_no_finite_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
