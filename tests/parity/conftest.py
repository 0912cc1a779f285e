"""One Megatron process on the CPU for the comparisons that build models."""

import pytest

import megatron_mimo


@pytest.fixture(scope="session")
def single_process():
    """Megatron-Core initialised with one rank; the seed is fixed."""
    yield megatron_mimo.initialize(seed=1234)
    megatron_mimo.shutdown()
