"""CUDA graphs of one function, a graph for each shape of what it works on.

    first times of a shape          the function itself, so that libraries start and kernels compile
    then, once                      it is captured, on inputs that stay where they are
    from then on                    copy the inputs in, replay

All of it runs on one stream of its own: what autograd keeps of a parameter remembers the stream of its first use, and
a capture may wait for no other. The captures share one pool of memory, since a replay is done with before the next.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from megatron_mimo.compat.megatron import generators_of_tracker
from megatron_mimo.graphs import capture, new_graph

logger = logging.getLogger(__name__)


#: As many shapes without a graph are remembered, those seen last.
KEPT_SHAPES = 256


@dataclass
class GraphCounts:
    """How a function ran.

    Args:
        captured: graphs that were made.
        replayed: runs by a replay.
        eager: runs without a graph: the first of a shape, and all of a shape that got none.
    """

    captured: int = 0
    replayed: int = 0
    eager: int = 0

    @property
    def told(self) -> str:
        """In words.

        Example:
            >>> GraphCounts(1, 5, 2).told
            '1 captured, 5 replayed, 2 launched kernel by kernel'
        """
        return f"{self.captured} captured, {self.replayed} replayed, {self.eager} launched kernel by kernel"


@dataclass(frozen=True)
class _Capture[Result]:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    result: Result


class Captures[Result]:
    """Runs a function by CUDA graphs.

    Args:
        limit: at most this many graphs. Each keeps its inputs; what the function works with is shared.
        warmup: runs of a shape before it is captured.
        device: where it runs.
        stream: where it is captured and replayed; None for a new one.
    """

    def __init__(self, limit: int, warmup: int, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.counts = GraphCounts()
        self._limit, self._warmup, self._device = limit, warmup, device
        self._stream = (stream or torch.cuda.Stream(device)) if device.type == "cuda" else None
        self._pool = torch.cuda.graph_pool_handle()
        self._captures: dict[Hashable, _Capture[Result]] = {}
        self._seen: dict[Hashable, int] = {}

    def ready(self, key: Hashable | None) -> bool:
        """Whether the call that comes may run by a graph: of a shape that was captured, or has warmed up.

        Args:
            key: of the call; None where no graph may serve it.
        """
        return key in self._captures or self._may_capture(key)

    def __call__(
        self, key: Hashable | None, inputs: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Result], graph: bool
    ) -> Result:
        """What `run(inputs)` gives; of a replay in memory that the next replay writes over.

        Args:
            key: equal for calls that one capture serves: `run` does the same, but for the values of `inputs`; None
                where none may.
            inputs: tensors on the device, of equal shapes for equal keys.
            run: works on the tensors it is given, and on other memory that stays where it is. It may not wait for the
                device when it is captured.
            graph: whether it runs by a graph, of a key that is `ready`. With collectives in it all ranks say the same.
        """
        with self.stream():
            if not graph:
                self.counts.eager += 1
                result = run(inputs)
                self._warmed_up(key)
                return result
            captured = self._captures.get(key)
            if captured is None:
                captured = self._captures[key] = self._capture(inputs, run)
            for static, tensor in zip(captured.inputs, inputs, strict=True):
                static.copy_(tensor, non_blocking=True)
            captured.graph.replay()
            self.counts.replayed += 1
            return captured.result

    def drop(self) -> None:
        """Ends every graph, and makes room for others."""
        for captured in self._captures.values():
            captured.graph.reset()
        self._captures.clear()
        self._seen.clear()
        self._pool = torch.cuda.graph_pool_handle()  # one whose graphs are all gone takes no other

    def captured(self, key: Hashable) -> bool:
        """Whether there is a graph for calls with `key`."""
        return key in self._captures

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Within it, work is queued on the stream of the captures, between what is queued before and after."""
        if self._stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def _may_capture(self, key: Hashable | None) -> bool:
        warm = key is not None and self._seen.get(key, 0) >= self._warmup
        return warm and len(self._captures) < self._limit

    def _warmed_up(self, key: Hashable | None) -> None:
        """Counts a call that ran to its end without a graph."""
        if key is None:
            return
        seen = self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > KEPT_SHAPES:
            del self._seen[next(iter(self._seen))]
        if seen == self._warmup + 1 and len(self._captures) == self._limit:
            logger.info("a shape beyond the %d that are captured runs without a CUDA graph", self._limit)

    def _capture(self, inputs: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Result]) -> _Capture[Result]:
        statics = [tensor.clone() for tensor in inputs]
        graph = new_graph()
        for generator in generators_of_tracker():
            graph.register_generator_state(generator)
        torch.cuda.synchronize()
        before = _numbers_of_host(self._device)
        with capture(graph, self._pool, self._stream):
            result = run(statics)
        torch.cuda.synchronize()
        drawn = [name for name, state in _numbers_of_host(self._device).items() if state != before[name]]
        if drawn:
            logger.warning(
                "random numbers were drawn on the host (%s) while a step was captured as a CUDA graph. If a part of "
                "the model drew them, as encoders do that leave layers out at random, every replay computes with "
                "these: switch that off, or leave graphs out.",
                ", ".join(drawn),
            )
        self.counts.captured += 1
        logger.info("CUDA graph %d captured, for inputs %s", self.counts.captured, [list(t.shape) for t in inputs])
        return _Capture(graph, statics, result)


def _numbers_of_host(device: torch.device) -> dict[str, Hashable]:
    """Where the generators of random numbers stand that a replay does not move."""
    _, keys, place, *_ = numpy.random.get_state(legacy=True)
    found: dict[str, Hashable] = {"random": random.getstate(), "numpy": (keys.tobytes(), place)}
    if device.type != "cpu":
        found["torch"] = torch.get_rng_state().numpy().tobytes()
    return found
