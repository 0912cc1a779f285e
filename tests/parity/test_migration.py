"""docs/migration.md: every name of Megatron-Core's MIMO and of ours in its table is there, with each argument."""

import inspect
import json
import re
import warnings
from pathlib import Path

import pytest
from PIL import Image

import megatron_mimo
from megatron_mimo.cli.reading import read_recipe
from megatron_mimo.data import conversation_of, open_source

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.models import mimo as upstream

PAGE = Path(__file__).parents[2].joinpath("docs/migration.md").read_text()
ROWS = re.findall(r"^\| (`.*?`(?:, `.*?`)*) \| (`.*?`|none) \|.*\|$", PAGE.split("\n## ")[1], flags=re.MULTILINE)[1:]
NAME = re.compile(r"`([\w.]+)(?:\((\w+)=\))?`")


def holds(root: object, cell: str) -> None:
    for path, argument in NAME.findall(cell):
        found = root
        for word in path.split("."):
            found = getattr(found, word)
        assert not argument or argument in inspect.signature(found).parameters, cell


@pytest.mark.parametrize(("theirs", "ours"), ROWS)
def test_each_row_names_what_both_libraries_have(theirs: str, ours: str) -> None:
    holds(upstream, theirs)
    holds(megatron_mimo, ours)


def arguments(of: object) -> set[str]:
    return set(inspect.signature(of).parameters) - {"self"}


def test_no_argument_and_no_public_name_of_upstream_is_left_out() -> None:
    told = " ".join(theirs for theirs, _ in ROWS)
    for name, of in {
        "MimoModelConfig": upstream.MimoModelConfig,
        "MimoModel": upstream.MimoModel,
        "MimoModel.forward": upstream.MimoModel.forward,
    }.items():
        assert [each for each in sorted(arguments(of)) if f"`{name}({each}=)`" not in told] == []
    # The class of the optimizer is what `get_mimo_optimizer` gives.
    assert [name for name in upstream.__all__ if name not in told and name != "MimoOptimizer"] == []


def test_llavas_own_file_is_read_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/1.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "image": "1.png", "conversations": turns}]))
    (command,) = re.findall(r"^megatron-mimo train (\w+) '(data=.*?)' (directory=\S+)$", PAGE, flags=re.MULTILINE)
    (given,) = read_recipe(command[0], command[1:]).data
    source = open_source(tmp_path / given.path, media_root=tmp_path / given.media_root)
    conversation = conversation_of(source.record(0))
    assert [part.kind for turn in conversation.turns for part in turn.parts] == ["image", "text", "text"]


def test_the_keys_that_replace_a_trainers_options_are_those_of_the_recipe() -> None:
    recipe = read_recipe("caption", ["data=x"])
    first, second = recipe.stages
    assert (first.name, second.name) == ("projector", "whole")
    assert set(first.trains) == {"images/input_projections"} and "language_model" in second.trains
    assert recipe.packing.length and recipe.model.modalities["images"].reads and first.steps
