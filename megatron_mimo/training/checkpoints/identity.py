"""What the model is: kept beside its weights as JSON, and compared before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any, cast

from megatron_mimo.build import maker
from megatron_mimo.config import MimoModelConfig

#: Fields of the configuration that give token ids, by name.
_TOKEN_IDS = ("special_token_ids", "generation_token_ids", "begin_token_ids", "end_token_ids")


def identity_of(config: MimoModelConfig) -> dict[str, Any]:
    """What a checkpoint's weights mean: they are another model's where one of these differs.

    The one place that lists them.

    Returns:
        `vocabulary` (None where the language model does not say), token ids by modality, the names of the modalities,
        of each its decoders with their classes, and whose spans see the whole of themselves; as JSON has it.

    Example:
        >>> from megatron.core.transformer.spec_utils import ModuleSpec
        >>> config = MimoModelConfig(language_model=ModuleSpec(module=object, params={"vocab_size": 64}),
        ...     modality_submodules={"images": ModuleSpec(module=object)}, special_token_ids={"images": -200})
        >>> identity_of(config)["vocabulary"], identity_of(config)["special_token_ids"]
        (64, {'images': -200})
    """
    ids = {name: dict(sorted(getattr(config, name).items())) for name in _TOKEN_IDS}
    decoders = {
        modality: {name: _kind(decoder) for name, decoder in sorted(_decoders(config, modality).items())}
        for modality in sorted(config.modality_submodules)
    }
    return {
        "vocabulary": config.language_model.params.get("vocab_size"),
        **ids,
        "decoders": decoders,
        "whole_spans": sorted(config.whole_spans),
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """How the model of a checkpoint differs from this one, a line each; empty where its weights fit.

    A larger vocabulary of ours fits: its new rows are not in the checkpoint.

    Args:
        theirs: of the checkpoint.
        ours: of the model to load into.

    Example:
        >>> differences({"vocabulary": 72, "decoders": {}}, {"vocabulary": 64, "decoders": {}})
        ['vocabulary: 72 tokens there, 64 here; a smaller vocabulary cannot hold its rows']
    """
    found = []
    for name in sorted({*theirs, *ours} - {"vocabulary", "decoders", "whole_spans"}):
        found += _ids_that_differ(name, theirs.get(name, {}), ours.get(name, {}))
    if "whole_spans" in theirs and "whole_spans" in ours:  # releases up to 0.1 do not say
        whole, seen = (", ".join(model["whole_spans"]) for model in (theirs, ours))
        if whole != seen:
            found.append(f"whole_spans: {whole or 'none'} there, {seen or 'none'} here")
    there, here = theirs.get("vocabulary"), ours.get("vocabulary")
    if there is not None and here is not None and there > here:
        found.append(f"vocabulary: {there} tokens there, {here} here; a smaller vocabulary cannot hold its rows")
    for modality in sorted({*theirs["decoders"], *ours["decoders"]}):
        found += _decoders_that_differ(modality, theirs["decoders"].get(modality), ours["decoders"].get(modality))
    return found


def _ids_that_differ(name: str, theirs: Mapping[str, int], ours: Mapping[str, int]) -> list[str]:
    return [
        f"{name}[{modality!r}]: {_said(theirs.get(modality))} there, {_said(ours.get(modality))} here"
        for modality in sorted({*theirs, *ours})
        if theirs.get(modality) != ours.get(modality)
    ]


def _decoders_that_differ(modality: str, theirs: Mapping[str, str] | None, ours: Mapping[str, str] | None) -> list[str]:
    if theirs is None or ours is None:
        return [f"modality {modality!r}: {'not there' if theirs is None else 'there'}, {_here(ours)}"]
    return [
        f"decoder {name!r} of {modality!r}: {_said(theirs.get(name))} there, {_said(ours.get(name))} here"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]


def _here(ours: object) -> str:
    return "not here" if ours is None else "here"


def _said(value: object) -> str:
    return "none" if value is None else str(value)


def _decoders(config: MimoModelConfig, modality: str) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], config.submodule_specs(modality).get("decoders") or {})


def _kind(decoder: Any) -> str:
    """The class, or the function, that a decoder is built by; of a built one its class."""
    made_by = maker(decoder)
    return made_by.__name__ if isinstance(made_by, type | FunctionType | MethodType) else type(made_by).__name__
