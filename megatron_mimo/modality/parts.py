"""A modality's modules on one pipeline stage, from their specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo.build import Spec, build, maker
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.decoders.targets import TargetDescription

#: The `submodules` of a modality's spec: each name has a form of its own, and Megatron types none.
Parts = Mapping[str, Any]

_READING, _WRITING = ("encoders", "input_projections"), ("decoders", "output_projections")


def stage_parts(
    parts: Parts, *, pre_process: bool, post_process: bool, offered: Mapping[str, object]
) -> dict[str, Any]:
    """Constructor arguments of a `ModalitySubmodules`: the modules that one pipeline stage needs.

    What a decoder learns is named once, with its spec: its description is handed to the generation input that
    reads its targets, on whichever stage that is built.

    Args:
        parts: the `submodules` of the modality's spec.
        pre_process: build encoders, input projections and the generation input.
        post_process: build output projections and decoders.
        offered: keyword arguments for every constructor that names them.

    Raises:
        ValueError: a generation input that does not go with its decoder, as far as this stage can tell.
    """
    here = {**dict.fromkeys(_READING, pre_process), **dict.fromkeys(_WRITING, post_process)}
    built = {key: _built(key, parts.get(key) if on_stage else None, offered) for key, on_stage in here.items()}
    made: dict[str, Any] = {key: modules for key, modules in built.items() if modules}
    feed = parts.get("generation_input")
    if feed is None:
        return made
    name = only_decoder(parts.get("decoders") or {}, _setting(feed, "decoder"))
    _check_rule(feed, name, parts, made.get("decoders") or {})
    if not pre_process:
        return made
    described = None if name is None else description(parts["decoders"][name], (made.get("decoders") or {}).get(name))
    if described is not None:
        offered = {**offered, "targets": described}
    return {**made, "generation_input": build(feed, offered, what="generation_input")}


def description(spec: Spec, decoder: nn.Module | None) -> TargetDescription | None:
    """What a decoder learns: of the one built here, else by its spec, which may not tell."""
    if decoder is None:
        kind = maker(spec)
        if isinstance(kind, type) and issubclass(kind, Decoder):
            return kind.describe(_params(spec))
        decoder = kind if isinstance(kind, nn.Module) else None
    return decoder.targets if isinstance(decoder, Decoder) else None


def only_decoder(decoders: Mapping[str, object], named: str | None) -> str | None:
    """The decoder whose targets a generation input reads, None where each batch's targets say which."""
    names = [name for name in decoders if named in (None, name)]
    return names[0] if len(names) == 1 else None


def _built(key: str, specs: Mapping[str, Spec] | Sequence[Spec] | None, offered: Mapping[str, object]) -> dict | list:
    if isinstance(specs, Mapping):
        return {name: build(spec, offered, what=f"{key}[{name!r}]") for name, spec in specs.items()}
    return [build(spec, offered, what=f"{key}[{index}]") for index, spec in enumerate(specs or ())]


def _params(spec: Spec) -> Mapping[str, Any]:
    return (spec.params or {}) if isinstance(spec, ModuleSpec) else {}


def _setting(spec: Spec, name: str) -> Any:
    """What a spec's params say, or the module that is built already; None where neither does."""
    made_by = maker(spec)
    return vars(made_by).get(name) if isinstance(made_by, nn.Module) else _params(spec).get(name)


def _check_rule(feed: Spec, name: str | None, parts: Parts, decoders: Mapping[str, Decoder]) -> None:
    """Refuses an input that shows what its decoder reads off: here, since one stage may build only one of the two."""
    kind = maker(feed)
    kind = type(kind) if isinstance(kind, nn.Module) else kind
    if name is None or not (isinstance(kind, type) and issubclass(kind, GenerationInput)):
        return
    rule = decoders[name].position_rule if name in decoders else _setting(parts["decoders"][name], "position_rule")
    if rule is not None:
        kind.check_rule(rule)
