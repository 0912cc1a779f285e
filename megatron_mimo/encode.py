"""One modality's raw inputs -> rows `[N, H]` of the table that fills its special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_mimo.idle import with_idle
from megatron_mimo.plan import Plan

if TYPE_CHECKING:
    from megatron_mimo.modality.submodules import ModalitySubmodules


def encoded(modality: str, submodule: ModalitySubmodules, given: Mapping | None, plan: Plan, like: Tensor) -> Tensor:
    """Rows `[N, H]` of a modality's inputs; none `[0, H]` without inputs, with a gradient for every parameter.

    Args:
        modality: its name.
        submodule: its encoders and input projection.
        given: encoder -> its keyword inputs; None where the batch has none.
        plan: of the batch.
        like: a tensor with the width, dtype and device of embedded rows.

    Raises:
        ValueError: rows that differ in number from their tokens.
    """
    if given is None:
        return submodule.encode_nothing(like)
    found = submodule.encode_items(given, f"modality_inputs[{modality!r}]")
    plan.placed.check_rows(modality, found.rows.shape[0], found.rows_per_item)
    rows = found.rows.to(like.dtype)
    if found.reaches_all:
        return rows
    # They may leave out parameters that other ranks' rows reach.
    return with_idle(rows, [submodule.encode_nothing(like)])
