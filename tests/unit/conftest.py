"""One Megatron process on the CPU for the tests that build models."""

import pytest

import megatron_mimo

SEED = 1234


@pytest.fixture(scope="session")
def one_process():
    """Megatron-Core initialised with one rank; the seed is fixed."""
    yield megatron_mimo.initialize(seed=SEED)
    megatron_mimo.shutdown()


@pytest.fixture
def single_process(one_process):
    """The run in progress: not always the session's first, since tests of `initialize` end it and start another."""
    return megatron_mimo.initialize(seed=SEED)
