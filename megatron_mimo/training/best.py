"""Which evaluation was the best so far, and for how many there was no better one; agreed on by all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.checkpoints.directories import CheckpointSettings
from megatron_mimo.training.settings import EarlyStopping

# Options that compare evaluations.
EARLY, KEPT = "early_stopping", "keep_best"


class Best:
    """The lowest value of a loss over the evaluations of a run.

    Args:
        term: whose mean counts, `"loss"` for the weighted sum.
        least: by how much a value must be lower to be a new best.

    Example:
        >>> best = Best("loss")
        >>> [best.take(step, {"loss": loss}) for step, loss in ((10, 2.0), (20, 2.5), (30, 1.5))]
        [True, False, True]
        >>> best.step, best.waited
        (30, 0)
    """

    def __init__(self, term: str, least: float = 0.0) -> None:
        self.term, self._least = term, least
        self.value, self.step, self.waited = math.inf, 0, 0

    def take(self, step: int, losses: Mapping[str, float]) -> bool:
        """Takes note of an evaluation with `step` steps behind it, and gives whether it is the best so far.

        One that is NaN, or counted nothing of the term, is none.
        """
        value = losses.get(self.term, math.nan)
        if value < self.value - self._least:
            self.value, self.step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`: plain numbers."""
        return {"term": self.term, "value": self.value, "step": self.step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another run was; one that looked at another term says nothing of this one."""
        if state.get("term") == self.term:
            self.value, self.step, self.waited = state["value"], state["step"], state["waited"]


def compared(early: EarlyStopping | None, checkpoints: CheckpointSettings | None) -> dict[str, Best]:
    """What a run compares its evaluations by: option -> the best of its term."""
    found = {}
    if early is not None:
        found[EARLY] = Best(early.term, early.least)
    if checkpoints is not None and checkpoints.keep_best is not None:
        found[KEPT] = Best(checkpoints.keep_best)
    return found


def check_term(option: str, term: str, config: MimoModelConfig, further: Iterable[str] = ()) -> None:
    """Refuses a loss that no evaluation of the model has. Rank-local.

    Args:
        option: what named it.
        term: to look for.
        config: of the model.
        further: names of further losses.

    Raises:
        ValueError: naming those that there are.
    """
    known = ["loss", "text", *further]
    for modality in config.generation_token_ids:
        decoders = config.submodule_specs(modality).get("decoders")
        if not isinstance(decoders, Mapping):
            return  # a class of the user's own builds its decoders itself
        known += [f"{modality}/{name}" for name in decoders]
    if term not in known:
        raise ValueError(f"{option}: the model has no loss {term!r}, expected one of {known}")
