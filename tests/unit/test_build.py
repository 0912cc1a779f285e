"""What may stand where a spec is expected, and what is refused there by name."""

import functools

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo import MimoModel, MimoModelConfig, ModalitySubmodules, VisionModalitySubmodules, specs
from megatron_mimo.build import build, maker
from megatron_mimo.decoders import DiscreteDecoder, QueryInput, TargetInput
from megatron_mimo.decoders.tokenizers import built
from megatron_mimo.training import TrainingControl
from tests import tiny


class Pretrained(tiny.PatchEncoder):
    """An encoder with a constructor of another kind, as those of `transformers` have."""

    @classmethod
    def from_pretrained(cls, width: int, **options) -> "Pretrained":
        return cls(width)

    def copy(self) -> "Pretrained":
        return Pretrained(self.linear.out_features)


def made(width: int = 16) -> nn.Module:
    return tiny.PatchEncoder(width)


WAYS = {
    "a class": tiny.PatchEncoder,
    "the spec of a class": ModuleSpec(module=tiny.PatchEncoder, params={"width": 16}),
    "the spec of an import path": ModuleSpec(module=("tests.tiny", "PatchEncoder")),
    "a built module": tiny.PatchEncoder(),
    "the spec of a built module": ModuleSpec(module=tiny.PatchEncoder()),
    "a function": made,
    "the spec of a function": ModuleSpec(module=made, params={"width": 16}),
    "a partial": functools.partial(made, 16),
    "a bound method of a class": ModuleSpec(module=Pretrained.from_pretrained, params={"width": 16}),
    "a bound method of an object": Pretrained().copy,
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_makes_a_module_may_stand_where_its_spec_does(way, single_process):
    model = MimoModel(tiny.mimo_config(), {"images": tiny.image_spec(encoders={"patches": WAYS[way]})})
    assert isinstance(model.modality_submodules["images"].encoders["patches"], tiny.PatchEncoder)
    tiny.total(model, tiny.batch()).backward()


@pytest.mark.parametrize("feed", [QueryInput(hidden_size=tiny.HIDDEN, rows_per_item=1)])
@pytest.mark.parametrize("stage", [{}, {"post_process": False}])
def test_decoders_and_generation_inputs_may_be_built_too(feed, stage, single_process):
    images = tiny.image_spec(decoders={"pixels": tiny.LinearDecoder()}, generation_input=feed)
    model = MimoModel(tiny.mimo_config(), {"images": images}, **stage)
    assert model.modality_submodules["images"].generation_input is feed


@pytest.mark.parametrize("stage", [{}, {"pre_process": False}, {"post_process": False}])
def test_a_built_input_that_tells_the_answer_of_a_built_decoder_is_refused_on_every_stage(stage):
    feed = TargetInput(hidden_size=tiny.HIDDEN, target_width=tiny.PIXELS)
    spec = tiny.image_spec(decoders={"pixels": tiny.LinearDecoder()}, generation_input=feed)
    with pytest.raises(ValueError, match="learn to copy"):
        VisionModalitySubmodules.from_spec(spec, **stage)


def numbers() -> int:
    return 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("clip", r"encoders\['patches'\]: expected a ModuleSpec, a class, a function .* found 'clip'"),
        (None, r"encoders\['patches'\]: expected a ModuleSpec, .* found None"),
        (ModuleSpec(module=WAYS["the spec of a class"]), r"encoders\['patches'\]: expected a ModuleSpec"),
        (numbers, r"encoders\['patches'\]: numbers made int, expected a torch.nn.Module"),
        (functools.partial(numbers), r"encoders\['patches'\]: functools.partial.* made int"),
        (ModuleSpec(nn.Identity(), params={"a": 1}), r"encoders\['patches'\]: Identity is built, its params \['a'\]"),
        (
            ModuleSpec(nn.Identity, params={"transformer_layer_spec": specs.vision_layer_spec}),
            r"encoders\['patches'\]: transformer_layer_spec must be the spec of layers here, found <function",
        ),
    ],
)
def test_what_makes_no_module_is_refused_by_name(given, message, single_process):
    with pytest.raises(TypeError, match=message):
        MimoModel(tiny.mimo_config(), {"images": tiny.image_spec(encoders={"patches": given})})


def test_a_modality_that_is_built_already_is_refused_by_name(single_process):
    config = tiny.mimo_config(
        modality_submodules={"images": ModuleSpec(VisionModalitySubmodules()), "audio": tiny.audio_spec()}
    )
    with pytest.raises(TypeError, match=r"modality_submodules\['images'\] must be the spec of a ModalitySubmodules"):
        MimoModel(config)


class Layers:
    """Whose methods give layers, as a recipe's do."""

    def spec(self, config, vp_stage=None):
        return specs.language_layer_spec(config, vp_stage=vp_stage)

    def __call__(self, config, vp_stage=None):
        return self.spec(config, vp_stage)


@pytest.mark.parametrize("layers", [Layers().spec, Layers(), functools.partial(specs.language_layer_spec)])
def test_a_method_may_give_the_layers_of_the_language_model(layers, single_process):
    model = MimoModel(tiny.mimo_config(tiny.language_spec(transformer_layer_spec=layers)))
    assert tiny.total(model, tiny.batch()).isfinite()


