"""A model that stays ready to answer: its cache, compiled layers and CUDA graphs serve one call after another."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any, Self

from megatron_mimo.cached_attention import Turn, cache_bytes
from megatron_mimo.generation.borrow import attentions_of, borrowed, check_cacheable, free_bytes
from megatron_mimo.generation.encoders import recorded_encoders
from megatron_mimo.generation.fused import FusedLayers, why_not
from megatron_mimo.generation.graphs import Recorder, Rows
from megatron_mimo.generation.prompts import Known
from megatron_mimo.generation.stage import Stage
from megatron_mimo.graphs import places_of

logger = logging.getLogger(__name__)


class Session:
    """What calls of `generate` share, from `with` to its end; until then the model cannot train.

    A call with as many rows as the one before, and no more slots, uses its cache and its graphs again. Others make new
    ones. Without a session every call has one of its own.

    Args:
        model: a `MimoModel`, this rank's part.
        compiled: make few kernels of each layer's decode step with `torch.compile`, which takes a minute at first; or
            the name of one of its backends. Layers of which nothing is known run as they are, and a message says why.
        graphs: record decode steps that only say text as CUDA graphs, and what prompts bring from the second time on
            that it has the same shapes: their pass through the layers, and encoders that do not wait for the host; None
            where that works: on a GPU, without pipeline stages and experts.
        memory: bytes that the cache may take on this rank; None for what is free.

    Attributes:
        recorder: the graphs, None where there are none.

    Raises:
        ValueError: a model or layout that generation does not serve, or graphs that cannot be recorded.

    Example:
        >>> with Session(model, compiled=True) as session:                              # doctest: +SKIP
        ...     for prompts in batches:
        ...         answers = model.generate(prompts, session=session)
    """

    def __init__(
        self,
        model: Any,
        *,
        compiled: bool | str = False,
        graphs: bool | None = None,
        memory: int | None = None,
    ) -> None:
        self.model, self._compiled, self._graphs, self._memory = model, compiled, graphs, memory
        self.turn, self.known = Turn(), Known.of(model)
        self.stage = Stage(model, self.turn, self.known.sections)
        self.recorder: Recorder | None = None
        self.state: Rows | None = None
        self._open: ExitStack | None = None
        self._held = (0, 0)
        self._places: tuple[tuple[int, bool], ...] = ()
        check_cacheable(model)
        reason = unrecordable(model, self.stage)
        if graphs and reason is not None:
            raise ValueError(f"graphs: expected a decode step that can be recorded, found {reason}. Leave graphs out.")
        self._records = reason is None if graphs is None else graphs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def prepare(self, rows: int, slots: int) -> tuple[Rows, int]:
        """Makes room for a call; gives the rows' buffers and the slots that each has. Collective over TP and PP.

        Args:
            rows, slots: of the cache that the call needs.

        Raises:
            ValueError: they do not fit.
        """
        places = places_of(self.model)  # which graphs know
        if self._open is not None and self.state is not None:
            if rows == self._held[0] and slots <= self._held[1] and places == self._places:
                return self.state, self._held[1]
            self.close()
        self._check_memory(rows, slots)
        opened = ExitStack()
        opened.enter_context(borrowed(self.model, self.turn, rows, slots))
        self._open, self._held, self._places = opened, (rows, slots), places
        self.state = Rows(rows, self.stage.hidden_size, self.stage.dtype, self.stage.device)
        if self._compiled:
            language = self.model.language_model
            problem = why_not(language)
            if problem is None:
                self.stage.fused = FusedLayers(language, self._compiled)
            else:
                logger.warning("generation: layers are not compiled, because of %s", problem)
        if self._records:
            self.recorder = Recorder(self.model.pg_collection.tp)
            opened.enter_context(recorded_encoders(self.model, self.recorder))
        return self.state, slots

    def close(self) -> None:
        """Gives the model back, every value as it was; cache and graphs go."""
        opened, self._open, self.state, self.recorder, self.stage.fused = self._open, None, None, None, None
        if opened is not None:
            opened.close()

    def _check_memory(self, rows: int, slots: int) -> None:
        needed = cache_bytes(attentions_of(self.model.language_model.decoder), rows, slots)
        free = free_bytes(self.stage.device)
        there = free if self._memory is None else min(self._memory, free)
        if not self.stage.least(int(needed <= there)):
            raise ValueError(
                f"the cache of {rows} rows of {slots} positions takes {needed / 2**20:.1f} MiB on this rank, where "
                f"{there / 2**20:.1f} MiB are to be had (here or on another rank too little). Give fewer prompts at a "
                "time, or a smaller max_new_tokens."
            )


def unrecordable(model: Any, stage: Stage) -> str | None:
    """What keeps decode steps from being recorded as CUDA graphs, or None where nothing does."""
    if stage.device.type != "cuda":
        return f"device {stage.device.type!r}"
    if model.pg_collection.pp.size() > 1:
        return "pipeline stages, between which rows are sent"
    if model.language_model.config.num_moe_experts is not None:
        return "experts, whose dispatch waits for the host"
    return None
