"""A model switches from text to another modality and back by itself, and writes what whole forward passes write."""

import pytest
import torch

from megatron_mimo import sample_flow, sample_one_by_one
from megatron_mimo.generation.results import MediaPart, TextPart, save
from megatron_mimo.generation.sampling import generator_seed
from megatron_mimo.generation.spans import Reread, Writing
from tests import tiny, writing
from tests.writing import BEGIN, END, ROWS, logits_of, model_of, prompts

GREEDY = Writing(rows=ROWS, options={"temperature": 0})


def begun(model, *lengths: int) -> list[dict]:
    """Prompts that end with what begins an image."""
    token = model.mimo_config.begin_token_ids.get("images", model.mimo_config.generation_token_ids["images"])
    return [{"input_ids": [*prompt["input_ids"], token]} for prompt in prompts(*lengths)]


def context(model, prompt: dict) -> list[int]:
    """Ids up to the first generation token."""
    ids = prompt["input_ids"]
    return ids if model.mimo_config.begin_token_ids else ids[:-1]


def check_text_after(model, prompt: dict, output, shown: dict) -> None:
    """Text after the span is what whole passes say, that see the span."""
    ids = [*context(model, prompt), *[model.mimo_config.generation_token_ids["images"]] * ROWS]
    said = [token for part in output.parts if isinstance(part, TextPart) for token in part.ids]
    opening = model.mimo_config.begin_token_ids.get("images", tiny.WRITE)
    for token in said:
        logits = logits_of(model, ids, shown)
        if opening != tiny.WRITE:
            logits[tiny.WRITE] = -torch.inf
        assert int(logits.argmax()) == token
        ids.append(token)


@pytest.mark.parametrize("begin", [BEGIN, None], ids=["begin token", "first generation token"])
@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_rows_one_by_one_are_those_of_whole_passes_and_text_goes_on_behind_them(single_process, kind, begin):
    model = model_of(kind, begin=begin)
    wanted = GREEDY if kind == "codes" else Writing(rows=ROWS)
    asked = begun(model)
    outputs = model.generate(asked, ROWS + 3, modalities={"images": wanted})
    for prompt, output in zip(asked, outputs):
        part = output.parts[0]
        assert isinstance(part, MediaPart) and part.kind == "image" and part.ids == [tiny.WRITE] * ROWS
        ids = torch.tensor([[*context(model, prompt), *part.ids]])
        options = {"options": {"temperature": 0}} if kind == "codes" else {}
        expected = sample_one_by_one(model, ids, "images", **options)
        torch.testing.assert_close(part.samples, expected, atol=1e-5, rtol=1e-5)
        check_text_after(model, prompt, output, {"codes" if kind == "codes" else "target": expected})
        assert output.reason == "length"
        assert len(output.ids) == ROWS + 3 or output.ids[-1] == begin  # a second image, for which there is no room


