"""CUDA graphs on the CPU: what runs within a capture is recorded, and a replay runs it again on the same memory.

Collectives and messages of a capture move nothing, as on a GPU, and those of a replay do.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, Work
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_mimo.training.parts import graphed, whole_step

#: Messages that ranks send each other: each would wait for its counterpart.
MESSAGES = (torch.ops.c10d.send.default, torch.ops.c10d.recv_.default)


class RecordedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []

    def reset(self) -> None:
        """Gives up what it recorded, as a real one does its memory and communicators."""
        self.steps = []

    def replay(self) -> None:
        """Runs the recorded operations and leaves their results where the capture's were."""
        sent: list[Work] = []  # messages that go out together are waited for together
        with torch.no_grad():
            for function, args, kwargs, results in self.steps:
                if function in MESSAGES:
                    sent.append(_work_of(function(*args, **kwargs)))
                    continue
                while sent:
                    sent.pop(0).wait()
                if function.namespace == "c10d":
                    _work_of(function(*args, **kwargs)).wait()
                    continue
                again = tree_leaves(function(*args, **kwargs))
                for kept, found in zip(tree_leaves(results), again, strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != found.data_ptr():
                        kept.copy_(found)
        for work in sent:
            work.wait()


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
        if function.namespace == "c10d":
            results = _unmoved(function, args)
            self._record(function, args, kwargs, results)
            return results
        for given, argument in zip(args, function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                whole = given.detach().new_empty(0).set_(given.untyped_storage())
                self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        results = function(*args, **(kwargs or {}))
        self._record(function, args, kwargs, results)
        return results

    def _record(self, function: OpOverload, args: tuple, kwargs: dict | None, results: object) -> None:
        """Keeps the memory that tensors have now: one may become another (`tensor.data = other`)."""
        self.graph.steps.append((function, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, results))))


def _unmoved(function: OpOverload, args: tuple) -> object:
    """What a collective returns that did nothing: the tensors that it would have written, and that it is done.

    What would have come is zero: a recording computes with it, where a GPU's capture computes nothing.
    """
    if function is MESSAGES[1]:
        for waiting in args[0]:
            waiting.zero_()
    done = FakeWork().boxed()
    returned = len(function._schema.returns)
    return done if returned == 1 else (args[0], done)


def _work_of(results: object) -> Work:
    return Work.unbox(results[-1] if isinstance(results, tuple) else results)


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
