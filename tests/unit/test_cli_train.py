"""`megatron-mimo train`: from pictures to a model, on one process and on several, stopped and gone on with."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_mimo.cli.reading import read_recipe
from tests import warm
from tests.commands import caption, command, listen, pictures

pytestmark = pytest.mark.process

KILLED = """
import os, signal, sys
from megatron_mimo.training import Trainer
from megatron_mimo.cli.entry import main

step = Trainer.train_step
def until(self, data):
    if self.steps_done == {step} and self.settings.steps == {steps}:
        os.kill(os.getpid(), signal.{signal})
    return step(self, data)
Trainer.train_step = until
sys.argv[1:] = {words!r}
main()
"""


RECORDED = """
import sys
import pytest
from megatron_mimo.cli.entry import main
from tests.recorded_graphs import record_graphs

record_graphs(pytest.MonkeyPatch())
sys.argv[1:] = {words!r}
main()
"""


def cut_short(name: str, words: list[str], step: int, steps: int) -> warm.Done:
    """`train` that sends itself a signal before a step of the stage with so many."""
    return warm.python("-c", KILLED.format(signal=name, words=words, step=step, steps=steps))


def recorded(words: list[str]) -> warm.Done:
    """A command whose CUDA graphs are recordings."""
    return warm.python("-c", RECORDED.format(words=words))


def lines(directory: Path) -> list[dict]:
    if not (directory / "log.jsonl").exists():
        return []
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_train_goes_on_after_kill_9_and_sigterm_and_ends_where_an_unbroken_run_ends(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = command(*caption(whole))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(whole / "model")]

    assert cut_short("SIGKILL", caption(broken), 5, 6).returncode == -9
    stopped = cut_short("SIGTERM", caption(broken), 4, 6)
    assert stopped.returncode == 143 and "the same command goes on" in stopped.stderr
    assert not (broken / "model").exists()
    done = command(*caption(broken))
    assert done.returncode == 0, done.stderr

    # Each step of each stage is there once, and the weights are those of the run that nothing broke.
    told = Counter((one["stage"], one["step"]) for one in lines(broken) if one["kind"] == "train")
    assert told == {**{("projector", n): 1 for n in (1, 2)}, **{("whole", n): 1 for n in range(1, 7)}}
    expected, found = (load_file(directory / "model" / "model.safetensors") for directory in (whole, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    transformers.LlavaForConditionalGeneration.from_pretrained(broken / "model")

    # Beside the run and the model lies the recipe, whole; the command again does nothing, another recipe is refused.
    kept = read_recipe(str(broken / "recipe.yaml"))
    assert kept == read_recipe(str(broken / "model" / "recipe.yaml")) and kept.stages[1].steps == 6
    again = command(*caption(broken))
    assert again.returncode == 0 and "this run is done" in again.stderr
    other = command(*caption(broken, "seed=7"))
    assert other.returncode == 2 and "seed: 1234 then, 7 now" in other.stderr


def test_each_stage_is_told_as_it_begins(tmp_path: Path) -> None:
    done = command(*caption(tmp_path / "run", "loggers.progress=true", "evaluation.samples=0", steps=2))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("stage ")]
    assert told == [
        "stage 1 of 2, projector: 2 steps of 1 pack of 128, training images/input_projections",
        "stage 2 of 2, whole: 2 steps of 2 packs of 128, training images/input_projections, language_model",
    ]


def test_an_evaluation_is_logged_and_answers_samples(tmp_path: Path) -> None:
    changes = [f"evaluation.data={pictures()}", "evaluation.every=3", "evaluation.samples=2", "evaluation.steps=1"]
    changes += ["evaluation.max_new_tokens=4", "loggers.tensorboard=true"]
    done = command(*caption(tmp_path, *changes))
    assert done.returncode == 0, done.stderr
    told = [(one["stage"], one["step"]) for one in lines(tmp_path) if one["kind"] == "evaluation"]
    assert told == [("projector", 2), ("whole", 3), ("whole", 6)]
    assert sorted(path.name for path in (tmp_path / "samples/whole/step_00000006").iterdir()) == ["0-0.txt", "1-0.txt"]
    told = tmp_path.joinpath("samples/whole/records.txt").read_text().splitlines()
    assert told == [f"{number}: 0{number}.png, record {number} of {pictures()}" for number in range(2)]
    assert list((tmp_path / "tensorboard/whole").iterdir())


def test_steps_as_cuda_graphs_log_what_launched_ones_do(tmp_path: Path) -> None:
    # On the CPU a pack is replayed where its samples begin as they did: captions are of one length.
    data = pictures(text="It is one.")
    changes = [f"data={data}", "held_out=0.1", "evaluation={every: 2, samples: 1, max_new_tokens: 4}", "ema_decay=0.9"]
    done = command(*caption(tmp_path / "launched", *changes))
    assert done.returncode == 0, done.stderr
    graphs = "graphs={buckets: {images: 16}, label_rows: 128, warmup: 1}"  # a pack has fewer images than 16
    done = recorded(caption(tmp_path / "replayed", graphs, *changes))
    assert done.returncode == 0, done.stderr
    assert "projector: steps as one CUDA graph: 1 captured, 1 replayed, 1 launched" in done.stderr
    assert "whole: steps as one CUDA graph: 1 captured, 5 replayed, 1 launched" in done.stderr
    expected, found = (lines(tmp_path / name) for name in ("launched", "replayed"))
    assert len(found) == len(expected) == 12
    for one, other in zip(found, expected, strict=True):
        both = {key: (one[key], other[key]) for key in ("text", "loss", "gradient_norm") if key in other}
        assert len(both) == (3 if other["kind"] == "train" else 2), other
        assert all(mine == pytest.approx(theirs, rel=1e-5) for mine, theirs in both.values()), (one, other)
    averages = (load_file(tmp_path / name / "model-ema/model.safetensors") for name in ("launched", "replayed"))
    expected, found = (next(averages) for _ in range(2))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-5) for name in expected)


def test_graphs_that_no_recipe_can_have_are_refused_before_a_step(tmp_path: Path) -> None:
    wrong = {
        "graphs: CUDA graphs need a GPU, found a run on cpu": command(*caption(tmp_path / "run", "graphs=true")),
        "graphs: buckets has 'image', expected modalities that are read: ['images']": recorded(
            caption(tmp_path / "run", "graphs={buckets: {image: 4}}")
        ),
        "graphs: audio/encoders/tower is WhisperEncoder, whose masks or grids the host reads": recorded(
            listen(tmp_path / "run", "graphs=true")
        ),
    }
    for told, done in wrong.items():
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and told in done.stderr, done.stderr
    assert not list(tmp_path.glob("run/stages/*"))


def test_under_torchrun_two_ranks_train_as_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(*caption(one, steps=2)).returncode == 0
    done = warm.ranks(2, "-m", "megatron_mimo.cli", *caption(two, "layout.tensor=2", steps=2))
    assert done.returncode == 0, done.stderr
    # Adam's first steps magnify the rounding of a gradient near zero, so losses and norms are compared.
    for name in ("loss", "gradient_norm"):
        expected, found = ([step[name] for step in lines(directory)] for directory in (one, two))
        assert found == pytest.approx(expected, rel=1e-4)
    _, told = transformers.LlavaForConditionalGeneration.from_pretrained(two / "model", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["data=nowhere"], "nowhere: expected a file or directory"),
        (["model.language_model=./nowhere"], "nowhere: expected a directory, or a name on the hub"),
        (["layout.tensor=4"], "takes a multiple of 4 processes, found 1; give --nproc 4"),
        (["megatron.moe_aux_loss=1"], "unknown setting 'moe_aux_loss'; did you mean 'moe_"),
        (["stages.0.trains={images/projector: 1e-3}"], "the model has no part 'images/projector'"),
        (["packing.length=0"], "packing.length: expected greater than 0, found 0"),
    ],
    ids=lambda given: str(given)[:24],
)
def test_what_cannot_be_trained_is_one_line_and_status_2(changes: list[str], told: str, tmp_path: Path) -> None:
    done = command(*caption(tmp_path / "run", *changes))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and told in done.stderr
    assert not list(tmp_path.glob("run/stages/*"))


@pytest.mark.long
def test_nproc_starts_ranks_and_gives_their_status_in_one_line(tmp_path: Path) -> None:
    """Cold processes: the launcher is torchrun's own."""
    words = caption(tmp_path / "run", "layout.tensor=2", steps=2)
    run = [sys.executable, "-m", "megatron_mimo.cli"]
    options = dict(capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    refused = subprocess.run([*run, *words, "layout.tensor=3", "--nproc", "3"], **options)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert "tensor_model_parallel_size 3: expected one of [1, 2, 4]" in refused.stderr
    done = subprocess.run([*run, *words, "--nproc", "2"], **options)
    assert done.returncode == 0 and done.stdout.splitlines() == [str(tmp_path / "run/model")], done.stderr


@pytest.mark.long
def test_ctrl_c_and_a_killed_starter_leave_nothing_running(tmp_path: Path) -> None:
    """Cold processes: signals and ends are the operating system's."""
    words = caption(tmp_path / "run", "layout.tensor=2", "checkpoints.every=null", steps=100_000)
    for sent, status, told in ((signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, -signal.SIGKILL, "")):
        started = subprocess.Popen(
            [sys.executable, "-m", "megatron_mimo.cli", *words, "--nproc", "2"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        ended = time.monotonic() + 600
        while not any(one["stage"] == "whole" for one in lines(tmp_path / "run")):
            assert time.monotonic() < ended and started.poll() is None
            time.sleep(0.2)
        ranks = [int(each) for each in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]
        assert len(ranks) >= 2
        # As a terminal does: Ctrl-C goes to the whole group; kill -9 to the starter alone.
        (os.killpg if sent == signal.SIGINT else os.kill)(started.pid, sent)
        _, said = started.communicate(timeout=300)
        assert started.returncode == status and told in said, said
        while any(running(rank) for rank in ranks):
            assert time.monotonic() < ended
            time.sleep(0.1)
        (tmp_path / "run" / "log.jsonl").unlink()


@pytest.mark.long
def test_two_agents_of_torchrun_train_one_run_as_the_page_of_several_nodes_says(tmp_path: Path) -> None:
    """Cold processes: the agents meet over a port, as those of two nodes do."""
    page = Path(__file__).parents[2].joinpath("docs/nodes.md").read_text()
    (told,) = re.findall(r"srun torchrun (.*?) -m megatron_mimo.cli train", page.replace("\\\n", ""))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        '"$SLURM_NNODES"': "2", '"$HEAD:29500"': f"127.0.0.1:{port}", '"$SLURM_JOB_ID"': "7",
        "--nproc-per-node 8": "--nproc-per-node 1",
    }.items():  # fmt: skip
        assert name in told
        told = told.replace(name, value)
    words = [*told.split(), "-m", "megatron_mimo.cli", *caption(tmp_path / "run", "layout.tensor=2", steps=2)]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=600) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def running(process: int) -> bool:
    """Whether a process has not ended; one that waits to be asked for its status has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
