"""Raw inputs -> rows `[N, H]` of every table that fills positions: what encoders read, and what decoders feed back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_mimo.check import Media, Nested
from megatron_mimo.config import MimoModelConfig, generation_table
from megatron_mimo.idle import with_idle
from megatron_mimo.plan import Plan

if TYPE_CHECKING:
    from megatron_mimo.decoders.targets import Targets
    from megatron_mimo.modality.submodules import ModalitySubmodules


def encode(
    media: Media,
    targets: Nested,
    plan: Plan,
    config: MimoModelConfig,
    submodules: Mapping[str, ModalitySubmodules],
    like: Tensor,
) -> dict[str, Tensor]:
    """Rows `[N, H]` by table: encoded inputs, and what decoders feed their generation tokens.

    Modalities come in one order on every rank, with or without inputs: what stands in for an absent one joins the same
    collectives.

    Args:
        media: of the batch, checked.
        targets: prepared targets.
        plan: of the batch.
        config: of the model.
        submodules: modality -> its `ModalitySubmodules` on this stage.
        like: a tensor with the width, dtype and device of embedded rows.

    Raises:
        ValueError: encoded rows that differ in number from their tokens.
    """
    rows = {}
    for modality, submodule in submodules.items():
        if modality in config.special_token_ids:
            rows[modality] = _encoded(modality, submodule, media.inputs.get(modality), plan, like)
        if submodule.generation_input is None:
            continue
        shares_token = generation_table(modality) not in plan.placed.names
        reads = shares_token and modality in media.inputs  # its positions read
        count = 0 if reads else plan.counts.get(modality) or 0
        shown: Targets | None = media.shown.get(modality)
        if modality in targets:
            shown = submodule.generation_input.pick(targets[modality])
        fed = submodule.generation_rows(shown, count, like)
        if not shares_token:
            rows[generation_table(modality)] = fed
        elif count:
            rows[modality] = with_idle(fed, [rows[modality]])
        else:
            rows[modality] = with_idle(rows[modality], [fed])
    return rows


def _encoded(modality: str, submodule: ModalitySubmodules, given: Mapping | None, plan: Plan, like: Tensor) -> Tensor:
    if given is None:
        return submodule.encode_nothing(like)
    encoded = submodule.encode_items(given, f"modality_inputs[{modality!r}]")
    plan.placed.check_rows(modality, encoded.rows.shape[0], encoded.rows_per_item)
    rows = encoded.rows.to(like.dtype)
    if encoded.reaches_all:
        return rows
    # They may leave out parameters that other ranks' rows reach.
    return with_idle(rows, [submodule.encode_nothing(like)])
