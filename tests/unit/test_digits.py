"""The demo's data, judges, tokenizer and report, and how the second model draws with codes; nothing is trained long."""

import base64
import io
import json
import math
import re
import wave

import numpy as np
import pytest
import torch

from examples.digits import data, judges
from examples.digits.data import TOKEN, Digits, Task
from examples.digits.evaluate import Answers, CodeResults, FlowResults, Session, draw_with_codes
from examples.digits.model import CosineBands, codes_config, flow_config
from examples.digits.report import GOALS, SAYS, wav, write_report
from examples.digits.tones import CLIP, KEY_HZ, RATE, dial_tones
from examples.digits.train import train
from examples.digits.vq import CODES, GRID, DigitCodec, MovingCodebook, train_codec
from megatron_mimo import MimoModel
from megatron_mimo.generation import GenerationOutput, MediaPart, TextPart
from megatron_mimo.launch import initialize


@pytest.fixture(scope="module")
def split() -> tuple[Digits, Digits]:
    return data.load_split()


@pytest.fixture(scope="module")
def clips() -> tuple[torch.Tensor, torch.Tensor]:
    digits = torch.arange(10).repeat(10)
    return digits, dial_tones(digits, torch.Generator().manual_seed(0))


def rows_of(values: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in values.flatten(1)}


def test_no_held_out_digit_is_trained_on(split):
    train, held_out = split
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    assert not rows_of(train.images) & rows_of(held_out.images)
    assert set(held_out.labels.tolist()) == set(range(10))


def test_tones_evaluated_on_are_none_of_training(split):
    trained_on = torch.cat([data.draw_samples(split[0], 64, 1, step).clip for step in range(20)])
    evaluated_on = dial_tones(torch.arange(10), torch.Generator().manual_seed(-2))
    assert not rows_of(trained_on) & rows_of(evaluated_on)


def test_tones_of_one_digit_differ_and_stay_in_range(clips):
    digits, waveforms = clips
    assert len(rows_of(waveforms[digits == 3])) == 10
    assert waveforms.abs().max() < 1.1


def test_the_detector_decodes_every_synthesised_tone(clips):
    digits, waveforms = clips
    keys = [judges.detect_key(clip) for clip in waveforms.double().numpy()]
    assert keys == [str(digit) for digit in digits.tolist()]


@pytest.mark.parametrize("key", KEY_HZ)
def test_the_detector_decodes_pure_pairs_of_frequencies(key):
    time = np.arange(CLIP) / RATE
    clip = sum(np.sin(2 * np.pi * hertz * time) for hertz in KEY_HZ[key])
    assert judges.detect_key(clip) == key


@pytest.mark.parametrize("hertz", [(), (697.0,), (1209.0,), (697.0, 770.0, 1209.0), (440.0, 1000.0)])
def test_the_detector_hears_no_key_in_other_sounds(hertz):
    time = np.arange(CLIP) / RATE
    noise = 0.05 * np.random.default_rng(0).standard_normal(CLIP)
    assert judges.detect_key(noise + sum(np.sin(2 * np.pi * f * time) for f in hertz)) is None


def test_silence_is_no_key():
    assert judges.detect_key(np.zeros(CLIP)) is None


def test_goertzel_gives_a_sine_all_of_its_energy():
    frame = np.sin(2 * np.pi * 1000 * np.arange(200) / RATE)  # 25 whole periods
    energy = judges.goertzel(frame, (1000.0, 1200.0))
    np.testing.assert_allclose(energy, [(frame**2).sum(), 0], atol=1e-8)


def test_the_svm_recognises_held_out_digits(split):
    train, held_out = split
    recognised = judges.recognise(judges.train_svm(train), held_out.images)
    assert judges.accuracy(recognised, held_out.labels) > 0.97


def test_diversity_and_novelty_tell_copies_from_handwriting(split):
    train, held_out = split
    one_each = torch.stack([train.images[train.labels == digit][0] for digit in range(10)])
    copies = Digits(one_each.repeat(3, 1, 1), torch.arange(10).repeat(3))
    assert judges.diversity(copies, held_out) == pytest.approx(0, abs=1e-6)
    assert judges.diversity(train, held_out) == pytest.approx(1, abs=0.05)
    # cdist subtracts squares, so a distance of zero comes out as the root of float32's rounding error.
    assert judges.novelty(copies.images, train, held_out) == pytest.approx(0, abs=1e-2)
    assert judges.novelty(held_out.images, train, held_out) == pytest.approx(1)


