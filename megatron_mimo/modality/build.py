"""A modality's submodules on one pipeline stage of a model, from its spec."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec, get_module

from megatron_mimo.modality.fit import check_widths
from megatron_mimo.modality.submodules import ModalitySubmodules


def build_submodules(
    modality: str, spec: ModuleSpec, *, hidden_size: int, pre_process: bool, post_process: bool, pg_collection
) -> ModalitySubmodules:
    """One modality's submodules on one pipeline stage, their widths held against the language model's.

    Args:
        modality: its name, for messages.
        spec: of a `ModalitySubmodules`.
        hidden_size: `H` of the language model.
        pre_process, post_process: whether this stage is the first, the last.
        pg_collection: process groups; None for Megatron's global ones.

    Raises:
        TypeError: a spec of something else.
        ValueError: parts that do not fit together.
    """
    kind = get_module(spec)
    if not (isinstance(kind, type) and issubclass(kind, ModalitySubmodules)):
        raise TypeError(f"modality_submodules[{modality!r}] must be the spec of a ModalitySubmodules, got {kind}")
    submodule = kind.from_spec(spec, pre_process=pre_process, post_process=post_process, pg_collection=pg_collection)
    reading = dict(encoders=submodule.encoders, input_projections=submodule.input_projections)
    writing = dict(decoders=submodule.decoders, output_projections=submodule.output_projections)
    check_widths(modality, hidden_size, **reading, **writing)
    return submodule
