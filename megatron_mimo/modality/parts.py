"""A modality's modules on one pipeline stage, from their specs."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from torch import nn

from megatron_mimo.build import build
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.decoders.targets import TargetDescription

Spec = ModuleSpec | type
Parts = Mapping[str, object]


def stage_parts(
    parts: Parts, *, pre_process: bool, post_process: bool, offered: Mapping[str, object]
) -> dict[str, object]:
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
    read = {key: _built(parts.get(key) if pre_process else None, offered) for key in ("encoders", "input_projections")}
    written = {
        key: _built(parts.get(key) if post_process else None, offered) for key in ("decoders", "output_projections")
    }
    made = {key: modules for key, modules in {**read, **written}.items() if modules}
    feed = parts.get("generation_input")
    if feed is None:
        return made
    name = only_decoder(parts.get("decoders") or {}, _params(feed).get("decoder"))
    _check_rule(feed, name, parts, made.get("decoders") or {})
    if not pre_process:
        return made
    described = None if name is None else _description(parts["decoders"][name], (made.get("decoders") or {}).get(name))
    if described is not None:
        offered = {**offered, "targets": described}
    return {**made, "generation_input": build(feed, offered)}


def only_decoder(decoders: Mapping[str, object], named: str | None) -> str | None:
    """The decoder whose targets a generation input reads, None where each batch's targets say which."""
    names = [name for name in decoders if named in (None, name)]
    return names[0] if len(names) == 1 else None


def _built(specs: Mapping[str, Spec] | list[Spec] | None, offered: Mapping[str, object]) -> dict | list:
    if isinstance(specs, Mapping):
        return {name: build(spec, offered) for name, spec in specs.items()}
    return [build(spec, offered) for spec in specs or ()]


def _params(spec: Spec) -> Mapping[str, object]:
    return (spec.params or {}) if isinstance(spec, ModuleSpec) else {}


def _description(spec: Spec, decoder: nn.Module | None) -> TargetDescription | None:
    """What a decoder learns: of the one built here, else by its spec."""
    if decoder is not None:
        return decoder.targets
    kind = get_module(spec)
    return kind.describe(_params(spec)) if isinstance(kind, type) and issubclass(kind, Decoder) else None


def _check_rule(feed: Spec, name: str | None, parts: Parts, decoders: Mapping[str, Decoder]) -> None:
    """Refuses an input that shows what its decoder reads off: here, since one stage may build only one of the two."""
    kind = get_module(feed)
    if name is None or not (isinstance(kind, type) and issubclass(kind, GenerationInput)):
        return
    rule = decoders[name].position_rule if name in decoders else _params(parts["decoders"][name]).get("position_rule")
    if rule is not None:
        kind.check_rule(rule)
