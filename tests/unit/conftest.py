"""One Megatron process on the CPU for the tests that build models."""

import pytest

import megatron_mimo


@pytest.fixture(scope="session")
def single_process():
    """Megatron-Core initialised with one rank; the seed is fixed."""
    layout = megatron_mimo.initialize(seed=1234)
    yield layout
    megatron_mimo.shutdown()
