"""How each output modality is written, as every pipeline stage must know it before the first token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch import Tensor

from megatron_mimo.data.positions import Grid, PositionRule
from megatron_mimo.decoders.arguments import check_sample_options
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.inputs import NoisedTargetInput
from megatron_mimo.decoders.rectified_flow import RectifiedFlowDecoder

if TYPE_CHECKING:
    from megatron_mimo.generation.prompts import Known

Style = Literal["pass", "one_by_one", "flow"]


@dataclass(frozen=True)
class Reread:
    """What the language model reads after a written span, so that later text sees the medium through its encoder.

    Args:
        inputs: the medium, one image or clip as `MediaPart.value` -> encoder -> its keyword inputs, as
            `modality_inputs` has them.
        rows: positions that the encoder's rows fill.
        before, after: text ids around them, the written span's end token included.
        grid: `(t, h, w)` of the rows, where `Writing.positions` reads it.
    """

    inputs: Callable[[Tensor], Mapping[str, Mapping[str, Any]]]
    rows: int
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    grid: Grid | None = None


@dataclass(frozen=True)
class Writing:
    """How one modality is to be written.

    Args:
        decoder: which one; may be left out where the modality has one.
        options: keyword options of the decoder's `sample`, such as `temperature`, `steps` or `guidance`. A flow with
            the language model in the loop takes `steps`, `solver`, `shift` and `guidance`. What it draws comes from
            the sample's seed.
        rows: generation tokens of one medium, where the decoder does not know; of a span of variable length the most,
            without which it would have no end.
        whole: whether all positions of a span see the whole of it.
        reread: what is read after it; None for nothing.
        positions: the rule by which training places this modality's spans under mrope, `data.GridPositions()` for
            example; None takes that of the call's `SampleProcessor`, and without one counts on as text does.
        grid: `(t, h, w)` of a written span's rows, where the rule reads it.
    """

    decoder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    whole: bool = False
    reread: Reread | None = None
    positions: PositionRule | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class SpanRule:
    """What every rank knows of a modality that may be written.

    Attributes:
        modality, decoder, kind: names; `kind` is "image", "audio" or the modality's name.
        style: "pass": all rows at once; "one_by_one": each row shows what was drawn before it; "flow": all rows at
            once, again at every solver step.
        rows: generation tokens of one medium, or the most of them.
        variable: whether an end token ends it.
        own: whether decoders read the state at each generation token; otherwise at its predecessor.
        fed: whether a generation input fills the positions; otherwise the generation token's own embedding does.
        token, begin, end: ids; `begin` and `end` may be None.
        writing: as the caller wants it.
        width: of a flow's targets; 0 for others.
    """

    modality: str
    decoder: str
    kind: str
    style: Style
    rows: int
    variable: bool
    own: bool
    fed: bool
    token: int
    begin: int | None
    end: int | None
    writing: Writing
    width: int = 0

    @property
    def opening(self) -> int:
        """The token that begins a span."""
        return self.token if self.begin is None else self.begin

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance, 1 is off."""
        return float(self.writing.options.get("guidance", 1.0))


