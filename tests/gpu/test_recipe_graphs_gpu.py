"""`graphs:` of a recipe on a GPU: real packs, whose samples begin anywhere, by the command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands

pytestmark = pytest.mark.gpu
FLOW = "model.modalities.images.writes={kind: flow, size: [8, 8], patch: 4, hidden_width: 32, depth: 2}"
RECIPES = {
    "read": (commands.caption, "images: 16", []),
    "written as codes": (commands.draw, "", []),
    "drawn by a flow": (commands.draw, "", [FLOW]),
}


def trained(words: list[str]) -> tuple[list[dict], str]:
    """What a run logs but for times, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mimo.cli", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    directory = next(word.partition("=")[2] for word in words if word.startswith("directory="))
    lines = [json.loads(line) for line in (Path(directory) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines], done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_replayed_steps_of_a_recipe_are_the_launched_ones(name, tmp_path):
    recipe, buckets, changes = RECIPES[name]
    changes = [*changes, "model.dtype=bfloat16", "held_out=0.1", "evaluation={every: 4, samples: 1, max_new_tokens: 8}"]

    def run(directory: str, warmup: int) -> tuple[list[dict], str]:
        graphs = f"graphs={{buckets: {{{buckets}}}, label_rows: 128, captures: 8, warmup: {warmup}}}"
        return trained(recipe(tmp_path / directory, graphs, *changes, steps=16))

    (launched, said), (replayed, counted) = run("launched", 1000), run("replayed", 1)
    assert replayed == launched and len(launched) > 16
    assert "whole: steps as one CUDA graph: 0 captured, 0 replayed, 16 launched" in said
    captured, by_graph, rest = map(int, re.findall(r"whole: .*: (\d+) captured, (\d+) replayed, (\d+)", counted)[0])
    assert captured >= 1 and by_graph >= 4 and by_graph + rest == 16, counted