def test_sequences_tell_the_digit_only_where_the_task_does():
    digit = torch.arange(10)
    for task in Task:
        ids = data.sequences(task, digit)
        assert ids.shape == (10, data.LENGTH)
        told = (ids == digit[:, None]).sum(1)
        assert (told == (task != Task.HEAR_DRAW)).all()
    # The answer comes after the word that asks for it, where a causal model cannot look.
    for task, word in ((Task.READ, "read"), (Task.HEAR, "hear")):
        ids = data.sequences(task, digit)
        assert torch.equal(ids[:, 1:][ids[:, :-1] == TOKEN[word]], digit)


def test_training_batches_come_with_and_without_each_modality(split):
    tasks = [set(data.draw_samples(split[0], 64, 1, step).task.tolist()) for step in range(8)]
    assert tasks[0] == set(Task)
    assert tasks[3] == {Task.HEAR, Task.DIAL}
    assert tasks[7] == {Task.READ, Task.DRAW}


def test_the_next_digit_is_what_is_drawn_and_dialled_behind_the_one_that_is_read(split):
    train, _ = split
    samples = data.draw_samples(train, 64, 1, 0)
    follows = samples.task == Task.NEXT
    assert torch.equal(samples.written, (samples.digit + follows) % 10)
    kept = {image.numpy().tobytes(): int(label) for image, label in zip(train.images, train.labels)}
    assert [kept[one.numpy().tobytes()] for one in samples.image] == samples.digit.tolist()
    assert [kept[one.numpy().tobytes()] for one in samples.drawing] == samples.written.tolist()
    heard = [judges.detect_key(one) for one in samples.clip.double().numpy()]
    assert heard == [str(digit) for digit in samples.written.tolist()]

    batch = data.training_batch(samples)
    for row in follows.nonzero().flatten().tolist():
        learned = batch["labels"][row][batch["loss_mask"][row] > 0].tolist()
        digit, written = int(samples.digit[row]), int(samples.written[row])
        begins = [digit, TOKEN["<draw>"], *[written] * 3, TOKEN["<dial>"], *[written] * 8]
        assert learned == begins
    # Others tell their own digit, wherever they are asked for it.
    told = batch["labels"] == samples.digit[:, None]
    assert told[~follows][batch["loss_mask"][~follows] > 0].all()


def test_another_handwriting_of_a_digit_is_drawn_evenly():
    labels = torch.tensor([4, 1, 4, 0, 1, 4])
    wanted = torch.tensor([4, 1, 0]).repeat(3000)
    places = data.one_of_each(labels, wanted, torch.Generator().manual_seed(0))
    assert torch.equal(labels[places], wanted)
    shares = torch.bincount(places, minlength=6) / 3000
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 2, 1 / 3, 1, 1 / 2, 1 / 3]), atol=0.03, rtol=0)


def test_shares_of_a_step_are_the_step(split):
    samples = data.draw_samples(split[0], 64, 1, 0)
    whole = data.training_batch(samples)
    parts = [data.training_batch(samples.part(rank, 2)) for rank in range(2)]
    for name in ("input_ids", "labels", "loss_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    for modality, decoder in (("images", "pixels"), ("audio", "bands")):
        for name, value in whole["modality_targets"][modality][decoder].items():
            joined = [part["modality_targets"][modality][decoder][name] for part in parts]
            assert torch.equal(torch.cat(joined), value)


def test_the_codec_keeps_tones_and_drops_what_lies_above_2_khz(clips):
    _, waveforms = clips
    codec = CosineBands()
    kept = codec.decode(codec.encode(waveforms))
    assert codec.encode(waveforms).shape == (100, data.BAND, data.AUDIO_ROWS, 1)
    torch.testing.assert_close(codec.encode(kept), codec.encode(waveforms), atol=1e-4, rtol=0)
    share = kept.square().sum() / waveforms.square().sum()
    assert 0.95 < share < 1


def test_a_wav_file_holds_the_waveform():
    waveform = torch.sin(torch.arange(400) / 10)
    with wave.open(io.BytesIO(wav(waveform))) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, 400)
        read = np.frombuffer(file.readframes(400), dtype=np.int16) / 32767
    np.testing.assert_allclose(read, waveform.numpy(), atol=1e-4)


