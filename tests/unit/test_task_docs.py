"""Each page of a task runs as written, one after the other in one directory, on tiny models and few steps."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_mimo.hf import qwen2
from megatron_mimo.hf.blueprint import add_family
from tests import checkpoints, warm
from tests.commands import caption, command, listen, parts, pictures, sounds
from tests.unit.test_cli_answers import trained

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
PAGES = ["pictures", "evaluate", "export", "start"]
RECIPES = {"caption": caption, "listen": listen}
NAMES = {"Qwen/Qwen2.5-0.5B-Instruct": 0, "google/siglip-base-patch16-224": 1}


def blocks(page: str, kind: str) -> list[str]:
    text = ROOT.joinpath(f"docs/{page}.md").read_text().replace("\\\n", " ")
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Words of the command lines of a page, after `megatron-mimo`."""
    lines = [shlex.split(line) for block in blocks(page, "bash") for line in block.splitlines() if line]
    assert lines and {line[0] for line in lines} == {"megatron-mimo"}
    return [line[1:] for line in lines]


def tiny(words: list[str]) -> list[str]:
    """A command of a page, on parts that are made on the spot and for few steps."""
    for name, place in NAMES.items():
        words = [word.replace(name, str(parts()[place])) for word in words]
    if words[0] in ("train", "data"):
        at = 1 + max(words.index(recipe) for recipe in RECIPES if recipe in words)
        changes = RECIPES[words[at - 1]](Path("unused"), steps=2)[2:]
        small = [change for change in changes if not change.startswith(("directory=", "data="))]
        words = [*words[:at], *small, *words[at:]]
    if words[0] in ("generate", "evaluate"):
        words = [*words, "--max-new-tokens", "4"]
    return words


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The directory after the commands of all pages."""
    where = tmp_path_factory.mktemp("pages")
    where.joinpath("pictures").symlink_to(pictures())
    where.joinpath("sounds").symlink_to(sounds())
    for page in PAGES:
        for words in commands(page):
            done = command(*tiny(words), cwd=where)
            assert done.returncode == 0, (page, words, done.stderr)
    return where


def test_the_commands_of_the_pages_write_what_the_pages_say(work: Path) -> None:
    assert "<html" in work.joinpath("packs.html").read_text().lower()
    assert len(work.joinpath("answers/answers.jsonl").read_text().splitlines()) == 60
    assert len(work.joinpath("heard/answers.jsonl").read_text().splitlines()) == 40
    written = ("scores.json", "samples.html", "pictures/scores.jsonl")
    assert all(work.joinpath("scores", name).stat().st_size for name in written)
    assert all(work.joinpath("runs", name, "model/model.safetensors").is_file() for name in ("caption", "qwen"))


def test_the_commands_of_the_readme_are_those_of_the_pages() -> None:
    lines = re.findall(r"^    megatron-mimo (.*)$", ROOT.joinpath("README.md").read_text(), flags=re.MULTILINE)
    told = [shlex.split(line, comments=True) for line in lines]
    assert [words[0] for words in told] == ["train", "generate", "evaluate", "convert"]
    assert all(any(words in commands(page) for page in PAGES) for words in told)


def test_transformers_loads_what_was_exported_with_every_weight(work: Path) -> None:
    (code, _), (printed,) = blocks("export", "python"), blocks("export", "text")
    done = warm.python("-c", code, cwd=work)
    assert done.returncode == 0 and done.stdout == printed, done.stderr
    _, told = transformers.LlavaForConditionalGeneration.from_pretrained(work / "exported", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_transformers_answers_about_a_picture_what_the_command_answers(tmp_path: Path) -> None:
    done = command("convert", trained(), tmp_path / "exported", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    tmp_path.joinpath("pictures").symlink_to(pictures())
    for number in range(4):
        asks = "".join(blocks("export", "python")).replace("00.png", f"{number:02}.png")
        done = warm.python("-c", asks, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said = pictures().joinpath(f"{number:02}.txt").read_text()  # as test_cli_answers finds of `generate`
        assert done.stdout.splitlines()[-1] == said


def test_the_new_modality_encoder_and_decoder_of_the_page_read_learn_and_write(tmp_path: Path) -> None:
    *code, _, _ = blocks("adding", "python")
    modality, decoder, _ = blocks("adding", "text")
    done = warm.python("-c", "\n".join(code), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [
        line for line in done.stdout.splitlines() if line.startswith("torch.Size")
    ] == f"{modality}{decoder}".splitlines()


def starcoder() -> transformers.PreTrainedModel:
    config = transformers.Starcoder2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, max_position_embeddings=512, sliding_window=64, norm_epsilon=1e-2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return checkpoints.randomized(transformers.AutoModelForCausalLM.from_config(config))


def test_a_family_added_as_the_page_says_computes_what_transformers_does_and_goes_out_as_it_came(tmp_path) -> None:
    theirs = starcoder()
    checkpoints.written(theirs, tmp_path / "starcoder2")
    (*_, family, use), (*_, printed) = blocks("adding", "python"), blocks("adding", "text")
    done = warm.python(
        "-c", f"{family}\n{use}\ntorch.save(logits.cpu(), 'logits')\ntorch.save(ids.cpu(), 'ids')", cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.splitlines(keepends=True)[-1] == printed, done.stderr
    found, ids = (torch.load(tmp_path / name) for name in ("logits", "ids"))
    again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert isinstance(again, transformers.Starcoder2ForCausalLM)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        for model in (theirs, again):
            assert checkpoints.difference(found, model(ids).logits) < checkpoints.TOLERANCE

    # Ranks that share its layers out hold together what is in the files.
    saved = "mimo.initialize(2)\nmodel = mimo.from_pretrained('starcoder2')\nmimo.save_pretrained(model, 'shared')"
    done = warm.ranks(2, "-c", f"{family}\n{saved}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("starcoder2", "shared"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_family_whose_name_another_has_is_refused() -> None:
    add_family(qwen2.FAMILY)  # which is known
    with pytest.raises(ValueError, match="expected a model_type that is none of .*'llama'.*, found 'qwen2'"):
        add_family(replace(qwen2.FAMILY))
