"""What tests on a GPU share."""

from collections.abc import Iterator

import pytest

import megatron_mimo
from megatron_mimo.launch import Run


@pytest.fixture(scope="module")
def graph_safe_run() -> Iterator[Run]:
    """Megatron-Core with one rank on the GPU, whose random numbers a CUDA graph can use."""
    megatron_mimo.shutdown()
    yield megatron_mimo.initialize(seed=1, graph_safe_rng=True)
    megatron_mimo.shutdown()
