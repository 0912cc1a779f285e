"""CUDA graphs on the CPU: what runs within a capture is recorded, and a replay runs it again on the same memory.

Collectives and messages of a capture move nothing, as on a GPU, and those of a replay do. Like a real one, a graph
keeps what it made itself alone: memory from outside that is gone when it is replayed fails the test.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, Work
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_mimo.compat.cuda_streams import Stream
from megatron_mimo.placement import Placement
from megatron_mimo.tally import HostFacts
from megatron_mimo.training.parts import graphed, whole_step

#: Messages that ranks send each other: each would wait for its counterpart.
MESSAGES = (torch.ops.c10d.send.default, torch.ops.c10d.recv_.default)


class RecordedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []
        self.ended = False

    def reset(self) -> None:
        """Gives up what it recorded, as a real one does its memory and communicators."""
        self.steps, self.ended = [], True

    def replay(self) -> None:
        """Runs the recorded operations and leaves their results where the capture's were."""
        sent: list[Work] = []  # messages that go out together are waited for together
        with torch.no_grad():
            for has_outside, *step in self.steps:
                function, args, kwargs, results = (
                    tree_map_only(_Outside, _Outside.tensor, step) if has_outside else step
                )
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


class Pool:
    """In place of a pool of memory: once all its graphs are gone it takes no capture, as torch 2.11 asserts."""

    def __init__(self) -> None:
        self._graphs: WeakSet[RecordedGraph] = WeakSet()
        self._used = False

    def take(self, graph: RecordedGraph) -> None:
        """A graph captured into it."""
        assert not self._used or any(not one.ended for one in self._graphs), "all graphs of the pool are gone"
        self._used = True
        self._graphs.add(graph)


class _Outside:
    """A tensor on memory that the graph does not keep, but while it is recorded."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory, self._meta = StorageWeakRef(tensor.untyped_storage()), torch.empty(0, dtype=tensor.dtype)
        self._place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        self._held: Tensor | None = tensor.detach()

    def settle(self) -> None:
        """Gives up the memory, but where nobody else has it: then the capture made it, by what is not dispatched."""
        assert self._held is not None
        if _holders(self._held) > 0:
            self._held = None

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        assert storage is not None, f"a replayed graph reads {[*self._place[1]]} of {self._meta.dtype} that are gone"
        return self._meta.new_empty(0).set_(storage, *self._place)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.made: set[int] = set()  # within the capture, by storage; what it recorded holds them
        self.outside: dict[int, list[_Outside]] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by memory: what was written to, and what it held

    def undo(self) -> None:
        """Memory is as it was: a capture computes nothing."""
        for written, held in self.before.values():
            written.copy_(held)
        self.before.clear()
        gc.collect()
        for uses in self.outside.values():
            for each in uses[1:]:
                each._held = None
            uses[0].settle()

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
        given = {_memory_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        found = {_memory_of(leaf) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)}
        self.made |= found - given
        kept = tree_map_only(Tensor, self._kept, (args, kwargs or {}, results))
        self.graph.steps.append((not given | found <= self.made, function, *kept))

    def _kept(self, tensor: Tensor) -> Tensor | _Outside:
        if _memory_of(tensor) in self.made:
            return tensor.detach()
        found = _Outside(tensor)
        self.outside.setdefault(_memory_of(tensor), []).append(found)
        return found


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _holders(tensor: Tensor) -> int:
    """Tensors beside this one that have its memory."""
    alone = torch.empty(0)
    counts = [torch._C._storage_Use_Count(each.untyped_storage()._cdata) for each in (tensor, alone)]
    return counts[0] - counts[1]


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
def _capture(
    graph: RecordedGraph, pool: Pool | None, stream: object = None, *, capture_error_mode: str
) -> Iterator[None]:
    if pool is not None:
        pool.take(graph)
    recording = _Recording(graph)
    with recording:
        yield
    recording.undo()


def _on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of which no graph would have anything."""

    @wraps(function)
    def unrecorded(*given: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*given, **named)

    return unrecorded


def record_graphs(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, captures of encoders and of steps are recordings."""
    for name, stand_in in {
        "CUDAGraph": RecordedGraph,
        "graph": _capture,
        "graph_pool_handle": Pool,
        "synchronize": lambda: None,
        "Stream": Stream,  # that of the CPU: Megatron keeps one of experts for good
        "stream": lambda stream: nullcontext(),
        "memory_allocated": lambda: 0,
        "is_current_stream_capturing": lambda: False,
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(graphed, "_check", lambda encoder: None)  # which asks for a GPU
    patch.setattr(whole_step, "_check_gpu", lambda run: None)
    patch.setattr(graphed, "clear_cublas_workspaces", lambda: None)
    patch.setattr(HostFacts, "spans", _on_the_host(HostFacts.spans))
    patch.setattr(Placement, "_check_predecessors", _on_the_host(Placement._check_predecessors))
