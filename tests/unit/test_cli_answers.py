"""`generate`, `convert` and `data`: answers in order and once, the same weights in each form, data looked at."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import warm
from tests.commands import caption, command, pictures, sounds

pytestmark = pytest.mark.process

KILLED = """
import os, signal, sys
from megatron_mimo.cli import answering
from megatron_mimo.cli.entry import main

answered, calls = answering._answered, []
def until(*given):
    calls.append(None)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return answered(*given)
answering._answered = until
sys.argv[1:] = {words!r}
main()
"""


@cache
def trained() -> Path:
    """A run that has learned to say colours, made once a session."""
    directory = Path(mkdtemp(prefix="mimo-commands-")) / "run"
    changes = ["stages.0.trains={images/input_projections: 3e-3}", "stages.1.decay=constant"]
    done = command(*caption(directory, *changes, steps=40))
    assert done.returncode == 0, done.stderr
    return directory


def answers(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]


def asking(output: Path, *more: object) -> list[str]:
    words = ["generate", trained(), pictures(), "--output", output, "--max-new-tokens", 8, "--batch-size", 7]
    return [str(word) for word in (*words, *more)]


def test_generate_answers_each_record_once_and_in_order_after_kill_9_and_on_two_ranks(tmp_path: Path) -> None:
    done = command(*asking(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    bars = [line for line in done.stderr.splitlines() if line.startswith("[") and line.endswith("ms/record")]
    assert "] 7/60  " in bars[0] and "] 60/60  0 s left  " in bars[-1]
    found = answers(tmp_path / "whole")
    assert [line["index"] for line in found] == list(range(60))
    captions = [(pictures() / f"{number:02}.txt").read_text() for number in range(60)]
    assert [line["text"] for line in found] == captions
    assert [line["read"] for line in found] == [[f"{number:02}.png"] for number in range(60)]

    # Killed in the third batch, with half a line written; two data-parallel ranks go on.
    assert warm.python("-c", KILLED.format(words=asking(tmp_path / "broken"))).returncode == -9
    (part,) = (tmp_path / "broken" / "parts").glob("*.jsonl")
    assert len(part.read_text().splitlines()) == 14
    part.write_text(part.read_text()[:-20])
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *asking(tmp_path / "broken"))
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "broken") == found
    attempts = [path.name.split("-") for path in (tmp_path / "broken" / "parts").iterdir()]
    assert sorted(attempts) == [["00000", "00000.jsonl"], ["00001", "00000.jsonl"], ["00001", "00001.jsonl"]]

    other = command(*asking(tmp_path / "broken", "--temperature", 0.5))
    assert other.returncode == 2 and "temperature: 0.0 then, 0.5 now" in other.stderr
    other = command(*asking(tmp_path / "broken", "--columns", "write"))
    assert other.returncode == 2 and "columns: 'read' then, 'write' now" in other.stderr


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_generate_and_convert_on_two_ranks_of_one_model_give_what_one_gives(axis: str, tmp_path: Path) -> None:
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *asking(tmp_path / "answers", f"--{axis}", 2))
    assert done.returncode == 0, done.stderr
    captions = [(pictures() / f"{number:02}.txt").read_text() for number in range(60)]
    assert [line["text"] for line in answers(tmp_path / "answers")] == captions
    done = warm.ranks(2, "-m", "megatron_mimo.cli", "convert", trained(), tmp_path / "hf", f"--{axis}", 2)
    assert done.returncode == 0, done.stderr
    expected, found = (load_file(one / "model.safetensors") for one in (trained() / "model", tmp_path / "hf"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_record_that_cannot_be_used_has_its_error_and_the_others_are_answered(tmp_path: Path) -> None:
    records = [{"image": "00.png", "text": "?"}, {"image": "gone.png", "text": "?"}, {"image": "01.png", "text": "?"}]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("00.png", "01.png"):
        (tmp_path / name).write_bytes((pictures() / name).read_bytes())
    done = command("generate", trained(), file, "--output", tmp_path / "out", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    found = answers(tmp_path / "out")
    assert [line["reason"] for line in found] == ["stop_id", "error", "stop_id"]
    assert [line["read"] for line in found] == [["00.png"], ["gone.png"], ["01.png"]]
    assert "records.jsonl: 1 of 3 records have no answer; mend them and give the same command." in done.stderr
    assert "gone.png" in found[1]["error"] and found[2]["text"] == "It is green."

    # The same command asks about it alone once it is there; what leads out of the directory wants a root.
    shutil.copy(pictures() / "02.png", tmp_path / "gone.png")
    done = command("generate", trained(), file, "--output", tmp_path / "out", "--max-new-tokens", 8)
    assert done.returncode == 0 and "[########################] 1/1" in done.stderr
    again = answers(tmp_path / "out")
    assert [again[0], again[2]] == [found[0], found[2]] and again[1]["text"] == "It is blue."
    (tmp_path / "deep").mkdir()
    asked = {"image": str(tmp_path / "gone.png"), "text": "It is blue."}
    (tmp_path / "deep/ask.jsonl").write_text(json.dumps(asked))
    for words in (("generate",), ("evaluate",)):
        asking = (*words, trained(), tmp_path / "deep/ask.jsonl", "--max-new-tokens", 8, "--output")
        done = command(*asking, tmp_path / f"deep-{words[0]}")
        assert "leads out of" in done.stderr and "--media-root" in done.stderr
        done = command(*asking, tmp_path / f"deep-{words[0]}", "--media-root", tmp_path)
        assert done.returncode == 0 and "leads out of" not in done.stderr, done.stderr
    assert answers(tmp_path / "deep-generate")[0]["text"] == "It is blue."
    assert "ask: records 1, exact 1" in done.stdout


def test_pictures_without_texts_are_asked_about(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for number in (1, 2):
        shutil.copy(pictures() / f"{number:02}.png", bare)
    (tmp_path / "bare.jsonl").write_text('{"image": "bare/02.png"}\n')
    for data, texts in ((bare, ["It is green.", "It is blue."]), (tmp_path / "bare.jsonl", ["It is blue."])):
        output = tmp_path / f"answers-{data.name}"
        done = command("generate", trained(), data, "--output", output, "--max-new-tokens", 8)
        assert done.returncode == 0, done.stderr
        assert [line["text"] for line in answers(output)] == texts


def test_convert_keeps_each_weight_from_form_to_form_and_transformers_loads_it(tmp_path: Path) -> None:
    before = load_file(trained() / "model" / "model.safetensors")
    steps = (
        (trained(), "ck", "--to", "megatron"),
        (tmp_path / "ck", "hf"),
        (tmp_path / "ck", "st", "--to", "safetensors"),
    )
    for source, target, *more in steps:
        done = command("convert", source, tmp_path / target, *more)
        assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert sum(one.numel() for one in load_file(tmp_path / "st").values()) > 0
    # A file is a model too: it goes back into each form, asked on two ranks, and its sizes are told.
    file = tmp_path / "one.safetensors"
    for source, target, *more in (
        (tmp_path / "ck", file, "--to", "safetensors"),
        (file, tmp_path / "ck again", "--to", "megatron"),
        (tmp_path / "ck again", tmp_path / "hf again"),
        (max((trained() / "stages/whole").glob("step_*")), tmp_path / "stage.safetensors", "--to", "safetensors"),
        (tmp_path / "stage.safetensors", tmp_path / "hf of stage"),
    ):
        done = command("convert", source, target, *more)
        assert done.returncode == 0 and not done.stderr, done.stderr
    done = warm.ranks(2, "-m", "megatron_mimo.cli", "convert", file, tmp_path / "hf of two", "--tensor", 2)
    assert done.returncode == 0, done.stderr
    for name in ("hf again", "hf of stage", "hf of two"):
        again = load_file(tmp_path / name / "model.safetensors")
        assert again.keys() == before.keys() and all(torch.equal(again[one], before[one]) for one in before), name
        assert (tmp_path / name / "recipe.yaml").read_text() == (trained() / "recipe.yaml").read_text()
    assert not list(tmp_path.glob("reading-*"))
    done = command("inspect", file, "--length", 1024)
    assert done.returncode == 0, done.stderr
    language = sum(one.numel() for name, one in before.items() if name.startswith("language_model."))
    assert f"language_model: {language:,} parameters" in done.stdout.splitlines()
    plain, cut = tmp_path / "plain.safetensors", tmp_path / "cut.safetensors"
    save_file({"weight": torch.ones(2)}, plain)
    cut.write_bytes(file.read_bytes()[:-8])

    # A checkpoint of training is one too; a smaller dtype is asked for; nothing is written over.
    # It keeps its recipe, so it may lie anywhere.
    checkpoint = tmp_path / "elsewhere"
    shutil.copytree(next((trained() / "stages/whole").iterdir()), checkpoint)
    assert (checkpoint / "recipe.yaml").read_text() == (trained() / "recipe.yaml").read_text()
    done = command("convert", checkpoint, tmp_path / "half", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "half" / "recipe.yaml").read_text() == (trained() / "recipe.yaml").read_text()
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {one.dtype for one in half.values()} == {torch.bfloat16}
    for words, told in (
        (("convert", trained(), tmp_path / "half"), "expected nothing there"),
        (("convert", trained(), tmp_path / "x", "--to", "onnx"), "--to: expected one of"),
        (("convert", trained() / "stages", tmp_path / "x"), "a directory of several; name .*/whole/step_00000040"),
        (("convert", trained() / "stages/whole", tmp_path / "x"), "a directory of several; name .*step_00000040"),
        (("convert", tmp_path / "nowhere", tmp_path / "x"), "expected a directory, or a name on the hub"),
        (("convert", trained(), tmp_path / "x", "--dtype", "int8"), "--dtype: expected float32"),
        (("convert", tmp_path / "ck", tmp_path / "x", "--to", "megatron"), "is a Megatron checkpoint already"),
        (("convert", file, tmp_path / "x", "--to", "safetensors"), "is a file of safetensors already"),
        (("convert", plain, tmp_path / "x"), "expected a file that convert wrote"),
        (("convert", cut, tmp_path / "x"), "as its header says"),
        (("convert", trained(), tmp_path / "x", "--tensor", 2), "takes a multiple of 2 processes, found 1"),
    ):
        done = command(*words)
        assert done.returncode == 2 and re.search(told, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_data_is_measured_and_shown(tmp_path: Path) -> None:
    _, _, *changes = caption(tmp_path / "run")
    done = command("data", "prepare", "caption", *changes)
    assert done.returncode == 0, done.stderr
    assert "60 records" in done.stdout and "left out: none" in done.stdout
    done = command("data", "show", "caption", *changes, "--output", tmp_path / "packs.html", "--packs", 2)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "packs.html").read_text()
    assert page.count("<h2>Pack") == 2 and "It is red." in page and page.count("<img") > 4
    # A file that is no picture, and a picture without a text.
    some = tmp_path / "some"
    some.mkdir()
    for name in ("00.png", "00.txt", "01.png", "02.txt"):
        shutil.copy(pictures() / name, some)
    (some / "02.png").write_text("no picture")
    done = command("data", "prepare", "caption", *changes, f"data={some}")
    assert done.returncode == 0 and "1 file has no .txt beside and no part in the data, such as 01.png" in done.stderr
    assert (
        "2 records" in done.stdout and "1 pack of 128 an epoch" in done.stdout and "1 media\n    media: " in done.stdout
    )
    assert "'02.png' cannot be decoded (UnidentifiedImageError: cannot identify image file)" in done.stdout
    refused = command("data", "show", "caption", *changes, "--stage", "whol")
    assert refused.returncode == 2 and "did you mean 'whole'" in refused.stderr


def test_evaluate_scores_a_data_set_and_shows_samples(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for number in range(4):
        (wrong / f"{number}.png").write_bytes((pictures() / f"{number:02}.png").read_bytes())
        (wrong / f"{number}.txt").write_text("It is red.")  # which the first is
    done = command("evaluate", trained(), pictures(), wrong, "--output", tmp_path / "out", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["pictures"]["exact"] == found["pictures"]["bleu"] == 1 and found["pictures"]["records"] == 60
    assert found["wrong"]["exact"] == 0.25 and 0 < found["wrong"]["rouge_l"] < 1
    each = [json.loads(line) for line in (tmp_path / "out" / "wrong" / "scores.jsonl").read_text().splitlines()]
    assert [line["index"] for line in each] == [0, 1, 2, 3] and [line["exact"] for line in each] == [1, 0, 0, 0]
    for name in ("exact", "vqa", "rouge_l", "cider"):
        assert sum(line[name] for line in each) / 4 == pytest.approx(found["wrong"][name])
    assert "wrong: records 4, exact 0.25" in done.stdout
    page = (tmp_path / "out" / "samples.html").read_text()
    assert page.count('class="wrong"') == 3 and page.count("<img") == 32 + 4
    assert "<small>00.png</small>" in page

    done = command("evaluate", trained(), sounds(4), "--output", tmp_path / "heard", "--max-new-tokens", 1)
    assert done.returncode == 2 and "expected records that the model can answer, found none: record 0" in done.stderr
    assert "audio: this model has no reader for it; it reads image" in done.stderr

    (tmp_path / "none.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    done = command("evaluate", trained(), tmp_path / "none.jsonl", "--output", tmp_path / "none", "--max-new-tokens", 1)
    assert done.returncode == 2 and "expected records that end with an answer" in done.stderr


def test_inspect_counts_what_is_in_the_files_of_each_form_and_tells_layouts_and_memory(tmp_path: Path) -> None:
    stored = load_file(trained() / "model" / "model.safetensors")
    count = sum(one.numel() for name, one in stored.items() if name.startswith("language_model."))
    asked = ("--length", 1024, "--dtype", "float32")
    for model in (trained(), next((trained() / "stages/whole").iterdir())):
        done = command("inspect", model, *asked)
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()
        assert f"language_model: {count:,} parameters" in told
        assert "layouts: tensor [1, 2, 4], pipeline [1, 2]" in told
        assert told[-1].startswith("operations of the step on all ranks: ") and "language_model" in told[-1]
        parts = parts_of(told[-2])
        # Layers of a tower that the model does not use are in the model's files, and are not built.
        built = int(re.search(r"in all: ([\d,]+)", done.stdout)[1].replace(",", ""))
        assert parts["gradients"] <= 4.04 * built
    # Of Adam in float32 there are two moments; sizes are told in hundredths of a MiB.
    assert parts["gradients"] == pytest.approx(4 * built, rel=0.02)
    assert parts["optimizer"] == pytest.approx(8 * built, rel=0.02)
    together = ("weights", "gradients", "optimizer", "activations")
    assert parts["at the peak"] == pytest.approx(sum(parts[name] for name in together), rel=0.01)

    # Each stage has its own parts.
    done = command("inspect", trained(), *asked, "--tensor", 2, "--pipeline", 2, "--frozen", "images/encoders/tower")
    first, last = (parts_of(line) for line in done.stdout.splitlines() if line.startswith("memory"))
    assert first["weights"] < parts["weights"] and last["weights"] < parts["weights"]
    assert first["gradients"] < first["weights"] and last["gradients"] == pytest.approx(last["weights"], rel=0.1)
    done = command("inspect", trained(), *asked, "--recompute", "full", "--data", 4, "--distributed-optimizer")
    again = parts_of(done.stdout.splitlines()[-2])
    assert again["activations"] < 0.8 * parts["activations"]
    assert again["optimizer"] == pytest.approx(parts["optimizer"] / 4, rel=0.03)

    own = command("inspect", trained(), "--dtype", "float32", "--length", 128, "--example", pictures())
    assert own.returncode == 0 and parts_of(own.stdout.splitlines()[-2])["activations"] < parts["activations"]
    for words, told in (
        (("--tensor", 3), "--tensor 3: expected one of .1, 2, 4."),
        (("--frozen", "images"), "--frozen: expected some of"),
        (("--recompute", "some"), "--recompute: expected selective or full, found 'some'"),
        (("--length", 16), "--length 16: expected room for a record"),
    ):
        done = command("inspect", trained(), *words)
        assert done.returncode == 2 and re.search(told, done.stderr), done.stderr


def parts_of(line: str) -> dict[str, float]:
    """Bytes by part of a line about a rank's memory."""
    peak, told = re.search(r"stage \d+: ([\d.]+ .iB) at the peak: (.*)", line).groups()
    sizes = {"at the peak": peak} | dict(re.findall(r"([a-z]+) ([\d.]+ .iB)", told))
    units = {"MiB": 2**20, "GiB": 2**30}
    return {name: float(size.split()[0]) * units[size.split()[1]] for name, size in sizes.items()}
