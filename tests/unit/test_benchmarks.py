"""The benchmarks run, at toy sizes on the CPU; what they measure there means nothing."""

import doctest
import json

import pytest

from benchmarks import fp8, kinds, plot
from tests import warm

pytestmark = pytest.mark.process


def run(module: str, *arguments: str) -> str:
    job = warm.python("-m", module, *arguments)
    assert job.returncode == 0, job.stderr[-4000:]
    return job.stdout


def test_the_output_half(tmp_path):
    run("benchmarks.output", "--runs", "1", "--output", str(tmp_path / "output.json"))
    result = json.loads((tmp_path / "output.json").read_text())
    assert result["milliseconds"].keys() == {"text alone", "with output", "output half alone"}


def test_a_training_step_gives_upstreams_loss(tmp_path):
    run("benchmarks.step", "--small", "--rounds", "1", "--warmup", "1", "--out", str(tmp_path / "step.json"))
    upstream, ours, everywhere = json.loads((tmp_path / "step.json").read_text())["results"]
    assert (upstream["name"], ours["name"]) == ("upstream", "ours")
    assert ours["loss"] == everywhere["loss"] == pytest.approx(upstream["loss"], rel=1e-6)


def test_a_training_step_on_two_ranks_gives_upstreams_loss(tmp_path):
    out = tmp_path / "step.json"
    arguments = ("--small", "--tensor", 2, "--variants", "ours", "--rounds", "1", "--warmup", "1", "--out", out)
    job = warm.ranks(2, "-m", "benchmarks.step", *arguments)
    assert job.returncode == 0, job.stderr[-4000:]
    upstream, ours = json.loads(out.read_text())["results"]
    assert ours["loss"] == pytest.approx(upstream["loss"], rel=1e-6) and job.stdout.count("loss of the first step") == 1


def test_a_step_of_a_trainer(tmp_path):
    run("benchmarks.trainer_step", "--small", "--steps", "1", "--out", str(tmp_path / "trainer.json"))
    (eager,) = json.loads((tmp_path / "trainer.json").read_text())["results"]
    assert eager["replayed"] == 0 and len(eager["losses"]) == 6


@pytest.mark.parametrize("axes", [("--tensor", 2), ("--pipeline", 2, "--microbatches", 2), ("--microbatches", 2)])
def test_a_step_of_a_trainer_on_two_ranks(tmp_path, axes):
    out = tmp_path / "trainer.json"
    job = warm.ranks(2, "-m", "benchmarks.trainer_step", "--small", "--steps", "1", *axes, "--out", out)
    assert job.returncode == 0, job.stderr[-4000:]
    (eager,) = json.loads(out.read_text())["results"]
    assert len(eager["losses"]) == 6 and job.stdout.count("ms a step") == 1  # one rank speaks


def test_what_a_step_takes_is_sorted_by_kind_and_drawn(tmp_path):
    for module in (kinds, plot):
        assert not doctest.testmod(module).failed and doctest.testmod(module).attempted
    result = {"name": "ours", "step_ms": 10.0, "busy_ms": 8.0, "kinds_ms": {"GEMM": 6.0, "copies": 4.0}}
    figures = {"results": [result], "flops": {"language_model": 4e12}, "peak": 1e15, "device": "a GPU"}
    assert plot.bars(figures)["ours"] == pytest.approx({"GEMM": 4.8, "copies": 3.2, "idle": 2.0})
    (tmp_path / "step.json").write_text(json.dumps(figures | {"launches_a_second": 1e5}))
    plot.draw([tmp_path / "step.json"], tmp_path / "step.svg")
    assert (tmp_path / "step.svg").stat().st_size > 1000


def test_fp8_beside_bf16_where_there_is_none(tmp_path):
    assert not doctest.testmod(fp8).failed and doctest.testmod(fp8).attempted
    run("benchmarks.fp8", "--small", "--steps", "4", "--timed", "1", "--out", str(tmp_path / "fp8.json"))
    figures = json.loads((tmp_path / "fp8.json").read_text())
    assert [each["name"] for each in figures["times"]] == ["bf16"]
    losses = [each["losses"] for each in figures["training"]["runs"]]
    assert len(losses) == 4 and all(len(each) == 4 for each in losses) and losses[0] != losses[1]
    assert 0 < max(abs(a - b) for a, b in zip(losses[0], losses[3])) < 0.05  # the control: weights moved a little


def test_the_loss_where_labels_count():
    run("benchmarks.token_loss", "--small", "--rounds", "1")


def test_reading_data(tmp_path):
    contenders = ["ours", "padding"]
    run(
        "benchmarks.data", "--samples", "40", "--rounds", "1", "--workers", "0", "--contenders", *contenders,
        "--output", str(tmp_path / "data.json"),
    )  # fmt: skip
    results = json.loads((tmp_path / "data.json").read_text())["results"]
    assert list(results) == contenders
    assert results["ours"]["waste"] < results["padding"]["waste"]


def test_what_a_loop_waits_for_its_data(tmp_path):
    run(
        "benchmarks.data_gpu", "--small", "--steps", "2", "--warmup", "1", "--workers", "1", "--packs", "1",
        "--records", "20", "--output", str(tmp_path / "data.json"),
    )  # fmt: skip
    results = json.loads((tmp_path / "data.json").read_text())["results"]
    assert results["steps"] == 2 and 0 < results["waiting %"] <= results["reading %"] < 100


def test_attention_of_packs(tmp_path):
    run(
        "benchmarks.packed_attention", "--length", "256", "--heads", "2", "--width", "16", "--repeats", "1",
        "--output", str(tmp_path / "packed.json"),
    )  # fmt: skip
    results = json.loads((tmp_path / "packed.json").read_text())["results"]
    assert {"apart", "torch, fused", "torch, fused, media whole"} <= results.keys()


def test_generation_says_what_transformers_says_on_the_same_weights(tmp_path):
    out = run(
        "benchmarks.generate", "--shape", "small", "--new", "4", "--repeats", "1", "--batches", "2", "--text", "8",
        "--json", str(tmp_path / "generate.json"),
    )  # fmt: skip
    peer, ours = json.loads((tmp_path / "generate.json").read_text())
    assert (peer["name"], ours["name"]) == ("transformers", "ours, eager")
    assert "tokens of transformers that are those of ours, eager: 8 of 8" in out


def test_pictures_by_whole_passes_and_over_the_cache(tmp_path):
    run(
        "benchmarks.generate", "--shape", "small", "--pictures", "--steps", "2", "--repeats", "1", "--batches", "1",
        "--json", str(tmp_path / "pictures.json"),
    )  # fmt: skip
    assert [one["kind"] for one in json.loads((tmp_path / "pictures.json").read_text())] == ["flow", "codes"]
