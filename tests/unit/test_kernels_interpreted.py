"""The Triton kernels where there is no GPU: Triton's interpreter runs their code on the CPU.

What only a compiler or a device can get wrong is left to `tests/gpu`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mimo import kernels
from megatron_mimo.kernels import reference

triton = pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")


def test_tensors_on_a_gpu_go_to_the_fused_kernels_and_others_to_the_reference():
    assert kernels.kernels_for(torch.device("cpu")) is reference
    assert kernels.kernels_for(torch.device("cuda")).__name__ == "megatron_mimo.kernels.triton"


@pytest.mark.process
def test_the_interpreted_kernels_equal_the_reference():
    # Triton decides at its import whether it compiles or interprets, so this takes a process of its own.
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name("interpreted_kernels.py"))]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