@pytest.mark.parametrize("kind", ["flow", "flow-before"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("second", [False, True], ids=["null condition", "second prompt"])
def test_a_flow_in_the_loop_draws_what_whole_passes_draw_from_the_same_noise(single_process, kind, guidance, second):
    model, asked = model_of(kind), begun(model_of(kind))
    if second:
        if guidance == 1:
            return  # a second prompt without guidance changes nothing: the other cases show it
        for prompt in asked:
            prompt["unconditional"] = {"input_ids": [0] * (len(prompt["input_ids"]) - 1) + [BEGIN]}
    options = {"steps": 2, "guidance": guidance}
    outputs = model.generate(asked, ROWS + 2, seed=[5, 6, 7], modalities={"images": Writing(options=options)})
    for seed, prompt, output in zip((5, 6, 7), asked, outputs):
        own = torch.Generator().manual_seed(generator_seed(seed, 1, 0, 0))
        noise = torch.randn(ROWS, 4, generator=own)
        ids = torch.tensor([[*prompt["input_ids"], *[tiny.WRITE] * ROWS]])
        given = {}
        if second:
            given["unconditional_ids"] = torch.tensor([[*prompt["unconditional"]["input_ids"], *[tiny.WRITE] * ROWS]])
        expected = sample_flow(model, ids, "images", noise=noise, **options, **given)
        torch.testing.assert_close(output.parts[0].samples, expected, atol=1e-4, rtol=1e-4)
        check_text_after(model, prompt, output, {"x": expected, "time": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["queries", "token"])
def test_rows_in_one_pass_are_decoded_as_a_whole_pass_decodes_them(single_process, kind):
    model, asked = model_of(kind), begun(model_of(kind))
    outputs = model.generate(asked, ROWS + 3, modalities={"images": Writing(rows=ROWS)})
    for prompt, output in zip(asked, outputs):
        ids = [*prompt["input_ids"], *[tiny.WRITE] * ROWS]
        with torch.no_grad():
            expected = model.decode(model(torch.tensor([ids]))[0])["images"]["out"]
        torch.testing.assert_close(output.parts[0].samples, expected, atol=1e-5, rtol=1e-5)
        check_text_after(model, prompt, output, None)


@pytest.mark.parametrize("second", [False, True], ids=["null condition", "second prompt"])
def test_guidance_of_rows_in_one_pass_contrasts_with_the_second_prompt_where_there_is_one(single_process, second):
    model = model_of("flow-queries")
    (prompt,), short = begun(model, 7), {"input_ids": [1, BEGIN]}
    options = {"steps": 2, "guidance": 3.0}
    asked = prompt | ({"unconditional": short} if second else {})
    output = model.generate([asked], ROWS, seed=[5], modalities={"images": Writing(options=options)})[0]
    images = model.modality_submodules["images"]

    def rows(ids):
        with torch.no_grad():
            outputs, _ = model(torch.tensor([[*ids, *[tiny.WRITE] * ROWS]]))
            return images.rows_for("out", outputs.modalities["images"].hidden)

    own = torch.Generator().manual_seed(generator_seed(5, 1, 0, 0))
    contrast = {"unconditional_rows": rows(short["input_ids"])} if second else {}
    expected = images.decoders["out"].sample(rows(prompt["input_ids"]), generator=own, **options, **contrast)
    torch.testing.assert_close(output.parts[0].samples, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [ROWS, 2 * ROWS], ids=["one item", "two items"])
@pytest.mark.parametrize("second", [False, True], ids=["null condition", "second prompt"])
def test_flows_of_several_samples_are_integrated_together_and_each_draws_what_it_draws_alone(
    single_process, monkeypatch, second, rows
):
    model = model_of("flow-queries")
    asked, seeds = begun(model, 4, 9, 6), [5, 6, 5]
    if second:
        asked = [prompt | {"unconditional": {"input_ids": [1, BEGIN]}} for prompt in asked]
    wanted = {"images": Writing(options={"steps": 2, "guidance": 3.0}, rows=rows)}
    alone = [model.generate([one], rows, seed=[seed], modalities=wanted)[0] for one, seed in zip(asked, seeds)]
    decoder, calls = model.modality_submodules["images"].decoders["out"], []
    velocity = decoder.velocity
    monkeypatch.setattr(decoder, "velocity", lambda states, x, time: calls.append(len(x)) or velocity(states, x, time))
    together = model.generate(asked, rows, seed=seeds, modalities=wanted)
    assert calls == [3 * rows] * 4  # two steps, each with and without the condition
    for mine, theirs in zip(together, alone):
        torch.testing.assert_close(mine.parts[0].samples, theirs.parts[0].samples, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0].parts[0].samples, together[1].parts[0].samples, atol=1e-2)


@pytest.mark.parametrize("labelled", [False, True], ids=["begin token", "first generation token"])
@pytest.mark.parametrize("kind", ["codes", "queries", "flow"])
def test_samples_switch_when_they_say_so_each_at_its_own_time(single_process, kind, labelled):
    """What the second sample says third is made the token that begins an image."""
    plain = model_of(kind, end=None)
    said = plain.generate(prompts(4, 9, 6), 8, modalities=())
    opening = said[1].ids[2]
    names = dict(begin=None, write=opening) if labelled else dict(begin=opening)
    model = model_of(kind, end=None, **names)
    wanted = {
        "images": GREEDY if kind == "codes" else Writing(rows=ROWS, options={"steps": 2} if kind == "flow" else {})
    }
    seeds = [3, 4, 5]
    outputs = model.generate(prompts(4, 9, 6), 12, modalities=wanted, seed=seeds)
    assert any(isinstance(part, MediaPart) for part in outputs[1].parts)
    when = said[1].ids.index(opening)
    assert outputs[1].ids[: when + 1] == said[1].ids[: when + 1]
    for prompt, seed, output in zip(prompts(4, 9, 6), seeds, outputs):
        alone = model.generate([prompt], 12, modalities=wanted, seed=[seed])[0]
        assert alone.ids == output.ids
        for mine, theirs in zip(alone.parts, output.parts, strict=True):
            assert type(mine) is type(theirs)
            if isinstance(mine, MediaPart):
                torch.testing.assert_close(mine.samples, theirs.samples, atol=1e-5, rtol=1e-5)
    part = outputs[1].parts[1]
    before = [*prompts(4, 9, 6)[1]["input_ids"], *outputs[1].parts[0].ids]
    if kind == "codes":
        token = model.mimo_config.generation_token_ids["images"]
        ids = torch.tensor([[*before, *[token] * ROWS]])
        assert torch.equal(part.samples, sample_one_by_one(model, ids, "images", options={"temperature": 0}))


def test_codes_with_guidance_contrast_a_second_prompt_of_its_own_length(single_process):
    model = model_of("codes")
    (prompt,) = begun(model, 7)
    short = {"input_ids": [1, BEGIN]}
    options = {"temperature": 0, "guidance": 3.0}
    wanted = {"images": Writing(rows=ROWS, options=options)}
    codes = model.generate([prompt | {"unconditional": short}], ROWS, modalities=wanted)[0].parts[0].samples
    decoder, images = model.modality_submodules["images"].decoders["out"], model.modality_submodules["images"]

    def logits(ids):
        with torch.no_grad():
            outputs, _ = model(
                torch.tensor([[*ids, *[tiny.WRITE] * ROWS]]), generation_inputs={"images": {"codes": codes}}
            )
            return decoder.logits(images.rows_for("out", outputs.modalities["images"].hidden))

    pairs = zip(logits(prompt["input_ids"]), logits(short["input_ids"]))
    likeliest = torch.stack([(null + 3 * (own - null)).argmax(1) for own, null in pairs], dim=1)
    assert torch.equal(codes, likeliest)
    assert not torch.equal(codes, model.generate([prompt], ROWS, modalities=wanted)[0].parts[0].samples)


def test_codes_are_drawn_from_the_sample_s_own_seed(single_process):
    model = model_of("codes")
    asked, wanted = begun(model), {"images": Writing(rows=ROWS)}
    outputs = model.generate(asked, ROWS, modalities=wanted, seed=[1, 2, 3])
    backwards = model.generate(asked[::-1], ROWS, modalities=wanted, seed=[3, 2, 1])[::-1]
    others = model.generate(asked, ROWS, modalities=wanted, seed=[4, 5, 6])
    samples = [[output.parts[0].samples for output in one] for one in (outputs, backwards, others)]
    assert all(torch.equal(a, b) for a, b in zip(samples[0], samples[1]))
    assert any(not torch.equal(a, b) for a, b in zip(samples[0], samples[2]))


@pytest.mark.parametrize("most", [2, 5, 9])
def test_a_span_of_variable_length_ends_when_the_model_says_so_or_at_its_limit(single_process, most):
    model = model_of("speech")
    asked = begun(model, 4, 9, 6, 5, 8)
    wanted = {"images": Writing(rows=most, options={"temperature": 0})}
    outputs = model.generate(asked, 12, modalities=wanted)
    lengths = set()
    for prompt, output in zip(asked, outputs):
        part, text = output.parts[:2]
        count = len(part.ids)
        lengths.add(count)
        assert text.ids[0] == END and len(part.samples) == count <= most
        for rows in range(1, count + 1):
            ids = [*prompt["input_ids"], *[tiny.WRITE] * rows]
            logits = logits_of(model, ids, {"codes": part.samples[:rows]})
            if rows < most:
                assert (logits[END] > logits[tiny.WRITE]) == (rows == count)
        ids = torch.tensor([[*prompt["input_ids"], *part.ids]])
        assert torch.equal(part.samples, sample_one_by_one(model, ids, "images", options={"temperature": 0}))
        ids = [*prompt["input_ids"], *part.ids, END]
        for token in text.ids[1:]:
            logits = logits_of(model, ids, {"codes": part.samples})
            logits[[tiny.WRITE, BEGIN]] = -torch.inf
            if token in (tiny.WRITE, BEGIN):
                break
            assert int(logits.argmax()) == token
            ids.append(token)
        assert len(output.ids) == 12
    assert most == 2 or len(lengths) > 1


def test_what_was_written_is_read_again_through_the_encoder(single_process):
    model = model_of("vectors")
    shape = (1, 2, tiny.PIXELS)

    def inputs(value):
        return {"patches": {"x": value.flatten().repeat(2)[: 2 * tiny.PIXELS].reshape(shape)}}

    again = Reread(inputs, rows=2, before=[7], after=[8])
    wanted = {"images": Writing(rows=ROWS, reread=again)}
    for prompt in begun(model):
        output = model.generate([prompt], ROWS + 5 + 3, modalities=wanted)[0]
        part, text = output.parts
        ids = [*prompt["input_ids"], *[tiny.WRITE] * ROWS, END, 7, tiny.READ, tiny.READ, 8]
        for token in text.ids:
            with torch.no_grad():
                logits = model(
                    torch.tensor([ids]),
                    modality_inputs={"images": inputs(part.value)},
                    generation_inputs={"images": {"target": part.samples}},
                )[0].language[0, -1]
            logits[tiny.WRITE] = -torch.inf
            assert int(logits.argmax()) == token
            ids.append(token)
        assert output.reason == "length" and len(text.ids) == 3


def test_text_around_spans_is_rescored_by_one_training_forward(single_process):
    model = model_of("codes", end=None)
    outputs = model.generate(begun(model), ROWS + 4, modalities={"images": GREEDY}, rescore=True)
    for output in outputs:
        assert len(output.logprobs)
        torch.testing.assert_close(output.rescored_logprobs, output.logprobs, atol=1e-4, rtol=0)


def test_a_span_that_has_no_room_ends_the_sample(single_process):
    model = model_of("codes")
    output = model.generate(begun(model)[:1], ROWS - 1, modalities={"images": GREEDY})[0]
    assert output.reason == "length" and output.parts == []
    output = model.generate(begun(model)[:1], ROWS, modalities={"images": GREEDY})[0]
    assert output.reason == "length" and output.ids == [tiny.WRITE] * ROWS


class Silent(writing.RegressionDecoder):
    """A decoder that cannot be sampled."""

    sample = writing.DiscreteDecoder.__mro__[1].sample


UNWRITABLE = {
    "a name that is none": (dict(modalities=["video"]), "expected some of .'images'., found 'video'"),
    "options of another decoder": (
        dict(modalities={"images": Writing(options={"steps": 3})}),
        "cannot be sampled|can be sampled, found images: .*steps",
    ),
    "noise of one's own": (
        dict(modalities={"images": Writing(options={"generator": torch.Generator()})}),
        "generator is generation's own to give",
    ),
    "a decoder that is none": (dict(modalities={"images": Writing(decoder="other")}), "decoder 'other'"),
    "no Writing": (dict(modalities={"images": {}}), "expected a Writing, found dict"),
    "a word": (dict(modalities="images"), "modalities: expected names"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_cannot_be_written_is_refused_before_anything_runs(single_process, monkeypatch, name):
    options, message = UNWRITABLE[name]
    model = model_of("codes")
    monkeypatch.setattr(model, "embed", None)
    with pytest.raises(ValueError, match=message):
        model.generate(begun(model), ROWS, **options)


def test_a_modality_without_a_sampler_is_refused_where_it_is_asked_for_and_never_begun_elsewhere(
    single_process, monkeypatch
):
    monkeypatch.setitem(writing.KINDS, "silent", (Silent, dict(width=writing.WIDTH, target_width=4), None))
    model = model_of("silent")
    with pytest.raises(ValueError, match="images: Silent has no sampler"):
        model.generate(prompts(), 3, modalities=["images"])
    with pytest.raises(ValueError, match="sample 2: images: the prompt ends with the token that begins it"):
        model.generate([*prompts(4, 5), *begun(model, 6)], 3)
    assert all(isinstance(part, TextPart) for output in model.generate(prompts(), 8) for part in output.parts)


def test_speech_without_an_end_is_refused(single_process):
    with pytest.raises(ValueError, match=r"its spans vary in length: give Writing\(rows=...\)"):
        model_of("speech").generate(prompts(), 3, modalities=["images"])


def test_media_are_saved_as_pictures_and_sounds(tmp_path):
    from PIL import Image

    from megatron_mimo.generation.results import GenerationOutput

    picture = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])
    color = torch.stack([torch.eye(2), torch.zeros(2, 2), torch.ones(2, 2)])
    tone = torch.tensor([0.0, 0.5, -1.0, 3.0])
    none = torch.zeros(0)
    parts = [
        MediaPart("image", "images", "out", [1], picture, none),
        MediaPart("image", "images", "out", [1], color, none),
        MediaPart("audio", "audio", "out", [1], tone, none),
        MediaPart("codes", "codes", "out", [1], torch.arange(3), none),
    ]
    paths = save([GenerationOutput(parts=parts)], tmp_path, sampling_rate=8000)
    assert [path.name for path in paths] == ["0-0.png", "0-1.png", "0-2.wav", "0-3.pt"]
    assert list(Image.open(paths[0]).getdata()) == [0, 255, 128, 255]
    assert list(Image.open(paths[1]).getdata()) == [(255, 0, 255), (0, 0, 255), (0, 0, 255), (255, 0, 255)]
    import wave

    with wave.open(str(paths[2])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 1, 4)
        samples = torch.frombuffer(bytearray(file.readframes(4)), dtype=torch.int16)
    assert samples.tolist() == [0, 16384, -32767, 32767]
    assert torch.equal(torch.load(paths[3]), torch.arange(3))
