"""Under mrope written spans stand where training places them, and what follows stands behind them."""

from dataclasses import replace

import pytest
import torch

from megatron_mimo import sample_flow, sample_one_by_one
from megatron_mimo.data.positions import Constant, GridPositions, Span, positions
from megatron_mimo.data.samples import Handling
from megatron_mimo.data.writers import ImageWriter
from megatron_mimo.generation.messages import placed_as_trained
from megatron_mimo.generation.prompts import Known
from megatron_mimo.generation.sampling import generator_seed
from megatron_mimo.generation.spans import Reread, Writing, span_rules
from tests import data_samples, tiny, writing
from tests.writing import BEGIN, END, model_of

#: Two rows of three: text behind it stands 3 positions before where counting would have it.
ROWS, GRID = 6, (1, 2, 3)
RULES = {"grid": (GridPositions(), GRID), "constant": (Constant(), None)}


def begun(*lengths: int) -> list[dict]:
    return [{"input_ids": [*prompt["input_ids"], BEGIN]} for prompt in writing.prompts(*lengths)]


def placed(length: int, spans: list[Span]) -> torch.Tensor:
    """Int64 `[3, 1, length]`, as the data module has them for training."""
    return positions(length, spans, 3)[0][:, None]


def check_text(model, ids: list[int], spans: list[Span], said: list[int], **given) -> None:
    """What is said is what whole passes say, in which everything stands where training places it."""
    ids = list(ids)
    for token in said:
        with torch.no_grad():
            output = model(torch.tensor([ids]), placed(len(ids), spans), **given)[0]
        logits = output.language[0, -1]
        logits[tiny.WRITE] = -torch.inf
        assert int(logits.argmax()) == token
        ids.append(token)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["queries", "token", "codes", "vectors", "flow"])
