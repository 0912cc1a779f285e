"""What may happen around and within the capture of a CUDA graph. Captures are recordings here."""

import gc
import weakref

import pytest
import torch

from megatron_mimo.graphs import capture, end_graphs, new_graph
from tests.recorded_graphs import record_graphs


class Cycle:
    """Garbage that the collector alone finds, such as a model with its old graphs."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    record_graphs(monkeypatch)
    yield
    end_graphs()


def test_garbage_goes_before_a_capture_and_none_within():
    """A graph or its memory that is destroyed meanwhile ends a real capture, wherever the collector happens to run."""
    gc.disable()  # until the capture
    try:
        before = weakref.ref(Cycle())
    finally:
        gc.enable()
    with capture(new_graph(), None):
        assert before() is None
        within = weakref.ref(Cycle())
        for _ in range(5000):  # as many objects as start the collector several times
            [torch.Size([1])]
        assert within() is not None and not gc.isenabled()
    assert gc.isenabled()
    gc.collect()
    assert within() is None


def test_a_collector_that_is_off_stays_off_and_one_that_is_on_comes_back_after_an_error():
    gc.disable()
    try:
        with capture(new_graph(), None):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(RuntimeError), capture(new_graph(), None):
        raise RuntimeError("no")
    assert gc.isenabled()


def test_what_no_graph_can_hold_is_told_with_its_cause():
    with pytest.raises(RuntimeError, match=r"cannot be captured.*item\(\)") as found, capture(new_graph(), None):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert "not permitted" in str(found.value.__cause__)
    with pytest.raises(torch.OutOfMemoryError, match="tried"), capture(new_graph(), None):
        raise torch.OutOfMemoryError("tried to allocate")
