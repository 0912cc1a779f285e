"""Encoders, projections and decoders of one modality, without a language model."""

import inspect

import pytest
import torch
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo import (
    AudioModalitySubmodules,
    LossTerm,
    ModalitySubmodules,
    VisionModalitySubmodules,
)
from megatron_mimo.decoders import (
    CodeInput,
    CodeTokenizer,
    DiscreteDecoder,
    FlowDecoder,
    NoisedTargetInput,
    RectifiedFlow,
    RegressionDecoder,
    TargetInput,
)
from megatron_mimo.decoders.targets import CodeTargets, FlowTargets, VectorTargets
from megatron_mimo.modality.encoding import EncodedRows
from megatron_mimo.modality.fit import check_widths, input_width, output_width
from tests import tiny


class Returns(nn.Module):
    """An encoder that returns what it was made with, times a weight."""

    def __init__(self, output, wrap=lambda x: x):
        super().__init__()
        self.output, self.wrap = output, wrap
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x=None):
        return self.wrap(self.output * self.weight)


FED = {"x": None}


@pytest.mark.parametrize(
    "encoder, rows",
    [
        (Returns(torch.ones(2, 3, 4)), 6),
        (Returns(torch.ones(5, 4)), 5),
        (Returns(torch.ones(5, 4), lambda x: (x, "state")), 5),
        (Returns(torch.ones(2, 3, 4), lambda x: {"last_hidden_state": x, "pooled": x[:, 0]}), 6),
        (Returns(torch.ones(0, 4)), 0),
    ],
)
def test_encoder_outputs_become_rows(encoder, rows):
    assert VisionModalitySubmodules({"a": encoder}).encode({"a": FED}).shape == (rows, 4)


def test_rows_of_several_encoders_follow_each_other():
    encoders = {"a": Returns(torch.zeros(2, 1, 4)), "b": Returns(torch.ones(2, 2, 4))}
    both = {"a": FED, "b": FED}
    one_after_the_other = VisionModalitySubmodules(encoders, combine="concatenate").encode(both)
    assert one_after_the_other[:, 0].tolist() == [0, 0, 1, 1, 1, 1]
    item_by_item = VisionModalitySubmodules(encoders, combine="interleave").encode(both)
    assert item_by_item[:, 0].tolist() == [0, 1, 1, 0, 1, 1]


def test_encoders_of_different_width_have_a_projection_each():
    images = VisionModalitySubmodules(
        {"a": Returns(torch.ones(2, 3)), "b": Returns(torch.ones(4, 5))},
        input_projections=[nn.Linear(3, 8), nn.Linear(5, 8)],
        combine="concatenate",
    )
    assert images.encode({"a": FED, "b": FED}).shape == (6, 8)
    assert images.encode({"b": FED}).shape == (4, 8)


def test_an_encoder_without_input_is_skipped_and_gets_zero_gradients():
    encoders = {"a": Returns(torch.ones(2, 3)), "b": Returns(torch.ones(2, 3))}
    projections = [nn.Linear(3, 4), nn.Linear(3, 4)]
    encoders["b"].forward = lambda x=None: pytest.fail("ran without input")
    images = VisionModalitySubmodules(encoders, input_projections=projections)
    images.encode({"a": FED}).sum().backward()
    assert encoders["a"].weight.grad != 0
    assert encoders["b"].weight.grad == 0 and projections[1].weight.grad.eq(0).all()


def test_a_projection_that_leaves_out_its_bias_gets_it_added():
    class Deferred(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight), self.bias

    projection = Deferred(3, 4)
    images = VisionModalitySubmodules({"a": Returns(torch.ones(2, 3))}, input_projections=[projection])
    expected = nn.functional.linear(torch.ones(2, 3), projection.weight, projection.bias)
    torch.testing.assert_close(images.encode({"a": FED}), expected)


def test_a_decoders_rows_come_from_its_own_projection_bias_included():
    class Deferred(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight), self.bias

    decoders = {"a": tiny.LinearDecoder(width=4), "b": tiny.LinearDecoder(width=4)}
    projections = [Deferred(3, 4), nn.Linear(3, 4)]
    images = VisionModalitySubmodules(decoders=decoders, output_projections=projections)
    hidden = torch.randn(2, 3)
    for name, projection in zip("ab", projections):
        expected = nn.functional.linear(hidden, projection.weight, projection.bias)
        torch.testing.assert_close(images.rows_for(name, hidden), expected)
    assert VisionModalitySubmodules(decoders={"a": decoders["a"]}).rows_for("a", hidden) is hidden
    with pytest.raises(ValueError, match="decoder 'c' is not one of"):
        images.rows_for("c", hidden)