def test_a_codec_is_built_from_whatever_makes_it():
    assert isinstance(built(made), tiny.PatchEncoder)
    assert maker(ModuleSpec(module=made)) is made


# One module for two modalities


def sharing(encoder, other=None) -> MimoModelConfig:
    frames = {"frames": encoder if other is None else other}
    audio = dict(encoders=frames, input_projections=[tiny.linear(16, tiny.HIDDEN)])
    images = tiny.image_spec(encoders={"patches": encoder})
    both = {"images": images, "audio": ModuleSpec(ModalitySubmodules, submodules=audio)}
    return tiny.mimo_config(modality_submodules=both)


@pytest.mark.parametrize("way", ["a built module", "a cached function"])
def test_one_module_serves_two_modalities(way, single_process):
    model = MimoModel(sharing(tiny.PatchEncoder() if way == "a built module" else functools.cache(made)))
    images, audio = (model.modality_submodules[name].encoders for name in ("images", "audio"))
    assert images["patches"] is audio["frames"]
    two = MimoModel(sharing(tiny.PatchEncoder(), tiny.PatchEncoder()))
    two.load_state_dict(model.state_dict())
    batch = tiny.batch()
    for one in (model, two):
        tiny.total(one, batch).backward()
    apart = [two.modality_submodules[name].encoders for name in ("images", "audio")]
    expected = sum(p.linear.weight.grad for encoders in apart for p in encoders.values())
    torch.testing.assert_close(images["patches"].linear.weight.grad, expected)


@pytest.mark.parametrize("way", ["a built module", "a cached function"])
@pytest.mark.parametrize("part", ["images/encoders", "audio/encoders", "audio/encoders/frames", "audio"])
def test_a_module_that_two_modalities_share_is_frozen_under_either_name(part, way, single_process):
    config = sharing(tiny.PatchEncoder() if way == "a built module" else functools.cache(made))
    control = TrainingControl(frozen=(part,))
    control.check(config)
    model = MimoModel(config)
    control.apply(model)
    assert not any(p.requires_grad for p in model.modality_submodules["images"].encoders.parameters())
    assert all(p.requires_grad for p in model.modality_submodules["images"].input_projections.parameters())


def test_a_module_that_is_put_under_a_second_name_is_frozen_under_that_name(single_process):
    model = MimoModel(tiny.mimo_config())
    shared = model.modality_submodules["images"].encoders["patches"]
    model.modality_submodules["audio"].encoders["frames"] = shared
    TrainingControl(frozen=("audio/encoders",)).apply(model)
    assert not any(parameter.requires_grad for parameter in shared.parameters())


@pytest.mark.parametrize("option", ["learning_rate", "weight_decay"])
def test_a_factor_of_a_module_under_its_second_name_is_refused(option, single_process):
    config = sharing(tiny.PatchEncoder())
    model = MimoModel(config)
    TrainingControl(**{option: {"images/encoders": 2.0}}).apply(model)
    with pytest.raises(
        ValueError, match=rf"{option}\['audio/encoders'\]: .* 'modality_submodules.images.encoders.patches"
    ):
        TrainingControl(**{option: {"audio/encoders": 2.0}}).apply(model)


# Before Megatron is there


def test_building_without_megatrons_parallel_state_says_what_to_call(single_process, monkeypatch):
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"MimoModel takes .* Call megatron_mimo.initialize\(\) first"):
        MimoModel(tiny.mimo_config())

    def parallel():
        raise AssertionError("tensor model parallel group is not initialized")

    with pytest.raises(ValueError, match=r"encoders\['a'\] takes Megatron's process groups"):
        build(parallel, {}, what="encoders['a']")
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="tensor model parallel group"):
        build(parallel, {})


# Options of samplers


def test_an_option_that_a_sampler_does_not_take_is_refused_with_those_that_it_takes(single_process):
    one = VisionModalitySubmodules(decoders={"codes": DiscreteDecoder(width=8, codebook_sizes=4)})
    message = r"options\['codes'\] has \['temprature'\], which DiscreteDecoder does not take; .* \['temperature', "
    with pytest.raises(TypeError, match=message):
        one.decode(torch.zeros(2, 8), options={"temprature": 1.0})
    with pytest.raises(TypeError, match=r"options\['codes'\] must map option -> value"):
        one.decode(torch.zeros(2, 8), options=3)
    model = MimoModel(tiny.mimo_config()).eval()
    outputs, _ = model(torch.randint(0, 60, (1, 4)))  # nothing is written here, and the option is wrong all the same
    with pytest.raises(TypeError, match=r"options\['images'\]\['pixels'\] has \['steps'\]"):
        model.decode(outputs, {"images": {"pixels": {"steps": 3}}})
    with pytest.raises(TypeError, match=r"options\['images'\] must map decoder name"):
        model.decode(outputs, {"images": 3})

    class Free(tiny.LinearDecoder):
        def sample(self, rows, **options):
            return rows

    assert VisionModalitySubmodules(decoders={"a": Free(8)}).decode(torch.zeros(2, 8), options={"any": 1}) is not None