def test_the_report_needs_no_other_file(split, clips, tmp_path):
    _, held_out = split
    asked, dialled = clips
    drawn = torch.stack([held_out.images[held_out.labels == digit][0] for digit in asked.tolist()])
    flow_figures = dict.fromkeys([name for name in SAYS if "codes" not in name and "vq" not in name], 0.93)
    code_figures = dict.fromkeys([name for name in SAYS if name not in flow_figures], 0.81)
    answers = Answers(torch.ones(100, dtype=torch.bool), asked[:, None].tolist(), drawn, dialled)
    flow = FlowResults(flow_figures, asked, drawn, drawn, dialled, Digits(drawn, asked), answers)
    codes = CodeResults(code_figures, asked, drawn, held_out.images)
    losses = {
        "flow": [{"text": 1 / (1 + step), "images/pixels": 1.0, "audio/bands": 1.0} for step in range(50)],
        "codes": [{"images/codes": 3 / (1 + step)} for step in range(50)],
    }
    write_report(tmp_path, losses, held_out, flow=flow, codes=codes)

    assert json.loads((tmp_path / "metrics.json").read_text()) == flow_figures | code_figures
    for picture in ("digits.png", "digits_codes.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 + 10 + 1 + 2 + 10 + 10
    assert all(source.startswith("data:") for source in sources)
    sounds = [source.partition(",")[2] for source in sources if source.startswith("data:audio/wav")]
    assert all(base64.b64decode(sound).startswith(b"RIFF") for sound in sounds)
    assert "0.930" in page and "0.810" in page
    assert page.count('class="number missed"') == sum(
        (flow_figures | code_figures)[name] < goal for name, goal in GOALS.items()
    )


def test_an_answer_is_judged_only_where_it_says_draws_and_dials_in_this_order():
    text, image, clip = TextPart([3]), torch.full((1, 8, 8), 2.0), torch.ones(CLIP)
    picture = MediaPart("image", "images", "pixels", [1] * 4, image, torch.zeros(0))
    sound = MediaPart("audio", "audio", "bands", [1] * 8, clip, torch.zeros(0))
    parts = [[text, picture, sound], [text, sound, picture], [text, picture], [picture, sound], []]
    answers = Answers.of([GenerationOutput(parts=one) for one in parts])
    assert answers.whole.tolist() == [True, False, False, False, False]
    assert answers.words == [[3], [3], [3], [], []]
    assert (answers.drawn[0] == 1).all() and (answers.drawn[4] == -1).all()
    assert torch.equal(answers.dialled[1], clip) and not answers.dialled[2].any()
    assert answers.accuracy(answers.words, [[3]] * 5) == 0.2
    assert answers.accuracy([7] * 5, [7] * 5) == 0.2


def test_the_report_of_one_model_leaves_out_the_other(split, clips, tmp_path):
    _, held_out = split
    figures = {"draw_codes_accuracy": 0.9}
    codes = CodeResults(figures, clips[0], held_out.images[:100], held_out.images)
    write_report(tmp_path, {"codes": [{"images/codes": 1.0}]}, held_out, codes=codes)
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures
    assert not (tmp_path / "digits.png").exists()
    page = (tmp_path / "report.html").read_text()
    assert "draw_codes_accuracy" in page and "dial_accuracy" not in page and "<audio" not in page


# Drawing with codes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec(split) -> DigitCodec:
    return train_codec(split[0].images, steps=150, seed=0)


def test_a_codec_gives_unseen_digits_back_better_than_their_mean(split, codec):
    _, held_out = split
    images = held_out.images[:, None]
    codes = codec.encode(images)
    assert codes.shape == (360, *GRID) and codes.dtype == torch.int64
    assert len(codes.unique()) > CODES // 2
    error = (codec.decode(codes) - images).square().mean()
    assert error < 0.5 * (images - images.mean(0)).square().mean()


def test_a_trained_codec_is_frozen_and_the_same_from_its_file(split, codec, tmp_path):
    codec.save(tmp_path / "codec.pt")
    loaded = DigitCodec(tmp_path / "codec.pt")
    images = split[1].images[:, None]
    assert torch.equal(loaded.encode(images), codec.encode(images))
    assert torch.equal(loaded.decode(codec.encode(images)), codec.decode(codec.encode(images)))
    assert not codec.training and not any(p.requires_grad for p in codec.parameters())


def test_training_a_codec_leaves_the_random_numbers_of_others_alone(split):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (train_codec(split[0].images, steps=2, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.codebook, second.codebook)


def test_the_codebook_follows_means_and_wakes_idle_entries():
    codebook = torch.tensor([[0.0], [10.0], [99.0]])
    book = MovingCodebook(codebook, torch.Generator().manual_seed(0))
    features = torch.tensor([[1.0], [3.0], [8.0], [8.0]])
    for _ in range(200):
        book.follow(features, (features - codebook.T).abs().argmin(1))
    near = (features - codebook.T).abs().amin(1)
    assert near.max() < 0.1  # three entries for three different features
    assert codebook.max() < 9


def test_digits_are_written_otherwise_but_stay_the_digits_they_are(split):
    train, held_out = split
    other = data.otherwise_written(held_out.images, torch.Generator().manual_seed(0))
    assert other.min() >= -1 and other.max() <= 1
    assert not rows_of(other) & rows_of(held_out.images)
    recognised = judges.recognise(judges.train_svm(train), other)
    assert judges.accuracy(recognised, held_out.labels) > 0.93


def test_shares_of_a_step_of_codes_are_the_step(split):
    whole = data.code_batch(split[0], 8, 1, 0)
    parts = [data.code_batch(split[0], 8, 1, 0, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), whole["input_ids"])
    media = [batch["modality_targets"]["images"]["codes"]["media"] for batch in (*parts, whole)]
    assert torch.equal(torch.cat(media[:2]), media[2])
    assert ((whole["input_ids"] == TOKEN["<draw>"]).sum(1) == data.CODE_ROWS).all()


@pytest.fixture
def painter(codec, tmp_path, no_run) -> MimoModel:
    """The model that draws with codes, untrained."""
    codec.save(tmp_path / "codec.pt")
    run = initialize(seed=0)
    return MimoModel(codes_config(tmp_path / "codec.pt"), pg_collection=run.groups)


def test_media_are_encoded_on_the_fly_and_no_gradient_reaches_the_codec(split, painter):
    batch = data.code_batch(split[0], 4, 1, 0)
    outputs, _ = painter(**batch)
    term = outputs.modalities["images"].losses["codes"]
    assert term.count == 4 * data.CODE_ROWS
    # Nothing learned yet: about as likely as any other of the codes.
    assert term.mean().item() == pytest.approx(math.log(CODES), rel=0.3)
    term.mean().backward()
    decoder = painter.modality_submodules["images"].decoders["codes"]
    assert all(p.grad is None for p in decoder.tokenizer.parameters())
    assert decoder.heads[0].weight.grad.abs().sum() > 0


def test_drawings_with_codes_are_the_codecs_images_and_follow_the_seed(painter, codec):
    asked = torch.tensor([3, 7])
    first, again, other = (draw_with_codes(painter, asked, seed) for seed in (1, 1, 2))
    assert first.shape == (2, 8, 8)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_code_is_predicted_from_the_prompt_and_the_codes_before_it(painter):
    ids = data.code_sequences(torch.tensor([3]))
    images = painter.eval().modality_submodules["images"]

    def logits(ids, codes):
        outputs, _ = painter(ids, generation_inputs={"images": {"codes": codes}})
        return images.decoders["codes"].logits(images.rows_for("codes", outputs.modalities["images"].hidden))[0]

    codes = torch.zeros(data.CODE_ROWS, dtype=torch.int64)
    changed = codes.clone()
    changed[5] = 1
    moved = (logits(ids, codes) - logits(ids, changed)).abs().amax(1)
    assert (moved[:6] == 0).all() and (moved[6:] > 0).all()
    other_digit = data.code_sequences(torch.tensor([4]))
    assert ((logits(ids, codes) - logits(other_digit, codes)).abs().amax(1) > 0).all()


# One answer of text, picture and sound ------------------------------------------------------


def test_a_model_that_learned_the_task_for_a_moment_switches_by_itself(split, no_run):
    """Forty steps teach when to draw and when to dial, not yet what; the demo itself is judged on that."""
    run = initialize(seed=0)

    def steps(step: int, rank: int, size: int) -> list[dict]:
        return [data.training_batch(data.draw_samples(split[0], 32, 1, step).part(rank, size))]

    trained = train(flow_config(), run, steps, steps=40, seed=1, title="test")
    session = Session(trained.model, seed=3)
    answers, again = (session.next_of(split[1].images[:6]) for _ in range(2))
    assert answers.whole.all() and all(len(words) == 1 for words in answers.words)
    assert answers.drawn.shape == (6, 8, 8) and answers.dialled.shape == (6, CLIP)
    assert torch.equal(answers.drawn, again.drawn) and torch.equal(answers.dialled, again.dialled)
    assert len(rows_of(answers.drawn)) == 6
