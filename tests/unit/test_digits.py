"""The demo's data, judges and report, each checked without the model."""

import base64
import io
import json
import re
import wave

import numpy as np
import pytest
import torch

from examples.digits import data, judges
from examples.digits.data import TOKEN, Digits, Task
from examples.digits.evaluate import Results
from examples.digits.model import CosineBands
from examples.digits.report import FIGURES, wav, write_report
from examples.digits.tones import CLIP, KEY_HZ, RATE, dial_tones


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
    figures = dict.fromkeys(FIGURES, 0.93) | {"draw_novelty": 1.0, "train_seconds": 12.0}
    drawn = torch.stack([held_out.images[held_out.labels == digit][0] for digit in asked.tolist()])
    losses = [{"text": 1 / (1 + step), "images/pixels": 1.0, "audio/bands": 1.0} for step in range(50)]
    write_report(tmp_path, Results(figures, asked, drawn, drawn, dialled), losses, held_out)

    assert json.loads((tmp_path / "metrics.json").read_text()) == figures
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 + 10 + 1
    assert all(source.startswith("data:") for source in sources)
    sounds = [source.partition(",")[2] for source in sources if source.startswith("data:audio/wav")]
    assert all(base64.b64decode(sound).startswith(b"RIFF") for sound in sounds)
    assert "0.93" in page and 'class="number missed"' in page
