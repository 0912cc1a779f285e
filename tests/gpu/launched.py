"""Programs on one GPU or more, which tests start under torchrun."""

import os
import subprocess
import sys

import pytest
import torch


def run_on(gpus: int, module: str, *arguments: str) -> str:
    """What a module prints on so many ranks of NCCL; the test is skipped where there are fewer GPUs."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
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
