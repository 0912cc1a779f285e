"""The demo trains alike under every layout: the losses of its first steps are those of one rank."""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist

from examples.digits.run import main
from megatron_mimo.launch import Run
from tests.distributed.harness import ROOT, case, shared_directory

# The seed is that of the run which the harness has initialised: the demo goes on in it.
ARGUMENTS = ["--steps", "9", "--codec-steps", "20", "--batch-size", "32", "--only-train", "--seed", "1234"]


@case(ranks=2, tensor_model_parallel_size=2, timeout_s=180)
def losses_of_the_demo_are_those_of_one_rank(run: Run) -> None:
    check(run, ["--tensor-parallel", "2"])


@case(ranks=2, tensor_model_parallel_size=2, timeout_s=180)
def losses_of_the_demo_are_those_of_one_rank_with_sequence_parallelism(run: Run) -> None:
    check(run, ["--tensor-parallel", "2", "--sequence-parallel"])


@case(ranks=2, timeout_s=180)
def losses_of_the_demo_are_those_of_one_rank_with_data_parallelism(run: Run) -> None:
    check(run, [])


def check(run: Run, layout: list[str]) -> None:
    rank = run.rank
    if rank == 0:
        expected = losses_of_one_rank()
    dist.barrier()
    out = shared_directory() / "digits"
    main([*ARGUMENTS, "--out", str(out), *layout])
    if rank > 0:
        return
    found = json.loads((out / "losses.json").read_text())
    assert set(found) == set(expected) == {"flow", "codes"}
    for name in found:
        check_curve(name, found[name], expected[name])


def check_curve(name: str, found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) == 9
    for step, (mine, theirs) in enumerate(zip(found, expected)):
        # Sums in another order differ in the last bits of float32; every step of Adam divides by the root of
        # tiny second moments and multiplies that difference.
        tolerance = 1e-5 if step == 0 else 2e-3
        torch.testing.assert_close(
            mine, theirs, rtol=tolerance, atol=1e-6, msg=lambda text: f"{name}, step {step}: {text}"
        )


def losses_of_one_rank() -> dict[str, list[dict[str, float]]]:
    """What the command gives in one process, run once for all cases of a job."""
    out = shared_directory() / "digits-one-rank"
    if not (out / "losses.json").exists():
        torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in torchrun}
        command = [sys.executable, "-m", "examples.digits", *ARGUMENTS, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads((out / "losses.json").read_text())
