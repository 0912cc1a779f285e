"""Sampling with the language model in the loop draws what training taught, and refuses what it cannot."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron_mimo import MimoModel, sample_flow, sample_one_by_one
from megatron_mimo.decoders import (
    FlowTransformerDecoder,
    NoisedTargetInput,
    RegressionDecoder,
    TargetInput,
)
from tests import tiny
from tests.distributed.cases import decoders as cases

SPAN, WIDTH = cases.SPAN, cases.WIDTH
TARGETS = cases.Kind(
    RegressionDecoder,
    dict(width=WIDTH, target_width=4, position_rule="predecessor"),
    cases.feed(TargetInput),
    cases.regression_targets,
    sharded=False,
)
CODES, FLOW = (cases.kinds()[name] for name in ("discrete", "flow"))
NOISED = cases.Kind(
    FlowTransformerDecoder,
    dict(width=WIDTH, target_width=4, hidden_width=8, depth=1, heads=2, targets_per_item=SPAN, rows_per_item=SPAN),
    cases.feed(NoisedTargetInput),
    FLOW.targets,
)


def model_of(kind: cases.Kind, **stage) -> MimoModel:
    torch.manual_seed(0)
    model = cases.build(kind, tiny.language_spec(), **stage).eval()
    cases.spread(model)
    return model


def ids() -> torch.Tensor:
    """Two spans in the first sample, one in the second: turns of unequal number."""
    return cases.batch(("two", "edge", "none"))["input_ids"]


def rows(model: MimoModel, shown: dict, prompt: torch.Tensor | None = None) -> torch.Tensor:
    outputs, _ = model(ids() if prompt is None else prompt, generation_inputs={"images": shown})
    return model.modality_submodules["images"].rows_for("out", outputs.modalities["images"].hidden)


def decoder_of(model: MimoModel) -> nn.Module:
    return model.modality_submodules["images"].decoders["out"]


@torch.no_grad()
def test_codes_drawn_one_by_one_are_those_that_teacher_forcing_finds_likeliest(single_process):
    model = model_of(CODES)
    codes = sample_one_by_one(model, ids(), "images", options={"temperature": 0})
    assert codes.shape == (9, 2) and codes.dtype == torch.int64
    likeliest = [part.argmax(1) for part in decoder_of(model).logits(rows(model, {"codes": codes}))]
    assert torch.equal(torch.stack(likeliest, dim=1), codes)
    assert len(codes.unique()) > 2
    assert not torch.equal(rows(model, {"codes": codes}), rows(model, {"codes": codes * 0}))


@torch.no_grad()
def test_targets_fed_back_one_by_one_are_those_that_teacher_forcing_predicts(single_process):
    model = model_of(TARGETS)
    samples = sample_one_by_one(model, ids(), "images", "out")
    torch.testing.assert_close(decoder_of(model).sample(rows(model, {"target": samples})), samples)
    assert not torch.allclose(samples, decoder_of(model).sample(rows(model, {"target": samples * 0})))


@torch.no_grad()
@pytest.mark.parametrize("kind", [FLOW, NOISED], ids=["rows", "transformer"])
def test_a_solver_step_sees_what_training_sees_at_that_point_of_the_path(single_process, kind):
    model, noise = model_of(kind), torch.randn(9, 4)
    decoder, half = decoder_of(model), torch.full((3,), 0.5)
    drawn = sample_flow(model, ids(), "images", noise=noise, steps=2)

    def trained(target, time):
        given = {"target": target, "noise": noise, "time": time}
        outputs, _ = model(ids(), modality_targets={"images": {"out": given}})
        seen = model.modality_submodules["images"].rows_for("out", outputs.modalities["images"].hidden)
        return decoder.velocity(seen, (1 - time[0]) * target + time[0] * noise, time)

    middle = noise - trained(torch.zeros_like(noise), torch.ones(3)) / 2
    # A target whose midpoint with the noise is the state after the first step.
    wanted = middle - trained(2 * middle - noise, half) / 2
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=1e-4)  # float32 through two model runs
    assert not torch.allclose(drawn, noise, atol=0.1)


def test_each_position_is_drawn_once_beside_those_of_other_samples(single_process):
    model, drawn = model_of(CODES), []
    sample = decoder_of(model).sample
    decoder_of(model).sample = lambda rows: drawn.append(len(rows)) or sample(rows)
    sample_one_by_one(model, ids(), "images")
    assert drawn == [2, 2, 2, 1, 1, 1]


def test_samples_repeat_with_the_generator(single_process):
    flow, codes = model_of(FLOW), model_of(CODES)

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        samples = sample_flow(flow, ids(), "images", steps=1, generator=generator)
        return samples, sample_one_by_one(codes, ids(), "images", options={"generator": generator})

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


def without_condition() -> torch.Tensor:
    """The prompts with every token but the generation tokens replaced by padding."""
    return torch.where(ids() == tiny.WRITE, ids(), 0)


@torch.no_grad()
def test_codes_with_guidance_contrast_the_prompt_with_one_without_its_condition(single_process):
    model = model_of(CODES)
    options = {"temperature": 0, "guidance": 3.0}
    codes = sample_one_by_one(
        model, ids(), "images", options=options, unconditional_ids=without_condition(), placement=model.place(ids())
    )
    shown, decoder = {"codes": codes}, decoder_of(model)
    pairs = zip(decoder.logits(rows(model, shown)), decoder.logits(rows(model, shown, without_condition())))
    likeliest = [(null + 3 * (part - null)).argmax(1) for part, null in pairs]
    assert torch.equal(torch.stack(likeliest, dim=1), codes)
    assert not torch.equal(codes, sample_one_by_one(model, ids(), "images", options={"temperature": 0}))
    assert not torch.equal(codes, sample_one_by_one(model, ids(), "images", options=options))


@torch.no_grad()
@pytest.mark.parametrize("kind", [FLOW, NOISED], ids=["rows", "transformer"])
@pytest.mark.parametrize("null", [True, False], ids=["null condition", "unconditional ids"])
def test_a_solver_step_with_guidance_extrapolates_from_the_unconditional_velocity(single_process, kind, null):
    model, noise = model_of(replace(kind, params={**kind.params, "condition_dropout": 0.1})), torch.randn(9, 4)
    decoder, one = decoder_of(model), torch.ones(())
    given = {} if null else {"unconditional_ids": without_condition()}
    drawn = sample_flow(model, ids(), "images", noise=noise, steps=1, guidance=3.0, **given)
    shown = {"x": noise, "time": torch.ones(3)}
    seen = rows(model, shown)
    contrast = decoder.condition_dropout.null.expand_as(seen) if null else rows(model, shown, without_condition())
    slope, base = decoder.velocity(seen, noise, one), decoder.velocity(contrast, noise, one)
    torch.testing.assert_close(drawn, noise - (base + 3 * (slope - base)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn, noise - slope, atol=1e-3)


def test_a_prompt_without_generation_tokens_draws_nothing(single_process):
    text = torch.ones(2, 8, dtype=torch.int64)
    assert sample_one_by_one(model_of(CODES), text, "images").shape == (0, 2)
    assert sample_flow(model_of(FLOW), text, "images", steps=1).shape == (0, 4)


@pytest.mark.parametrize(("loop", "kind"), [(sample_one_by_one, CODES), (sample_flow, FLOW)], ids=["codes", "flow"])
def test_the_loops_of_whole_passes_say_that_they_go_and_where_they_are_called(single_process, loop, kind):
    with pytest.warns(DeprecationWarning, match=rf"^{loop.__name__} runs .* model.generate") as told:
        loop(model_of(kind), ids(), "images")
    assert [one.filename for one in told if "model.generate" in str(one.message)] == [__file__]


def test_what_is_shown_counts_nothing(single_process):
    for model in (model_of(CODES), model_of(CODES).train()):
        codes = torch.zeros(9, 2, dtype=torch.int64)
        outputs, _ = model(ids(), generation_inputs={"images": {"codes": codes}})
        term = outputs.modalities["images"].losses["out"]
        assert term.count == term.sum == 0
        assert outputs.modalities["images"].hidden.shape == (9, tiny.HIDDEN)


def show(**given):
    return lambda: model_of(CODES)(ids(), generation_inputs=given)


BAD = {
    "a stage": (
        lambda: sample_one_by_one(model_of(CODES, post_process=False), ids(), "images"),
        "whole model on one pipeline stage",
    ),
    "training": (lambda: sample_one_by_one(model_of(CODES).train(), ids(), "images"), "call model.eval()"),
    "unknown modality": (
        lambda: sample_one_by_one(model_of(CODES), ids(), "audio"),
        r"modality 'audio' is not one of those written: \['images'\]",
    ),
    "unknown decoder": (
        lambda: sample_one_by_one(model_of(CODES), ids(), "images", "pixels"),
        r"decoder 'pixels' is not one of \['out'\]",
    ),
    "no input": (
        lambda: sample_one_by_one(model_of(cases.kinds()["flow_transformer"]), ids(), "images"),
        "images has no generation_input",
    ),
    "input that shows no samples": (
        lambda: sample_one_by_one(model_of(cases.kinds()["regression"]), ids(), "images"),
        "QueryInput does not show the language model what was sampled",
    ),
    "spans one by one": (
        lambda: sample_one_by_one(model_of(FLOW), ids(), "images"),
        "FlowDecoder draws 3 rows together",
    ),
    "codes as a flow": (
        lambda: sample_flow(model_of(CODES), ids(), "images"),
        "needs a decoder of rectified flow and NoisedTargetInput, found DiscreteDecoder and CodeInput",
    ),
    "half a span": (
        lambda: sample_flow(model_of(FLOW), ids()[:, :-5], "images"),
        "images: sample 0 has 2 generation tokens in a row, which is no whole number of spans of 3",
    ),
    "noise of another batch": (
        lambda: sample_flow(model_of(FLOW), ids(), "images", noise=torch.zeros(6, 4), steps=1),
        r"images: noise must be \[9, 4\], a row for each generation token, got \[6, 4\]",
    ),
    "unconditional ids without guidance": (
        lambda: sample_one_by_one(model_of(CODES), ids(), "images", unconditional_ids=ids()),
        "images: unconditional_ids are contrasted with by guidance, which is off",
    ),
    "unconditional ids of another length": (
        lambda: sample_flow(model_of(FLOW), ids(), "images", guidance=2.0, unconditional_ids=ids()[:, 1:]),
        r"images: unconditional_ids \[3, 15\] must have its generation tokens where input_ids \[3, 16\] has",
    ),
    "unconditional ids that write elsewhere": (
        lambda: sample_flow(model_of(FLOW), ids(), "images", guidance=2.0, unconditional_ids=ids().roll(1, 1)),
        "images: unconditional_ids .* must have its generation tokens where",
    ),
    "unconditional rows in the loop": (
        lambda: sample_one_by_one(
            model_of(CODES), ids(), "images", options={"guidance": 2.0, "unconditional_rows": torch.zeros(9, WIDTH)}
        ),
        "images: unconditional_rows change with every sample .* give unconditional_ids",
    ),
    "too few codes": (
        show(images={"codes": torch.zeros(8, 2, dtype=torch.int64)}),
        r"images: sample 1 has 3 generation tokens but 2 target rows \(batch: 9 generation tokens, 8",
    ),
    "shown to an unknown modality": (show(video={"codes": 1}), "generation_inputs has modality 'video'"),
    "shown where nothing reads": (
        lambda: model_of(cases.kinds()["regression"])(ids(), generation_inputs={"images": {"x": 1}}),
        "images: QueryInput reads no targets, found .'x'.*Leave",
    ),
    "shown where nothing feeds": (
        lambda: model_of(cases.kinds()["flow_transformer"])(ids(), generation_inputs={"images": {"x": 1}}),
        "has 'images', whose spec has no generation_input",
    ),
    "shown and learned": (
        lambda: model_of(CODES)(
            ids(),
            generation_inputs={"images": {"codes": torch.zeros(9, 2, dtype=torch.int64)}},
            modality_targets={"images": {"out": CODES.targets(3)}},
        ),
        "both generation_inputs and modality_targets have 'images'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_sampled_is_refused_by_name(single_process, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_shown_inputs_are_keywords(single_process):
    with pytest.raises(TypeError, match=r"generation_inputs\['images'\] must map keyword"):
        show(images=torch.zeros(9))()
