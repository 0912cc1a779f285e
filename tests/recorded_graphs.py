"""CUDA graphs on the CPU: what runs within a capture is recorded, and a replay runs it again on the same memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mimo.training.parts import graphed, whole_step


class RecordedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []

    def replay(self) -> None:
        """Runs the recorded operations and leaves their results where the capture's were."""
        with torch.no_grad():
            for function, args, kwargs, results in self.steps:
                for kept, found in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != found.data_ptr():
                        kept.data.copy_(found)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by memory: what was written to, and what it held

    def undo(self) -> None:
        """Memory is as it was: a capture computes nothing."""
        for written, held in self.before.values():
            written.copy_(held)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for given, argument in zip(args, function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                whole = given.detach().new_empty(0).set_(given.untyped_storage())
                self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        results = function(*args, **(kwargs or {}))
        self.graph.steps.append((function, args, kwargs or {}, results))
        return results


@contextmanager
def _capture(graph: RecordedGraph, pool: object, stream: object = None, *, capture_error_mode: str) -> Iterator[None]:
    recording = _Recording(graph)
    with recording:
        yield
    recording.undo()


def record_graphs(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, captures of encoders and of steps are recordings."""
    for name, stand_in in {
        "CUDAGraph": RecordedGraph,
        "graph": _capture,
        "graph_pool_handle": lambda: None,
        "synchronize": lambda: None,
        "Stream": object,
        "stream": lambda stream: nullcontext(),
        "memory_allocated": lambda: 0,
        "is_current_stream_capturing": lambda: False,
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(graphed, "_check", lambda encoder: None)  # which asks for a GPU
    patch.setattr(whole_step, "_check_gpu", lambda run: None)
    patch.setattr(graphed, "clear_cublas_workspaces", lambda: None)
