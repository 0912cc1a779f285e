"""A modality's submodules on one pipeline stage of a model, from its spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.build import Spec, maker
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.modality.fit import check_widths
from megatron_mimo.modality.marks import settle
from megatron_mimo.modality.parts import description
from megatron_mimo.modality.submodules import ModalitySubmodules


def build_submodules(
    modality: str,
    spec: ModuleSpec,
    *,
    config: MimoModelConfig,
    pre_process: bool,
    post_process: bool,
    pg_collection,
) -> ModalitySubmodules:
    """One modality's submodules on one pipeline stage, their widths held against the language model's.

    Args:
        modality: its name, for messages.
        spec: of a `ModalitySubmodules`.
        config: of the model.
        pre_process, post_process: whether this stage is the first, the last.
        pg_collection: process groups; None for Megatron's global ones.

    Raises:
        TypeError: a spec of something else.
        ValueError: parts that do not fit together.
    """
    kind = maker(spec, f"modality_submodules[{modality!r}]")
    if not (isinstance(kind, type) and issubclass(kind, ModalitySubmodules)):
        raise TypeError(f"modality_submodules[{modality!r}] must be the spec of a ModalitySubmodules, got {kind}")
    submodule = kind.from_spec(spec, pre_process=pre_process, post_process=post_process, pg_collection=pg_collection)
    modules = submodule.encoders, submodule.decoders
    projections = submodule.input_projections, submodule.output_projections
    check_widths(modality, config.language_config.hidden_size, *modules, *projections)
    _check_variable_spans(modality, submodule, config)
    settle(modality, submodule, config.language_config, pg_collection)
    return submodule


def _check_variable_spans(modality: str, submodule: ModalitySubmodules, config: MimoModelConfig) -> None:
    """Refuses spans of variable length that nothing would end, or that are assembled by a fixed one; on every stage,
    as far as the specs tell.

    Raises:
        ValueError: naming the modality and the decoders.
    """
    specs = cast(Mapping[str, Spec], config.submodule_specs(modality).get("decoders") or {})
    told = {name: description(spec, dict(submodule.decoders).get(name)) for name, spec in specs.items()}
    varying = {name: one for name, one in told.items() if one is not None and one.variable}
    if not varying:
        return
    if len(varying) < len(specs):
        raise ValueError(
            f"modality {modality!r}: of decoders {sorted(specs)}, which read the same positions, {sorted(varying)} "
            "alone write a variable number of rows. Put them in two modalities."
        )
    token, vocabulary = config.generation_token_ids.get(modality), config.language_model.params.get("vocab_size")
    if modality not in config.end_token_ids:
        raise ValueError(
            f"modality {modality!r}: decoders {sorted(varying)} write a variable number of rows, which only an end "
            f"token ends, but end_token_ids has {sorted(config.end_token_ids)}. Add it, or describe the targets as "
            "variable=False."
        )
    if token is not None and (token < 0 or (vocabulary is not None and token >= vocabulary)):
        raise ValueError(
            f"modality {modality!r} writes a variable number of rows, so that the language model learns its generation "
            f"token {token} as text, which is outside the vocabulary [0, {vocabulary}). Choose an id inside it."
        )
    for name, one in varying.items():
        if one.sampled_rows is not None and submodule.samples_per_medium(one.sampled_rows[1]) > 1:
            raise ValueError(
                f"modality {modality!r}: decoder {name!r} writes a variable number of rows, but samples are assembled "
                "by a fixed one. Leave out image_shape or frames_per_clip."
            )