def test_spans_are_written_where_training_places_them_and_text_goes_on_behind(single_process, kind, name):
    model, (rule, grid) = model_of(kind, language="mrope"), RULES[name]
    options = {"codes": {"temperature": 0}, "flow": {"steps": 2}}.get(kind, {})
    asked, seeds = begun(4, 9, 6), [5, 6, 7]
    wanted = {"images": Writing(options=options, rows=ROWS, positions=rule, grid=grid)}
    outputs = model.generate(asked, ROWS + 3, seed=seeds, modalities=wanted, rescore=True)
    counted = model.generate(asked, ROWS + 3, seed=seeds, modalities={"images": Writing(options=options, rows=ROWS)})
    for prompt, seed, output, other in zip(asked, seeds, outputs, counted):
        start = len(prompt["input_ids"])
        ids, spans = [*prompt["input_ids"], *[tiny.WRITE] * ROWS], [Span(start, ROWS, rule, grid)]
        whole, places, shown = torch.tensor([ids]), placed(len(ids), spans), None
        if kind in ("codes", "vectors"):
            options = {"temperature": 0} if kind == "codes" else {}
            expected = sample_one_by_one(model, whole, "images", options=options, position_ids=places)
            shown = {"codes" if kind == "codes" else "target": expected}
        elif kind == "flow":
            noise = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(generator_seed(seed, 1, 0, 0)))
            expected = sample_flow(model, whole, "images", steps=2, noise=noise, position_ids=places)
            shown = {"x": expected, "time": torch.zeros(ROWS // writing.ROWS)}
        else:
            with torch.no_grad():
                expected = model.decode(model(whole, places)[0])["images"]["out"]
        part, *after = output.parts
        torch.testing.assert_close(part.samples, expected, atol=1e-4, rtol=1e-4)
        given = {} if shown is None else {"generation_inputs": {"images": shown}}
        check_text(model, ids, spans, [token for text in after if text.kind == "text" for token in text.ids], **given)
        torch.testing.assert_close(output.rescored_logprobs, output.logprobs, atol=1e-4, rtol=0)
        # Counting on would be another answer: the comparison can fail.
        assert kind == "codes" or not torch.allclose(part.samples, other.parts[0].samples, atol=1e-3)
        assert not torch.allclose(output.logprobs[:1], other.logprobs[:1], atol=1e-3)


def test_a_prompt_that_is_ahead_of_counting_keeps_its_lead_behind_a_span(single_process):
    model, rule = model_of("vectors", language="mrope"), GridPositions()
    (prompt,) = begun(8)
    before = Span(2, 4, rule, (1, 2, 2))  # an image in the prompt; its tokens may be any
    places, delta = positions(len(prompt["input_ids"]), [before], 3)
    asked = prompt | {"position_ids": places, "delta": delta}
    wanted = {"images": Writing(rows=ROWS, positions=rule, grid=GRID)}
    output = model.generate([asked], ROWS + 3, modalities=wanted, rescore=True)[0]
    ids = [*prompt["input_ids"], *[tiny.WRITE] * ROWS]
    spans = [before, Span(len(prompt["input_ids"]), ROWS, rule, GRID)]
    expected = sample_one_by_one(model, torch.tensor([ids]), "images", position_ids=placed(len(ids), spans))
    torch.testing.assert_close(output.parts[0].samples, expected, atol=1e-4, rtol=1e-4)
    assert delta < 0 and len(output.logprobs)
    check_text(model, ids, spans, output.parts[1].ids, generation_inputs={"images": {"target": expected}})
    torch.testing.assert_close(output.rescored_logprobs, output.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["codes", "flow"])
def test_a_second_prompt_places_the_span_behind_its_own_end(single_process, kind):
    model, rule = model_of(kind, language="mrope"), GridPositions()
    (prompt,) = begun(7)
    same = [0] * (len(prompt["input_ids"]) - 1) + [BEGIN]
    options = {"guidance": 3.0} | ({"temperature": 0} if kind == "codes" else {"steps": 2})
    wanted = {"images": Writing(options=options, rows=ROWS, positions=rule, grid=GRID)}
    output = model.generate([prompt | {"unconditional": {"input_ids": same}}], ROWS, seed=[5], modalities=wanted)[0]
    start = len(prompt["input_ids"])
    ids, without = (torch.tensor([[*one, *[tiny.WRITE] * ROWS]]) for one in (prompt["input_ids"], same))
    given = {"unconditional_ids": without, "position_ids": placed(ids.shape[1], [Span(start, ROWS, rule, GRID)])}
    if kind == "codes":
        expected = sample_one_by_one(model, ids, "images", options=options, **given)
    else:
        noise = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(generator_seed(5, 1, 0, 0)))
        expected = sample_flow(model, ids, "images", noise=noise, **options, **given)
    torch.testing.assert_close(output.parts[0].samples, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [False, True], ids=["grid", "counted on"])
def test_what_is_read_again_stands_where_training_places_it(single_process, counts):
    model, rule = model_of("vectors", language="mrope"), None if counts else GridPositions()

    def inputs(value):
        return {"patches": {"x": value.flatten().repeat(4)[: 4 * tiny.PIXELS].reshape(1, 4, tiny.PIXELS)}}

    grids = (None, None) if counts else (GRID, (1, 2, 2))
    again = Reread(inputs, rows=4, before=[7], after=[8], grid=grids[1])
    (prompt,) = begun(5)
    wanted = {"images": Writing(rows=ROWS, positions=rule, grid=grids[0], reread=again)}
    output = model.generate([prompt], ROWS + 7 + 3, modalities=wanted, rescore=True)[0]
    part, text = output.parts
    start = len(prompt["input_ids"])
    ids = [*prompt["input_ids"], *[tiny.WRITE] * ROWS, END, 7, *[tiny.READ] * 4, 8]
    spans = [] if rule is None else [Span(start, ROWS, rule, GRID), Span(start + ROWS + 2, 4, rule, (1, 2, 2))]
    media = {"modality_inputs": {"images": inputs(part.value)}}
    check_text(model, ids, spans, text.ids, generation_inputs={"images": {"target": part.samples}}, **media)
    assert len(text.ids) == 3
    torch.testing.assert_close(output.rescored_logprobs, output.logprobs, atol=1e-4, rtol=0)


def test_a_processor_s_rule_is_taken_where_none_is_named(single_process):
    model = model_of("codes", language="mrope")
    writer = ImageWriter("out", size=(16, 24), rows=ROWS, grid=GRID[1:])
    handling = Handling("images", generation=tiny.WRITE, begin=(BEGIN,), writer=writer, rule=GridPositions())
    processor = data_samples.processor(data_samples.CHATML)
    processor.handling = {"image": handling}
    known = Known.of(model)
    rules = span_rules(model, {"images": Writing(rows=ROWS)}, known)
    taken = placed_as_trained(rules, processor, known)["images"].writing
    assert (taken.positions, taken.grid) == (GridPositions(), GRID)
    own = span_rules(model, {"images": Writing(rows=ROWS, positions=Constant())}, known)
    assert placed_as_trained(own, processor, known)["images"].writing.positions == Constant()
    read_alone = replace(handling, special=tiny.READ, reader=data_samples.Patches(), writer=None, generation=None)
    processor.handling = {"image": read_alone}
    assert placed_as_trained(rules, processor, known)["images"].writing.positions is None


BAD = {
    "a grid of another number": (dict(positions=GridPositions(), grid=(1, 2, 2)), "mrope", "does not fit the grid"),
    "a rule without its grid": (dict(positions=GridPositions()), "mrope", "does not fit the grid None"),
    "a grid without a rule": (
        dict(grid=GRID),
        "mrope",
        r"Writing.grid: expected positions, .*found \(1, 2, 3\)",
    ),
    "positions that count on": (dict(positions=Constant()), "groups", "expected a model with mrope"),
    "a grid of what is read again": (
        dict(positions=GridPositions(), grid=GRID, reread=Reread(dict, rows=4)),
        "mrope",
        "a span of 4 positions does not fit the grid None",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_positions_that_training_would_not_have_are_refused_before_anything_runs(single_process, monkeypatch, name):
    given, language, message = BAD[name]
    model = model_of("vectors", language=language)
    monkeypatch.setattr(model, "embed", None)
    with pytest.raises(ValueError, match=rf"modalities\['images'\]: .*{message}"):
        model.generate(begun(4), ROWS, modalities={"images": Writing(rows=ROWS, **given)})


def test_spans_of_variable_length_count_on(single_process):
    model = model_of("speech", language="mrope")
    with pytest.raises(ValueError, match="expected spans of one length, found spans that vary"):
        model.generate(begun(4), ROWS, modalities={"images": Writing(rows=ROWS, positions=Constant())})
