"""The example of LLaVA runs from its parts to captions, in transformers too."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import megatron_mimo
from examples.llava import run as commands
from examples.llava.caption import asked, caption
from examples.llava.tiny import QUESTION


def command(monkeypatch, *arguments: object) -> None:
    """One command line; the run of the session is there already, and stays."""
    monkeypatch.setattr(sys, "argv", ["examples.llava", *map(str, arguments)])
    commands.main()


@pytest.fixture
def in_this_run(single_process, monkeypatch):
    monkeypatch.setattr(megatron_mimo, "initialize", lambda **_: single_process, raising=False)
    monkeypatch.setattr(megatron_mimo, "shutdown", lambda: None, raising=False)


def changed(before: Path, after: Path) -> set[str]:
    """Parts whose tensors differ."""
    first, last = (load_file(directory / "model.safetensors") for directory in (before, after))
    assert first.keys() == last.keys()
    return {name.split(".")[0] for name, tensor in first.items() if not torch.equal(tensor, last[name])}


def test_it_converts_trains_in_two_stages_captions_and_exports(in_this_run, tmp_path, monkeypatch, capsys) -> None:
    start, trained, exported = tmp_path / "start", tmp_path / "trained", tmp_path / "exported"
    images = tmp_path / "start-images"
    command(monkeypatch, "convert", "--output", start)
    command(
        monkeypatch, "train", "--model", start, "--data", images / "conversations.jsonl", "--output", trained,
        "--steps", 40, "--microbatches", 2, "--length", 128, "--learning-rate", 3e-3,
    )  # fmt: skip
    between = tmp_path / "trained-projector"
    assert changed(start, between) == {"multi_modal_projector"}
    assert changed(between, trained) == {"multi_modal_projector", "language_model"}
    capsys.readouterr()
    command(monkeypatch, "caption", "--model", trained, "--image", images / "2.png")
    assert capsys.readouterr().out == "It is blue.\n"
    command(monkeypatch, "export", "--model", trained, "--output", exported, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(exported / "model.safetensors").values()} == {torch.bfloat16}

    # transformers says the same, of the same ids and of its own processor's.
    model = megatron_mimo.from_pretrained(trained)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(trained).eval()
    processor = transformers.AutoProcessor.from_pretrained(trained)
    for number in range(4):
        image = images / f"{number}.png"
        ids, pixels = asked(model, image, QUESTION)
        said = theirs.generate(input_ids=ids, pixel_values=pixels, do_sample=False, max_new_tokens=16)
        text = processor.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == caption(model, image, QUESTION)
        given = processor(images=Image.open(image), text=f"<image>\n{QUESTION}")
        torch.testing.assert_close(torch.as_tensor(given["pixel_values"][0]), pixels[0])
        assert sum(one == model.mimo_config.special_token_ids["images"] for one in given["input_ids"][0]) == 16
