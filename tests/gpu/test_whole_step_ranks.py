"""A training step as one CUDA graph on two GPUs: data, tensor, context, pipeline and expert parallelism."""

import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.whole_step_ranks import EXACT

pytestmark = pytest.mark.gpu


def ranks(*names: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.run(
        [*command, "-m", "tests.gpu.whole_step_ranks", *names],
        env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    print(job.stdout)
    assert job.returncode == 0, job.stdout[-6000:]


@pytest.mark.parametrize("name", EXACT)
def test_replayed_steps_of_changing_batches_equal_eager_ones_bit_by_bit(name):
    ranks(name)


def test_attention_over_a_shared_sequence_is_replayed():
    pytest.importorskip("transformer_engine", reason="attention over a split sequence is TransformerEngine's")
    ranks("cp2-attention")
