"""A rank that raises in the middle of training ends the job within seconds and says why, whichever loop runs."""

import os
import re
import time
from pathlib import Path

import pytest

from tests import warm

# From the exception to the end of the job: the rank's own end, and then the others' (`tests.warm.GRACE_S`). A rank
# left waiting waits for the ten minutes of the default timeout.
SECONDS = 20.0

RAISES = """
def raises(rank):
    import torch.distributed as dist
    if dist.get_rank() == rank:
        print(f"raised at {time.time()}", flush=True)
        raise ValueError("rank 1 read a broken image")
"""

TRAINER = """
import time
import megatron_mimo
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny
{raises}
def data(step, rank, size):
    if step == 1:
        raises(1)
    return [tiny.batch(step)]

run = megatron_mimo.initialize(backend="gloo")
Trainer(tiny.mimo_config(), run, TrainerSettings(steps=3)).train(data)
print("trained to the end")
"""

PRETRAIN = """
import sys, time
from examples.recipes import any_to_any_small
from megatron_mimo.training import pretrain
from tests.distributed.cases.pretrain import SIZES, TRAINING
{raises}
class Recipe:
    model_config = staticmethod(any_to_any_small.model_config)
    datasets = staticmethod(any_to_any_small.datasets)
    read = 0

    def collate(self, samples):
        self.read += 1
        if self.read == 3:
            raises(1)
        return any_to_any_small.collate(samples)

sys.argv[1:] = [*SIZES, *TRAINING, "--train-iters", "3", "--global-batch-size", "2"]
sys.argv += ["--distributed-timeout-minutes", "10"]
pretrain(Recipe())
print("trained to the end")
"""


@pytest.mark.process
@pytest.mark.distributed
@pytest.mark.parametrize("program", [TRAINER, PRETRAIN], ids=["trainer", "pretrain"])
def test_a_rank_that_raises_while_it_trains_ends_the_job_within_seconds(program: str, tmp_path: Path) -> None:
    path = tmp_path / "rank.py"
    path.write_text(program.format(raises=RAISES))
    job = warm.ranks(2, path, env=os.environ | {"PYTHONPATH": str(warm.ROOT)})
    ended = time.time()
    raised = re.search(r"raised at (\S+)", job.stdout)
    assert raised, job.stderr[-3000:]
    assert ended - float(raised[1]) < SECONDS
    assert job.returncode != 0
    assert "ValueError: rank 1 read a broken image" in job.stderr
    assert "trained to the end" not in job.stdout
