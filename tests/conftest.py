"""What every test of the suite can count on."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from megatron_mimo import launch
from tests import warm

# Multi-rank cases run beside the other tests, so that several threads a process would only wait for each other: with
# two in this one the tests of the diffusers adapter took twice as long, and 2.5 times the processors' time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

# How many inputs are drawn where a test does not say: `make check` takes 200, `make test` ten times as many.
settings.register_profile("check", max_examples=200, deadline=None)
settings.register_profile("whole", max_examples=2000, deadline=None)
settings.register_profile("soak", max_examples=10_000, deadline=None)  # once before a release
settings.load_profile("whole")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where there is no GPU; multi-rank cases come last, since they run beside the others."""
    items.sort(key=lambda item: item.path.name == "test_cases.py")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the collector need not look through a million objects of imports again and again
    gc.set_threshold(50_000, 20, 20)  # nor after every seven hundred new ones: 5 % of the suite's time


def pytest_sessionfinish() -> None:
    warm.stop()


@pytest.fixture
def no_run() -> Iterator[None]:
    """No run in progress, for tests that start and end their own; one that was in progress is started again after."""
    before = launch._current
    launch.shutdown()
    yield
    launch.shutdown()
    if before is not None:
        sizes = {name: size for name, size in vars(before.run.layout).items() if name != "world_size"}
        launch.initialize(seed=before.run.seed, backend=before.run.backend, **sizes)
