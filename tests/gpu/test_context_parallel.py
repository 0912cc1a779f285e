"""Context parallelism with TransformerEngine's attention: two GPUs give one's loss and gradients."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_two_ranks_equal_one_on_separate_and_packed_sequences():
    pytest.importorskip("transformer_engine", reason="attention over a split sequence is TransformerEngine's")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.run(
        [*command, "-m", "tests.gpu.context_parallel"],
        env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    print(job.stdout)
    assert job.returncode == 0, job.stdout[-6000:]