def test_an_overridden_encode_may_call_the_default():
    class Doubled(VisionModalitySubmodules):
        def encode(self, inputs):
            return 2 * super().encode(inputs)

    doubled = Doubled({"a": Returns(torch.ones(5, 4))})
    assert doubled.encode({"a": FED}).sum() == 40
    assert doubled.encode_items({"a": FED}).rows_per_item is None


def test_rows_per_item_are_known_of_the_default_encodes_rows_and_unknown_of_anyone_elses():
    encoders = {"a": Returns(torch.ones(2, 3, 4)), "b": Returns(torch.ones(2, 1, 4))}
    given = {"a": FED, "b": FED}

    class Passed(VisionModalitySubmodules):
        def encode(self, inputs):
            return super().encode(inputs)

    class Doubled(VisionModalitySubmodules):
        def encode(self, inputs):
            return 2 * super().encode(inputs)

    class Told(Doubled):
        def encode_items(self, inputs, where="inputs"):
            return EncodedRows(self.encode(inputs), [8])

    for kind in (VisionModalitySubmodules, Passed):
        assert kind(encoders, combine="interleave").encode_items(given).rows_per_item == [4, 4]
        assert kind(encoders, combine="concatenate").encode_items(given).rows_per_item == [3, 3, 1, 1]
    assert Doubled(encoders, combine="interleave").encode_items(given).rows_per_item is None
    assert Told(encoders, combine="interleave").encode_items(given).rows_per_item == [8]


def test_an_overridden_encode_gives_its_inputs_any_meaning():
    class Counts(VisionModalitySubmodules):
        def encode(self, inputs):
            return torch.zeros(inputs["how many"], 4)

    assert Counts({"a": Returns(torch.ones(1, 4))}).encode_items({"how many": 3}).rows.shape == (3, 4)


def test_calling_a_submodule_encodes():
    images = VisionModalitySubmodules({"a": Returns(torch.ones(2, 3, 4))})
    assert torch.equal(images({"a": FED}), images.encode({"a": FED}))


@pytest.mark.parametrize(
    ("kind", "own"), [(VisionModalitySubmodules, "image_shape"), (AudioModalitySubmodules, "frames_per_clip")]
)
def test_constructors_name_what_they_take(kind, own):
    base = list(inspect.signature(ModalitySubmodules).parameters.values())
    found = list(inspect.signature(kind).parameters.values())
    assert found[:-1] == base
    assert (found[-1].name, found[-1].kind, found[-1].default) == (own, inspect.Parameter.KEYWORD_ONLY, None)


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        ({"b": FED}, ValueError, r"inputs has inputs for encoder 'b', but the modality's encoders are \['a'\]"),
        ({"a": torch.zeros(1)}, TypeError, r"inputs\['a'\] must map keyword -> value, got Tensor"),
        ({"a": {"y": 1}}, TypeError, r"inputs\['a'\] has keyword 'y'; Returns takes \['x'\]"),
        (torch.zeros(1), TypeError, "inputs must map encoder name -> its inputs, got Tensor"),
    ],
)
def test_inputs_that_no_encoder_takes_are_refused_before_any_encoder_runs(inputs, error, match):
    images = VisionModalitySubmodules({"a": Returns(torch.ones(1, 4))})
    images.encoders["a"].register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(error, match=match):
        images.encode(inputs)


def test_inputs_are_cast_to_what_the_encoder_computes_in():
    images = VisionModalitySubmodules({"a": nn.Linear(3, 4).bfloat16()})
    assert images.encode({"a": {"input": torch.ones(2, 3)}}).dtype == torch.bfloat16


def test_inputs_may_go_by_the_modalitys_names():
    class Takes(nn.Module):
        def forward(self, x):
            return x

    x = torch.ones(2, 3)
    assert VisionModalitySubmodules({"a": Takes()}).encode({"a": {"pixel_values": x}}) is not None
    assert AudioModalitySubmodules({"a": Takes()}).encode({"a": {"input_features": x}}).shape == (2, 3)


