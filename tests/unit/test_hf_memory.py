"""What an import takes of a host's memory: this rank's share of the weights, and little more."""

import json
from pathlib import Path

import pytest

from tests import warm


def grown(shape: str, directory: Path) -> None:
    """Writes a model in one process, imports it at TP 2 in two others, and compares their memory before and after."""
    common = ("-m", "benchmarks.weights", "--shape", shape, "--directory", directory / "model", "--rounds", "0")
    assert (made := warm.python(*common, timeout=600)).returncode == 0, made.stderr[-4000:]
    job = warm.ranks(2, *common, "--tensor-parallel", "2", "--output", directory / "found.json", timeout=600)
    assert job.returncode == 0, job.stderr[-4000:]
    stored = sum(file.stat().st_size for file in (directory / "model").glob("*.safetensors"))
    for results in json.loads((directory / "found.json").read_text()):
        found = results["cold"]
        assert 0.45 * stored < found["share"] < 0.6 * stored
        # It is measured: the share itself is seen to come.
        assert found["growth"] > 0.9 * found["share"]
        assert found["growth"] < 1.3 * found["share"] + found["largest_tensor"], found


@pytest.mark.process
def test_an_import_takes_little_more_than_this_rank_s_share(tmp_path) -> None:
    grown("small", tmp_path)


@pytest.mark.long
def test_an_import_of_a_gigabyte_takes_little_more_than_this_rank_s_share(tmp_path) -> None:
    grown("1gb", tmp_path)
