"""Programs on two GPUs, which tests start under torchrun."""

import os
import subprocess
import sys

import pytest
import torch


def run_on_two(module: str, *arguments: str) -> str:
    """What a module prints on two ranks of NCCL; the test is skipped where there are fewer GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.run(
        [*command, "-m", module, *arguments],
        env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    print(job.stdout)
    assert job.returncode == 0, job.stdout[-6000:]
    return job.stdout