def test_an_encoder_with_any_keywords_gets_them_unchanged():
    class Anything(nn.Module):
        def forward(self, **inputs):
            return inputs["pixel_values"]

    images = VisionModalitySubmodules({"a": Anything()})
    assert images.encode({"a": {"pixel_values": torch.ones(1, 2), "other": 2}}).shape == (1, 2)


def test_decoders_share_a_projection_or_have_their_own():
    for projections in ([nn.Linear(6, 8)], [nn.Linear(6, 8), nn.Linear(6, 8)]):
        decoders = {"a": tiny.LinearDecoder(width=8), "b": tiny.LinearDecoder(width=8)}
        images = VisionModalitySubmodules(decoders=decoders, output_projections=projections)
        hidden = torch.randn(3, 6, requires_grad=True)
        terms = images.loss(hidden, {"b": {"pixels": torch.zeros(3, tiny.PIXELS)}})
        assert terms["a"].count == 0 and terms["b"].count == 3 * tiny.PIXELS
        (terms["a"].sum + terms["b"].sum).backward()
        assert all(parameter.grad is not None for parameter in images.parameters())
        assert images.decode(hidden, "a").shape == (3, tiny.PIXELS)


def test_without_any_targets_every_parameter_gets_zeros():
    images = VisionModalitySubmodules(decoders={"a": tiny.LinearDecoder(width=8)}, output_projections=[nn.Linear(6, 8)])
    terms = images.loss(torch.ones(4, 6), {})
    assert isinstance(terms["a"], LossTerm)
    terms["a"].sum.backward()
    assert all(parameter.grad.eq(0).all() for parameter in images.parameters())


def test_context_parallel_shares_add_up():
    torch.manual_seed(0)
    images = VisionModalitySubmodules(decoders={"a": tiny.LinearDecoder(width=8)})
    hidden, targets = torch.randn(5, 8), {"a": {"pixels": torch.randn(5, tiny.PIXELS)}}
    whole = images.loss(hidden, targets)["a"]
    parts = [images.loss(hidden, targets, share=(rank, 3))["a"] for rank in range(3)]
    torch.testing.assert_close(sum(part.sum for part in parts), whole.sum)
    assert sum(part.count for part in parts) == whole.count


def test_decode_assembles_images_and_waveforms():
    class Patches(tiny.LinearDecoder):
        def sample(self, rows):
            return rows

    images = VisionModalitySubmodules(decoders={"a": Patches(width=4)}, image_shape=(1, 4, 4))
    assert images.decode(torch.zeros(8, 4)).shape == (2, 1, 4, 4)
    plain = VisionModalitySubmodules(decoders={"a": Patches(width=4)})
    assert plain.decode(torch.zeros(8, 4)).shape == (8, 4)
    audio = AudioModalitySubmodules(decoders={"a": Patches(width=4)}, frames_per_clip=2)
    assert audio.decode(torch.zeros(8, 4)).shape == (4, 8)
    assert audio.assemble(torch.zeros(2, 3, 4)).shape == (2, 3, 4)


def test_sampling_options_reach_the_decoder():
    class Scaled(tiny.LinearDecoder):
        def sample(self, rows, scale=1.0):
            return rows * scale

    images = VisionModalitySubmodules(decoders={"a": Scaled(width=4)})
    assert images.decode(torch.ones(1, 4), options={"scale": 3.0}).sum() == 12


def test_unconditional_rows_go_through_the_output_projection():
    class Guided(tiny.LinearDecoder):
        def sample(self, rows, unconditional_rows=None):
            return rows - unconditional_rows

    projection = nn.Linear(3, 4)
    images = VisionModalitySubmodules(decoders={"a": Guided(width=4)}, output_projections=[projection])
    hidden, without = torch.randn(2, 3), torch.randn(2, 3)
    found = images.decode(hidden, options={"unconditional_rows": without})
    torch.testing.assert_close(found, projection(hidden) - projection(without))


def two(rule_a, rule_b):
    return {"a": tiny.LinearDecoder(8, rule_a), "b": tiny.LinearDecoder(8, rule_b)}


