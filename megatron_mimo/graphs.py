"""CUDA graphs of a run: what they read outlives the caches that gave it, and they end with the run.

A graph knows addresses. What it reads and did not make itself has to stay where it was: weights, gradients and inputs
do, but what a cache of the process gave may be dropped from it while other lengths pass through. So a graph keeps
what caches held around its capture.

Nor may anything be destroyed while a graph is captured: an old graph or its memory that Python's collector happens upon
can end the capture. So what is garbage goes before, and nothing is collected meanwhile.

A graph that holds collectives keeps NCCL's communicators busy: `destroy_process_group` waits for ever for one that is
still there.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megatron_mimo.compat.megatron import shared_buffers

#: Graph -> what it keeps.
_made: WeakKeyDictionary[torch.cuda.CUDAGraph, list[object]] = WeakKeyDictionary()
_Cache = type(lru_cache(lambda: None))


def new_graph() -> torch.cuda.CUDAGraph:
    """A graph to `capture` into; it can be replayed until the run ends."""
    graph = torch.cuda.CUDAGraph()
    _made[graph] = []
    return graph


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Within it, what is queued is captured. Other threads, such as NCCL's watchdog, may call CUDA meanwhile.

    Args:
        graph: of `new_graph`.
        pool: of memory, shared with graphs that are replayed in turns.
        stream: to capture in; None for torch's own.

    Raises:
        RuntimeError: something was queued that no graph can hold; its cause says what.
    """
    kept = _made[graph]
    kept += _in_caches()
    try:
        with _nothing_collected(), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "This cannot be captured as a CUDA graph. Most often a part of it waits for the device, as by item(), "
            "tolist() or a mask as an index, or copies from memory that is not pinned; the first error above says "
            "where. Change that part, or run without graphs."
        ) from error
    kept += _in_caches()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def places_of(module: nn.Module) -> tuple[tuple[int, bool], ...]:
    """Where each weight and buffer of a module lies now, and whether it trains: what a graph of it takes for granted.

    Asked anew each time, since another tensor may have taken the place of one.
    """
    return tuple((t.data_ptr(), t.requires_grad) for t in (*module.parameters(), *module.buffers()))


def end_graphs() -> None:
    """Ends every graph of `new_graph` that is still there; before process groups go."""
    for graph in list(_made):
        graph.reset()
    _made.clear()


def _in_caches() -> list[object]:
    """What functions with `lru_cache` remember, if tensors are in it, and Megatron's buffers for gathered tensors.

    Those of a library count too: rotary tables, masks, positions.
    """
    remembered = [each for cache in _caches() for each in gc.get_referents(cache)]
    return [each for each in remembered if _has_tensors(each)] + shared_buffers()


def _caches() -> Iterator[object]:
    """Functions and methods with `lru_cache` of every module; the collector does not list what was frozen."""
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            of_class = list(vars(value).values()) if issubclass(type(value), type) else []
            yield from (each for each in (value, *of_class) if type(each) is _Cache)


def _has_tensors(value: object) -> bool:
    """Whether a value is a tensor, or has one as an item or as an attribute."""
    if isinstance(value, Tensor):
        return True
    values = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {}).values()
    return any(isinstance(each, Tensor) for each in values)
