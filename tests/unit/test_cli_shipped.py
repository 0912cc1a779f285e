"""The recipes that ship beside `caption` run at tiny size: from files to a model that hears, reads and draws."""

import json
import shutil
import wave
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from megatron_mimo import HFCodec, HFImageCodec
from megatron_mimo.cli.reading import shipped
from megatron_mimo.data.media import open_sound
from megatron_mimo.data.messages import Medium
from tests import commands, warm
from tests.commands import any_to_any, command, draw, listen, pictures, say_and_draw, sounds, spoken, whole_way

pytestmark = pytest.mark.process

TEXTS = {f"It is {colour}." for colour in commands.COLOURS}


KILLED = """
import os, signal, sys
from megatron_mimo.generation import results
from megatron_mimo.cli.entry import main

whole, calls = results._png, []
def until(path, image):
    calls.append(None)
    whole(path, image)
    if len(calls) == 11:
        path.write_bytes(path.read_bytes()[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    return path
results._png = until
sys.argv[1:] = {words!r}
main()
"""


def losses(directory: Path, stage: str, name: str) -> list[float]:
    """A term in each step of a stage that counted anything of it."""
    found = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [one[name] for one in found if one["stage"] == stage and one["kind"] == "train" and name in one]


def answered(model: Path, data: Path, *words: object) -> list[dict]:
    output = model / "answers" / "-".join([data.parent.name, *(str(word).strip("-") for word in words)])
    done = command("generate", model, data, *words, "--output", output)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) | {"at": output} for line in (output / "answers.jsonl").read_text().splitlines()]


def test_each_recipe_that_ships_has_a_run_of_its_name_in_the_suite() -> None:
    assert all(callable(getattr(commands, name, None)) for name in shipped())


def test_listen_learns_texts_of_sounds_its_language_model_loads_in_transformers_and_it_needs_its_encoder_no_more(
    tmp_path: Path,
) -> None:
    run, ears = tmp_path / "run", shutil.copytree(commands.whisper(), tmp_path / "ears")
    words = listen(run, "model.modalities.audio.reads.name=ears", steps=30)
    found = whole_way(partial(command, cwd=tmp_path), words, sounds(), tmp_path)
    text = losses(run, "whole", "text")
    assert text[-1] < text[0] / 3
    assert len(found) == 40 and set(found) <= TEXTS
    before, after = (
        load_file(one / "language_model" / "model.safetensors") for one in (run / "model", tmp_path / "hf")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "language_model")
    page = (tmp_path / "scores" / "samples.html").read_text()
    assert page.count('<audio controls preload="none" src="data:audio/wav;base64,UklGR') == 32
    assert "<small>00.wav</small>" in page
    # Where a run began from is found from elsewhere too; what it wrote needs its encoder's directory no more.
    short = ("--max-new-tokens", 12)
    assert [line["text"] for line in answered(run / "stages/whole/step_00000030", sounds(), *short)] == found
    shutil.rmtree(ears)
    for model in (run, tmp_path / "hf"):
        assert [line["text"] for line in answered(model, sounds(), "--seed", 1, *short)] == found
    assert command("inspect", run, "--length", 1024).returncode == 0
    # It trains on from what it learned, and what comes of that hears.
    more = [
        "directory=more",
        f"model={{source: {run}}}",
        "stages=[{name: whole, steps: 2, trains: {language_model: 1e-5}}]",
    ]
    recipe = ["train", "listen", f"data={sounds()}", "packing.length=256", *more]
    done = command(*recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "more", "whole", "text")[0] < text[0] / 3
    shutil.rmtree(run)
    assert [line["text"] for line in answered(tmp_path / "more", sounds(), *short)] == found


def drawn(model: Path, data: Path) -> list[tuple[int, Path]]:
    """A record's number and the file that answers it, which its parts begin with."""
    lines = answered(model, data, "--columns", "write")
    assert all("error" not in line and line["parts"][0]["type"] != "text" for line in lines), lines
    firsts = [(line, line["parts"][0]) for line in lines]
    return [(line["index"], line["at"] / part[part["type"]]) for line, part in firsts]


def test_any_to_any_draws_pictures_of_texts_and_reads_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command(*any_to_any(run, steps=40))
    assert done.returncode == 0, done.stderr
    loss = losses(run, "whole", "images/pixels")
    assert sum(loss[-5:]) < sum(loss[:5])
    for _, file in drawn(run, pictures()):
        assert (image := Image.open(file)).size == (8, 8) and image.mode == "RGB"
    assert {line["text"] for line in answered(run, pictures(), "--max-new-tokens", 12)} <= TEXTS