A, B = Returns(torch.ones(2, 3)), Returns(torch.ones(2, 3))
MISTAKES = {
    "different images": (
        lambda: ModalitySubmodules({"a": Returns(torch.ones(2, 1, 4)), "b": Returns(torch.ones(3, 1, 4))}).encode(
            {"a": FED, "b": FED}
        ),
        "combine=None .* found .*2 items.*3 items.* Set combine='concatenate'",
    ),
    "combine": (lambda: ModalitySubmodules(combine="sum"), "combine must be"),
    "two projections for three": (
        lambda: ModalitySubmodules({"a": A, "b": B, "c": A}, input_projections=[nn.Linear(3, 4)] * 2),
        "2 input_projections for 3 encoders",
    ),
    "encoder and projection": (
        lambda: ModalitySubmodules({"a": nn.Linear(2, 3)}, input_projections=[nn.Linear(4, 5)]),
        "encoder 'a' gives width 3, but its input projection takes width 4",
    ),
    "projection and decoder": (
        lambda: ModalitySubmodules(decoders={"a": tiny.LinearDecoder(8)}, output_projections=[nn.Linear(4, 5)]),
        "gives width 5, but decoder 'a' takes width 8",
    ),
    "position rules": (
        lambda: ModalitySubmodules(decoders=two("own", "predecessor")),
        "must read the same positions",
    ),
    "input that tells the answer": (
        lambda: ModalitySubmodules(
            decoders={"a": tiny.LinearDecoder(8)},
            generation_input=TargetInput(hidden_size=8, target_width=2),
        ),
        "learn to copy",
    ),
    "unequal widths": (
        lambda: ModalitySubmodules({"a": A, "b": Returns(torch.ones(2, 4))}).encode({"a": FED, "b": FED}),
        "differ in width",
    ),
    "interleaving flat rows": (
        lambda: ModalitySubmodules({"a": A, "b": B}, combine="interleave").encode({"a": FED, "b": FED}),
        r"combine='interleave' .* needs \[n, s, h\] or EncodedRows",
    ),
    "interleaving unequal counts": (
        lambda: ModalitySubmodules(
            {"a": Returns(torch.ones(2, 1, 4)), "b": Returns(torch.ones(3, 1, 4))}, combine="interleave"
        ).encode({"a": FED, "b": FED}),
        "combine='interleave' .* found .*2 items.*3 items",
    ),
    "one dim": (
        lambda: ModalitySubmodules({"a": Returns(torch.ones(4))}).encode({"a": FED}),
        r"returned shape \[4\]",
    ),
    "no such decoder": (
        lambda: ModalitySubmodules(decoders=two("own", "own")).decode(torch.ones(1, 8), "c"),
        "decoder 'c' is not one of",
    ),
    "which decoder": (
        lambda: ModalitySubmodules(decoders=two("own", "own")).decode(torch.ones(1, 8)),
        "decoder None is not one of",
    ),
    "decoder without projection": (
        lambda: check_widths("images", 16, {}, {"a": tiny.LinearDecoder(8)}, [], []),
        "'images': decoder 'a' has row width 8",
    ),
    "encoder without projection": (
        lambda: check_widths("images", 16, {"a": nn.Linear(2, 3)}, {}, [], []),
        "encoder 'a' has output width 3",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case):
    mistake, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        mistake()


FLOW = dict(width=8, target_width=4, hidden_width=8, depth=1)
LOGIT_NORMAL = RectifiedFlow("logit-normal")
DISAGREEING = {
    "flow": (FlowDecoder, FLOW, NoisedTargetInput, dict(target_width=4, flow=LOGIT_NORMAL)),
    "rows_per_item": (FlowDecoder, FLOW, NoisedTargetInput, dict(target_width=4, rows_per_item=3)),
    "target_width": (FlowDecoder, FLOW, NoisedTargetInput, dict(target_width=6)),
    "target_width of one row": (
        RegressionDecoder,
        dict(width=8, target_width=3, position_rule="predecessor"),
        TargetInput,
        dict(target_width=4),
    ),
    "codebook_sizes": (DiscreteDecoder, dict(width=8, codebook_sizes=16), CodeInput, dict(codebook_sizes=(8,))),
}
STAGES = ({}, {"pre_process": False}, {"post_process": False})


def writing(decoder: ModuleSpec, feed: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(ModalitySubmodules, submodules={"decoders": {"out": decoder}, "generation_input": feed})


@pytest.mark.parametrize("case", DISAGREEING)
def test_a_generation_input_that_is_described_otherwise_than_its_decoder_is_refused(case):
    decoder, settings, feed, fed = DISAGREEING[case]
    fed = dict(hidden_size=8, **fed)
    spec = writing(ModuleSpec(decoder, settings), ModuleSpec(feed, fed))
    for stage in ({}, {"post_process": False}):
        with pytest.raises(ValueError, match=f"{feed.__name__} is given .*, but its decoder's targets are"):
            ModalitySubmodules.from_spec(spec, **stage)
    with pytest.raises(ValueError, match=f"decoder 'out' learns .*{feed.__name__} that reads its targets was built"):
        ModalitySubmodules(decoders={"out": decoder(**settings)}, generation_input=feed(**fed))


DESCRIBED = {
    "codes": (DiscreteDecoder, dict(width=8), dict(codebook_sizes=(4, 5)), CodeTargets((4, 5)), CodeInput),
    "vectors": (
        RegressionDecoder,
        dict(width=8, position_rule="predecessor"),
        dict(target_width=3),
        VectorTargets(3),
        TargetInput,
    ),
    "flow": (
        FlowDecoder,
        dict(width=8, hidden_width=8, depth=1),
        dict(target_width=4, rows_per_item=2, flow=LOGIT_NORMAL),
        FlowTargets(4, flow=LOGIT_NORMAL, rows_per_item=2),
        NoisedTargetInput,
    ),
}


@pytest.mark.parametrize("case", DESCRIBED)
def test_one_description_named_once_serves_both_ends_on_every_stage(case):
    decoder, params, keywords, described, feed = DESCRIBED[case]
    for named in (keywords, {"targets": described}):
        spec = writing(ModuleSpec(decoder, {**params, **named}), ModuleSpec(feed, dict(hidden_size=8)))
        whole, last, first = (ModalitySubmodules.from_spec(spec, **stage) for stage in STAGES)
        assert whole.generation_input.targets is whole.decoders["out"].targets
        assert (
            whole.decoders["out"].targets == last.decoders["out"].targets == first.generation_input.targets == described
        )
        assert not first.decoders and last.generation_input is None


def test_a_tokenizer_named_once_encodes_on_both_stages():
    class Thirds(nn.Module):
        def encode(self, media):
            return (media * 3).long()

        def decode(self, codes):
            return codes / 3

    tokenizer = ModuleSpec(CodeTokenizer, dict(module=Thirds(), grid=(2,)))
    decoder = ModuleSpec(DiscreteDecoder, dict(width=8, codebook_sizes=3, tokenizer=tokenizer))
    whole, last, first = (
        ModalitySubmodules.from_spec(writing(decoder, ModuleSpec(CodeInput, dict(hidden_size=8))), **stage)
        for stage in STAGES
    )
    media = {"out": {"media": torch.tensor([[0.1, 0.4], [0.9, 0.5]])}}
    for submodule in (whole, last, first):
        prepared = submodule.prepare(media, "images")["out"]
        assert (prepared["codes"].tolist(), prepared.num_rows) == ([0, 1, 2, 1], 4)
    assert whole.generation_input.tokenizer is whole.decoders["out"].tokenizer
    assert first.medium_of("out") == last.medium_of("out") == 2


def test_keywords_of_an_input_that_its_decoders_description_serves_warn_and_work():
    decoder = ModuleSpec(DiscreteDecoder, dict(width=8, codebook_sizes=4))
    spec = writing(decoder, ModuleSpec(CodeInput, dict(hidden_size=8, codebook_sizes=4)))
    with pytest.warns(DeprecationWarning, match=r"CodeInput needs no \['codebook_sizes'\] beside the decoder's"):
        assert ModalitySubmodules.from_spec(spec).generation_input.targets == CodeTargets(4)


def test_an_input_without_any_description_says_where_one_comes_from():
    with pytest.raises(ValueError, match="CodeInput: expected a description of the decoder's targets, found none"):
        CodeInput(hidden_size=8)
    with pytest.raises(TypeError, match="CodeInput shows CodeTargets, but its decoder writes VectorTargets"):
        CodeInput(hidden_size=8, targets=VectorTargets(3))
    with pytest.raises(ValueError, match="shows one target a row, but its decoder has 5 targets for 2 rows"):
        NoisedTargetInput(hidden_size=8, targets=FlowTargets(4, rows_per_item=2, targets_per_item=5))


class Counted(CodeTargets):
    """Codes whose rows are counted as often as someone asks."""

    asked = 0

    def num_rows(self, targets, where=""):
        Counted.asked += 1
        return super().num_rows(targets, where)


def test_targets_are_checked_and_counted_once_a_microbatch():
    decoder = DiscreteDecoder(width=8, targets=Counted(4))
    submodule = ModalitySubmodules(
        decoders={"out": decoder}, generation_input=CodeInput(hidden_size=8, targets=decoder.targets)
    )
    prepared = submodule.prepare({"out": {"codes": torch.arange(4)}}, "images")
    submodule.generation_rows(submodule.generation_input.pick(prepared), 4, torch.zeros(1, 8))
    hidden = torch.zeros(4, 8)
    submodule.loss(hidden, prepared)
    submodule.loss(hidden, prepared, share=(1, 2))
    assert Counted.asked == 1
    submodule.loss(hidden, {"out": {"codes": torch.arange(4)}})  # someone's plain targets are checked there
    assert Counted.asked == 2


def test_an_input_that_tells_the_answer_is_refused_on_every_stage():
    decoder = ModuleSpec(DiscreteDecoder, dict(width=8, codebook_sizes=4, position_rule="own"))
    for stage in STAGES:
        with pytest.raises(ValueError, match="learn to copy"):
            ModalitySubmodules.from_spec(writing(decoder, ModuleSpec(CodeInput, dict(hidden_size=8))), **stage)


def test_an_input_is_given_the_description_of_the_decoder_that_it_names():
    decoders = {"a": ModuleSpec(FlowDecoder, FLOW), "b": ModuleSpec(FlowDecoder, {**FLOW, "target_width": 6})}
    for named, width in (("a", 4), ("b", 6)):
        feed = ModuleSpec(NoisedTargetInput, dict(hidden_size=8, decoder=named))
        spec = ModuleSpec(ModalitySubmodules, submodules={"decoders": decoders, "generation_input": feed})
        assert ModalitySubmodules.from_spec(spec).generation_input.targets.width == width
        assert ModalitySubmodules.from_spec(spec, post_process=False).generation_input.targets.width == width
    feed = ModuleSpec(NoisedTargetInput, dict(hidden_size=8, target_width=4))
    spec = ModuleSpec(ModalitySubmodules, submodules={"decoders": decoders, "generation_input": feed})
    assert ModalitySubmodules.from_spec(spec).generation_input.targets.width == 4  # each batch's targets say whose


def test_an_encoder_must_return_a_tensor():
    with pytest.raises(TypeError, match="encoder 'a' returned str"):
        ModalitySubmodules({"a": Returns(torch.ones(1, 2), str)}).encode({"a": FED})


def test_sequence_parallel_projections_and_vision_models_are_refused():
    config = tiny.language_config(tensor_model_parallel_size=2, sequence_parallel=True)
    for parts in ({"input_projections": [MegatronModule(config)]}, {"encoders": {"a": VisionModule(config)}}):
        with pytest.raises(ValueError, match="sequence_parallel=True"):
            ModalitySubmodules(**parts)


def test_from_spec_builds_one_stage_only():
    spec = tiny.image_spec()
    first = VisionModalitySubmodules.from_spec(spec, post_process=False)
    assert first.encoders and first.input_projections
    assert not first.decoders and not first.output_projections
    last = VisionModalitySubmodules.from_spec(spec, pre_process=False)
    assert last.decoders and last.output_projections and not last.encoders


def test_modules_that_take_process_groups_get_them():
    class Wants(nn.Module):
        def __init__(self, pg_collection=None):
            super().__init__()
            self.groups = pg_collection

    spec = ModuleSpec(module=VisionModalitySubmodules, submodules={"encoders": {"a": ModuleSpec(module=Wants)}})
    groups = object()
    assert VisionModalitySubmodules.from_spec(spec, pg_collection=groups).encoders["a"].groups is groups
    given = ModuleSpec(module=Wants, params={"pg_collection": 1})
    spec = ModuleSpec(module=VisionModalitySubmodules, submodules={"encoders": {"a": given}})
    assert VisionModalitySubmodules.from_spec(spec, pg_collection=groups).encoders["a"].groups == 1


def test_widths_of_what_does_not_tell_are_unknown():
    assert output_width(nn.Sequential(nn.Linear(2, 3), nn.Flatten())) is None
    assert input_width(nn.Conv2d(1, 2, 3)) is None
    assert output_width(nn.Sequential(nn.Linear(2, 3), nn.GELU())) == 3
    assert output_width(nn.Sequential()) is None and input_width(nn.Sequential()) is None
