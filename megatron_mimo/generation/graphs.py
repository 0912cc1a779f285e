"""What a call keeps on the device for each row of the cache, and CUDA graphs of the step that reads and writes it.

A graph replays on the memory that it was captured on, so that everything a decode step reads lies in buffers of
`Rows`, which stay as long as the cache does. There is one for each number of slots that attention reads and each way to
draw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.compat.megatron import tracker_without_forks
from megatron_mimo.generation.sampling import Sampler
from megatron_mimo.graphs import capture, new_graph

logger = logging.getLogger(__name__)

#: Steps before a capture: kernels are compiled and libraries take their workspaces in the first ones.
WARM_UP = 2


class Prompts:
    """Buffers of a pass over whole prompts of `S` positions.

    Args:
        rows: `[<= S, B, H]`, the first ones to read.
        positions: `[k, B, <= S]` of a model with several sections, or None.
        length: `S`.

    Attributes:
        rows: `[S, B, H]`; places: int64 `[B, S]`; positions: int64 `[k, B, S]` or None; hidden: `[S, B, H]`, what
            comes of them.
    """

    def __init__(self, rows: Tensor, positions: Tensor | None, length: int) -> None:
        self.rows = rows.new_zeros(length, *rows.shape[1:])
        self.places = torch.arange(length, device=rows.device).repeat(rows.shape[1], 1)
        self.positions = None if positions is None else positions.new_zeros(*positions.shape[:2], length)
        self.hidden = torch.zeros_like(self.rows)

    def take(self, rows: Tensor, positions: Tensor | None) -> None:
        """Takes other prompts, of no more positions."""
        self.rows.zero_()
        self.rows[: len(rows)] = rows
        if self.positions is not None and positions is not None:
            self.positions.zero_()
            self.positions[..., : positions.shape[-1]] = positions


class Rows:
    """Buffers of the decode step, one entry for each of `count` rows of the cache.

    Args:
        count: of rows.
        hidden_size: `H`.
        dtype, device: of hidden states.

    Attributes:
        ids: int64, the token that each row reads next.
        main: int64, the row whose token it reads: its own, but for rows of second prompts.
        packed: int64 `[3, count]`: slots, last slots seen, positions of the next step.
        uniforms: float64, the number that each row's draw reads.
        last: `[count, H]`, the state that each row's next token comes from; `before` the one before that.
        drawn: float64 `[3, count]`: ids and both log-probabilities of the latest draw.
        allowed: bool `[count, V]`, what each may say; None until the vocabulary's size is known.
        sampler: of the rows, with buffers of its own; None before the first call.
    """

    def __init__(self, count: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count = count
        self.ids = torch.zeros(count, dtype=torch.int64, device=device)
        self.main = torch.zeros(count, dtype=torch.int64, device=device)
        self.packed = torch.zeros(3, count, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(count, dtype=torch.float64, device=device)
        self.last = torch.zeros(count, hidden_size, dtype=dtype, device=device)
        self.before = torch.zeros_like(self.last)
        self.drawn = torch.zeros(3, count, dtype=torch.float64, device=device)
        self.allowed: Tensor | None = None
        self.sampler: Sampler | None = None
        self._prompts: dict[int, Prompts | None] = {}

    def prompts(self, rows: Tensor, positions: Tensor | None, length: int) -> Prompts | None:
        """Buffers with prompts padded to `length` positions; None the first time that there are as many.

        A call that does not come again is not worth a recording, which takes three passes.
        """
        if length not in self._prompts:
            self._prompts[length] = None
            return None
        held = self._prompts[length]
        if held is None:
            held = self._prompts[length] = Prompts(rows, positions, length)
        held.take(rows, positions)
        return held

    def begin(self, sampler: Sampler, main: Sequence[int]) -> Sampler:
        """Takes the rules of a new call; gives the sampler whose buffers hold them."""
        self.main.copy_(torch.tensor(main))
        if self.sampler is None:
            self.sampler = sampler
        else:
            self.sampler.take(sampler)
        return self.sampler

    def allow(self, allowed: Tensor) -> Tensor:
        """Takes what the rows of a new call may say; gives the buffer."""
        if self.allowed is None or self.allowed.shape != allowed.shape:
            self.allowed = allowed
        else:
            self.allowed.copy_(allowed)
        return self.allowed

    @property
    def changing(self) -> list[Tensor]:
        """What a step overwrites and reads again."""
        return [self.ids, self.last, self.before, self.drawn]


class Recorder:
    """Captures steps the first time that they are asked for, and replays them after.

    Args:
        group: tensor-parallel group, whose ranks capture together.

    Attributes:
        bytes: device memory that the captures took.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, step: Callable[[], object], changing: Sequence[Tensor]) -> None:
        """Runs `step` once: recorded, where it was captured under that key.

        Args:
            key: everything about it that is no content of a buffer.
            step: reads and writes buffers alone, and asks the device for nothing.
            changing: buffers that it both reads and writes; trial runs leave them as they were.
        """
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._captured(step, changing)
            logger.info("generation: captured %s, %.0f MiB for %d graphs", key, self.bytes / 2**20, len(self._graphs))
        graph.replay()

    def _captured(self, step: Callable[[], object], changing: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        kept = [buffer.clone() for buffer in changing]
        before = torch.cuda.memory_allocated()
        for _ in range(WARM_UP):
            with tracker_without_forks():
                step()
        torch.cuda.synchronize()
        if self._group.size() > 1:
            dist.barrier(self._group)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = new_graph()
        with tracker_without_forks(), capture(graph, self._pool):
            step()
        # What trial runs left in the cache, the replay overwrites.
        for buffer, content in zip(changing, kept):
            buffer.copy_(content)
        self.bytes += torch.cuda.memory_allocated() - before
        return graph
