"""The recipes that ship beside `caption` run at tiny size: from files to a model that hears, reads and draws."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from megatron_mimo.cli.reading import shipped
from tests import commands, warm
from tests.commands import any_to_any, command, draw, listen, pictures, sounds

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


def answered(model: Path, *words: object) -> list[dict]:
    output = model / "answers" / str(len(words))
    done = command("generate", model, *words, "--output", output, "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) | {"at": output} for line in (output / "answers.jsonl").read_text().splitlines()]


def test_each_recipe_that_ships_has_a_run_of_its_name_in_the_suite() -> None:
    assert all(callable(getattr(commands, name, None)) for name in shipped())


def test_listen_learns_texts_of_sounds_and_its_language_model_loads_in_transformers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command(*listen(run, steps=30))
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) < 10  # nothing of weights that are left out on purpose
    text = losses(run, "whole", "text")
    assert text[-1] < text[0] / 3
    found = answered(run, sounds())
    assert len(found) == 40 and {line["text"] for line in found} <= TEXTS
    done = command("evaluate", run, sounds(), "--output", tmp_path / "scores", "--max-new-tokens", 12)
    assert done.returncode == 0 and "sounds: records 40, exact" in done.stdout, done.stderr
    done = command("convert", run, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    before, after = (
        load_file(one / "language_model" / "model.safetensors") for one in (run / "model", tmp_path / "hf")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "language_model")
    # What was converted still hears.
    done = command("generate", tmp_path / "hf", sounds(), "--output", tmp_path / "again", "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    again = [json.loads(line)["text"] for line in (tmp_path / "again" / "answers.jsonl").read_text().splitlines()]
    assert again == [line["text"] for line in found]


@pytest.mark.parametrize("recipe", [any_to_any, draw])
def test_what_draws_answers_texts_with_pictures_and_reads_where_it_has_encoders(recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command(*recipe(run, steps=40))
    assert done.returncode == 0, done.stderr
    drawn = losses(run, "whole", "images/pixels")
    assert sum(drawn[-5:]) < sum(drawn[:5])
    for line in answered(run, pictures(), "--columns", "write"):
        assert [part["type"] for part in line["parts"]][:1] == ["image"], line
        image = Image.open(line["at"] / line["parts"][0]["image"])
        assert image.size == (8, 8) and image.mode == "RGB"
    if recipe is any_to_any:
        assert {line["text"] for line in answered(run, pictures())} <= TEXTS
    else:  # it has no reader, which each record is told
        assert all("no reader" in line["error"] for line in answered(run, pictures()))
        goes_on_where_it_was_killed_with_half_a_picture_written(run, tmp_path / "broken", run / "answers" / "3")


def goes_on_where_it_was_killed_with_half_a_picture_written(run: Path, output: Path, whole: Path) -> None:
    words = ["generate", run, pictures(), "--columns", "write", "--output", output, "--max-new-tokens", 12]
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
