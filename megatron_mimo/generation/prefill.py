"""Prompts -> rows of embeddings side by side, each medium through its encoder once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.generation.prompts import Known, Request, batched
from megatron_mimo.generation.stage import Stage


class Embedder:
    """Embeds the prompts of one call, on the first stage.

    Args:
        model: a `MimoModel`, borrowed.
        stage: its part on this rank.
        known: of the model.
        prompts: one a row of the cache.
    """

    def __init__(self, model: Any, stage: Stage, known: Known, prompts: Sequence[Request]) -> None:
        self._model, self._stage, self._known, self._prompts = model, stage, known, prompts
        self._length = max(len(prompt.ids) for prompt in prompts)

    def rows(self) -> tuple[Tensor | None, dict[int, str]]:
        """Rows `[S, rows, H]`, and what is wrong with some; every stage has the second. Collective over PP.

        Media of one shape go through their encoders together, others one prompt after the other.
        """
        rows, errors = self._embedded() if self._stage.first else (None, {})
        return rows, self._stage.told(errors)

    def _embedded(self) -> tuple[Tensor, dict[int, str]]:
        together = list(range(len(self._prompts)))
        try:
            return self._embed(together), {}
        except ValueError as error:
            if len(together) == 1:
                return self._blank(), {0: str(error)}
        rows, errors = self._blank(), {}
        for row in together:
            try:
                rows[:, row] = self._embed([row])[:, 0]
            except ValueError as error:
                errors[row] = str(error)
        return rows, errors

    def _blank(self) -> Tensor:
        shape = (self._length, len(self._prompts), self._stage.hidden_size)
        return torch.zeros(shape, dtype=self._stage.dtype, device=self._stage.device)

    def _embed(self, rows: Sequence[int]) -> Tensor:
        batch = batched([self._prompts[row] for row in rows], self._known, self._stage.device)
        if batch is None:
            raise ValueError("media of several shapes")
        embedded = self._model.embed(batch.ids, batch.positions, batch.inputs, batch.shown)
        self._model.finish_checks()
        return nn.functional.pad(embedded, (0, 0, 0, 0, 0, self._length - len(embedded)))

    def positions(self) -> Tensor | None:
        """Int64 `[k, rows, S]` where the model has several sections, else None."""
        if self._known.sections == 1:
            return None
        counted = torch.arange(self._length).expand(self._known.sections, self._length)
        own = [
            counted if r.positions is None else nn.functional.pad(r.positions, (0, self._length))[:, : self._length]
            for r in self._prompts
        ]
        return torch.stack(own, dim=1).to(self._stage.device)
