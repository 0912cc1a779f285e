"""CUDA graphs of a run, which end with it.

A graph that holds collectives keeps NCCL's communicators busy: `destroy_process_group` waits for ever for one that is
still there.
"""

from __future__ import annotations

from weakref import WeakSet

import torch

_made: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def new_graph() -> torch.cuda.CUDAGraph:
    """A graph to capture into; it can be replayed until the run ends."""
    graph = torch.cuda.CUDAGraph()
    _made.add(graph)
    return graph


def end_graphs() -> None:
    """Ends every graph of `new_graph` that is still there; before process groups go."""
    for graph in list(_made):
        graph.reset()
    _made.clear()