def test_draw_draws_what_its_codec_makes_of_the_colour_asked_for_and_needs_the_codec_no_more(tmp_path: Path) -> None:
    run, codec = tmp_path / "run", shutil.copytree(commands.codec(), tmp_path / "codec")
    done = command(*draw(run, f"model.modalities.images.writes.codec={codec}", steps=60))
    assert done.returncode == 0, done.stderr
    expected = [codec_makes(HFImageCodec(codec), file) for file in sorted(pictures().glob("*.png"))]
    shutil.rmtree(codec)
    found = drawn(run, pictures())
    # Sixteen codes of 32, drawn and not the likeliest ones: by chance none would be right.
    alike = [torch.equal(pixels(file), expected[index]) for index, file in found]
    assert sum(alike) > len(alike) / 3 and len(alike) == 60
    # It has no reader, which each record is told.
    assert all(
        "no reader for it; it reads text alone" in line["error"]
        for line in answered(run, pictures(), "--max-new-tokens", 12)
    )
    done = command("convert", run, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    again = drawn(tmp_path / "hf", pictures())
    assert [file.read_bytes() for _, file in again] == [file.read_bytes() for _, file in found]
    pictures_are_scored_by_a_judge_that_ranks_share_out(run, tmp_path)
    goes_on_where_it_was_killed_with_half_a_picture_written(run, tmp_path / "broken", found[0][1].parents[2])


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_any_to_any_trains_on_two_ranks_of_one_model_and_answers_there_what_it_answers_on_one(axis, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = command(*any_to_any(one, steps=40))
    assert done.returncode == 0, done.stderr
    # Two ranks go on from the first stage of one, with its weights, and its packs and noise: losses part by rounding.
    shutil.copytree(one / "stages" / "projections", two / "stages" / "projections")
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *any_to_any(two, f"layout.{axis}=2", steps=40))
    assert done.returncode == 0, done.stderr
    for name in ("text", "images/pixels"):
        expected, found = (losses(directory, "whole", name) for directory in (one, two))
        assert found == pytest.approx(expected, rel=1e-4) and len(expected) > 10
    # From nothing, both stages; what begins fresh is drawn otherwise on each pipeline stage.
    fresh = tmp_path / "fresh"
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *any_to_any(fresh, f"layout.{axis}=2", steps=8))
    assert done.returncode == 0, done.stderr
    loss = losses(fresh, "projections", "text") + losses(fresh, "whole", "text")
    assert len(loss) == 10 and loss[-1] < loss[0]
    some, heard = shutil.copytree(pictures(8), tmp_path / "some"), shutil.copytree(sounds(8), tmp_path / "heard")
    for data, words in ((some, ("--columns", "write")), (some, ()), (heard, ())):
        asking = ("generate", two, data, *words, "--output")
        at = tmp_path / f"{data.name}{len(words)}"
        done = warm.ranks(2, "-m", "megatron_mimo.cli", *asking, at / "two", f"--{axis}", 2)
        assert done.returncode == 0, done.stderr
        done = command(*asking, at / "one")
        assert done.returncode == 0, done.stderr
        assert (at / "two" / "answers.jsonl").read_text() == (at / "one" / "answers.jsonl").read_text()
        files = [sorted((at / ranks).glob("media/*/*")) for ranks in ("one", "two")]
        assert [file.name for file in files[0]] == [file.name for file in files[1]] and len(files[0]) == 8 * bool(words)
        for alone, shared in zip(*files):
            assert (pixels(alone).int() - pixels(shared).int()).abs().max() <= 1  # of 255


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_what_draws_trains_on_two_ranks_of_one_model_and_draws_there_what_it_draws_on_one(axis: str, tmp_path) -> None:
    run, words = tmp_path / "run", ("--columns", "write")
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *draw(run, f"layout.{axis}=2", steps=12))
    assert done.returncode == 0, done.stderr
    loss = losses(run, "whole", "images/codes")
    assert loss[-1] < loss[0] / 2
    some = shutil.copytree(pictures(8), tmp_path / "some")
    output = tmp_path / "two"
    asking = ("generate", run, some, *words, "--output", output, f"--{axis}", 2)
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *asking)
    assert done.returncode == 0, done.stderr
    done = command("generate", run, some, *words, "--output", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    files = [
        {file.relative_to(at): file.read_bytes() for file in at.glob("media/*/*")} for at in (output, tmp_path / "one")
    ]
    assert files[0] == files[1] and len(files[0]) >= 8


JUDGE = """
import numpy

class Judge:
    def __call__(self, drawn, reference, text):
        assert text.startswith("It is ")
        return {"width": drawn.width, "reference": reference is not None}

def clashes(drawn, reference, text):
    return {"index": 1}

def fails(drawn, reference, text):
    if drawn.width == 8:  # not when it is shown the record's own
        raise OSError("no weights")
    return 1
"""


def pictures_are_scored_by_a_judge_that_ranks_share_out(run: Path, folder: Path) -> None:
    (folder / "judges.py").write_text(JUDGE)
    (folder / "some").mkdir()
    for file in sorted(pictures().iterdir())[:10]:
        shutil.copy(file, folder / "some")
    words = ["evaluate", run, folder / "some", "--columns", "write", "--output", folder / "out", "--judge"]
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *words, "judges:Judge", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "some: records 5, drawn 1, width 8, reference 1" in done.stdout
    found = json.loads((folder / "out" / "scores.json").read_text())
    assert found == {"some": {"records": 5, "drawn": 1, "width": 8, "reference": 1}}
    each = [json.loads(line) for line in (folder / "out" / "some" / "scores.jsonl").read_text().splitlines()]
    assert each == [{"index": index, "drawn": 1, "width": 8, "reference": 1} for index in range(5)]
    page = (folder / "out" / "samples.html").read_text()
    assert page.count("<img") == 10 and page.count("width 8") == 5
    done = command(*words, "judges:clashes", cwd=folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "expected the same names for each picture, and none of ['records', 'drawn', 'index']" in done.stderr
    # The answers are there, so that it fails at once; without a judge there is nothing to score.
    done = command(*words, "judges:fails", cwd=folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "raised OSError: no weights" in done.stderr and "mend it and give the same command" in done.stderr
    done = command(*words[:-1])
    assert done.returncode == 2 and "pictures are scored by --judge" in done.stderr


def codec_makes(codec: HFImageCodec, file: Path) -> torch.Tensor:
    """A picture's codes as a picture, as `generate` saves it: uint8 `[3, 8, 8]`."""
    image = pixels(file, (8, 8))[None] / 255
    with torch.no_grad():
        return (codec.decode(codec.encode(image))[0].clamp(0, 1) * 255).round().byte()


def pixels(file: Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    image = Image.open(file)
    return torch.from_numpy(np.array(image if size is None else image.resize(size))).permute(2, 0, 1)


def test_sounds_are_said_as_codes_beside_pictures_that_a_flow_transformer_draws(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command(*say_and_draw(run, "held_out=0.1", "evaluation.samples=1", steps=70))
    assert done.returncode == 0, done.stderr
    # The made-up record's clip is as long as it can say, and EnCodec looks at the sizes of its layers as tensors.
    done = command("inspect", run, "--length", 1024)
    assert done.returncode == 2 and "layouts: tensor [1, 2, 4], pipeline [1, 2]" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "memory: a part of the model looks at values" in line and "count the model without that part" in line
    loss = losses(run, "whole", "images/pixels")
    assert sum(loss[-5:]) < sum(loss[:5])
    assert all(file.suffix == ".png" and Image.open(file).size == (8, 8) for _, file in drawn(run, pictures()))
    codec = HFCodec(commands.sound_codec())
    tones = [codec_says(codec, file) for file in sorted(spoken().glob("*.wav"))[:4]]
    found = [(index % 4, clip(file)) for index, file in drawn(run, spoken())]
    nearest = [max(range(4), key=lambda tone: (tones[tone] == heard).sum()) == index for index, heard in found]
    assert sum(nearest) > len(nearest) / 2 and len(nearest) == 40  # by chance a quarter
    (sample,) = (run / "samples" / "whole" / "step_00000070").glob("*.png")
    assert Image.open(sample).size == (8, 8)


def codec_says(codec: HFCodec, file: Path) -> torch.Tensor:
    """A sound's codes as a clip, as `generate` saves it."""
    heard = torch.zeros(7200)
    samples = torch.from_numpy(open_sound(Medium(path=file.name), codec.sampling_rate, file.parent).samples)
    heard[: len(samples)] = samples
    with torch.no_grad():
        return (codec.decode(codec.encode(heard[None]))[0, 0].clamp(-1, 1) * 32767).round().short()


def clip(file: Path) -> torch.Tensor:
    """0.9 seconds at the codec's rate, int16."""
    with wave.open(str(file)) as opened:
        assert (opened.getnchannels(), opened.getframerate(), opened.getnframes()) == (1, 8000, 7200)
        return torch.frombuffer(bytearray(opened.readframes(7200)), dtype=torch.int16)


def goes_on_where_it_was_killed_with_half_a_picture_written(run: Path, output: Path, whole: Path) -> None:
    words = ["generate", run, pictures(), "--columns", "write", "--output", output]
    assert warm.python("-c", KILLED.format(words=[str(word) for word in words])).returncode == -9
    # What has a name of its own is whole: the batch of 8 that is done, and two pictures of the next.
    told = [json.loads(line) for part in (output / "parts").iterdir() for line in part.read_text().splitlines()]
    assert [line["index"] for line in told] == list(range(8))
    named = sorted(path for path in (output / "media").glob("0*/*"))
    assert len(named) == 10 and all(Image.open(path).load() for path in named)
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *words)  # data-parallel ranks share out what is left
    assert done.returncode == 0, done.stderr
    told = [line for part in (output / "parts").iterdir() for line in part.read_text().splitlines()]
    assert sorted(json.loads(line)["index"] for line in told) == list(range(60))
    assert (output / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()
    files = [{path.relative_to(at): path.read_bytes() for path in at.glob("media/*/*")} for at in (output, whole)]
    assert files[0] == files[1] and len(files[0]) >= 60