def span_rules(model: Any, wanted: object, known: Known) -> dict[str, SpanRule]:
    """The rules of the modalities that may be written, alike on every rank. Collective over PP.

    Args:
        model: a `MimoModel`, this rank's part.
        wanted: None for every modality whose decoder samples; names; or name -> `Writing`.
        known: of the model.

    Raises:
        ValueError: a modality that is not written, or cannot be sampled, naming what is missing.
    """
    named = wanted is not None
    if wanted is None:
        wanted = list(known.generation)
    if isinstance(wanted, str) or not isinstance(wanted, (Mapping, Sequence, set, frozenset)):
        raise ValueError(f"modalities: expected names, or name -> Writing, found {wanted!r}")
    chosen = {name: wanted[name] if isinstance(wanted, Mapping) else Writing() for name in wanted}
    for name, writing in chosen.items():
        if name not in known.generation:
            raise ValueError(f"modalities: expected some of {sorted(known.generation)}, found {name!r}")
        if not isinstance(writing, Writing):
            raise ValueError(f"modalities[{name!r}]: expected a Writing, found {type(writing).__name__}")
    facts, group = _facts(model, chosen), model.pg_collection.pp
    told: list[dict[str, dict[str, Any]]] = [{} for _ in range(group.size())]
    if group.size() > 1:
        dist.all_gather_object(told, facts, group=group)
    else:
        told = [facts]
    rules = {}
    for name, writing in chosen.items():
        merged = {key: value for one in told for key, value in one[name].items()}
        problem = merged.pop("problem", None)
        if problem is None and group.size() > 2:
            problem = "more than two pipeline stages: those between would not know the shapes of what is fed back"
        if problem is None and merged["variable"] and writing.rows is None:
            problem = "its spans vary in length: give Writing(rows=...), the most of them"
        if problem is None and merged["variable"] and merged["style"] != "one_by_one":
            problem = "spans of variable length need a generation input that shows what was drawn, such as CodeInput"
        if problem is None and (writing.rows or 1) % (merged["item"] if writing.rows else 1):
            problem = f"Writing.rows={writing.rows} is no whole number of items of {merged['item']} rows"
        if problem is not None:
            if named:
                raise ValueError(f"modalities: expected output modalities that can be sampled, found {name}: {problem}")
            continue
        merged.pop("item")
        rows = merged["rows"] if writing.rows is None else writing.rows
        tokens = dict(token=known.generation[name], begin=known.begin.get(name), end=known.end.get(name))
        merged["kind"] = merged["kind"] or name
        rules[name] = SpanRule(name, **(merged | tokens | {"rows": rows}), writing=writing)
    return rules


def _facts(model: Any, chosen: Mapping[str, Writing]) -> dict[str, dict[str, Any]]:
    """What this rank's stage knows of each modality."""
    facts: dict[str, dict[str, Any]] = {}
    for name, writing in chosen.items():
        submodule, found = model.modality_submodules[name], facts.setdefault(name, {})
        feed = submodule.generation_input
        if model.pre_process:
            found["fed"] = feed is not None
            found["style"] = _style(feed)
        if not model.post_process:
            continue
        try:
            found |= _of_decoder(submodule, writing, feed)
        except (ValueError, TypeError) as error:
            found["problem"] = str(error)
    return facts


def _style(feed: object) -> Style:
    if isinstance(feed, NoisedTargetInput):
        return "flow"
    return "one_by_one" if feed is not None and getattr(feed, "shows_target", False) else "pass"


def _of_decoder(submodule: Any, writing: Writing, feed: object) -> dict[str, Any]:
    """Raises a ValueError or TypeError that says why it cannot be sampled."""
    name = submodule.decoder_name(writing.decoder)
    decoder = submodule.decoders[name]
    if type(decoder).sample is Decoder.sample:
        raise ValueError(f"{type(decoder).__name__} has no sampler")
    in_loop = isinstance(feed, NoisedTargetInput)
    if in_loop and not isinstance(decoder, RectifiedFlowDecoder):
        raise ValueError(f"NoisedTargetInput needs a decoder of rectified flow, found {type(decoder).__name__}")
    check_sample_options(decoder, writing.options, "options")
    for option in ("unconditional_rows", "generator", "noise"):
        if option in writing.options:
            raise ValueError(f"{option} is generation's own to give: the sample's seed and its second prompt make it")
    kind = {"VisionModalitySubmodules": "image", "AudioModalitySubmodules": "audio"}
    bases = [base.__name__ for base in type(submodule).__mro__]
    return {
        "decoder": name,
        "kind": next((kind[base] for base in bases if base in kind), ""),
        "rows": submodule.medium_of(name),
        "item": decoder.rows_per_item,
        "variable": submodule.spans_vary,
        "own": decoder.position_rule == "own",
        "width": getattr(decoder, "target_width", 0) if isinstance(decoder, RectifiedFlowDecoder) else 0,
    }
