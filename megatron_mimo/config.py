"""What a model is made of, and every mistake in that which shows without a rank."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # megatron.core takes seconds to import and is not needed to check a configuration
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

SUBMODULE_KEYS = (
    "encoders",
    "decoders",
    "input_projections",
    "output_projections",
    "generation_input",
)


@dataclass(frozen=True)
class MimoModelConfig:
    """A language model, its modalities, and the token ids that connect them.

    Args:
        language_model: spec of `GPTModel`, `HybridModel` or a model with their interface.
        modality_submodules: modality name -> spec of its `ModalitySubmodules`. The spec's
            `submodules` may hold `encoders`, `decoders`, `input_projections`,
            `output_projections` and `generation_input`.
        special_token_ids: modality name -> the id at whose positions its encoder rows are
            placed. Any integer will do, negative and out-of-vocabulary ids included.
        generation_token_ids: modality name -> the id whose hidden states feed its decoders.
            May equal the modality's special token id. Unless a `generation_input` feeds
            these positions, the id is looked up in the vocabulary and must lie inside it.
        begin_token_ids: output modality -> the text token that stands before a written span, so that the model
            learns to begin one. Without it the span's first generation token is the label that opens it.
        end_token_ids: output modality -> the text token behind a written span; what ends one of variable length.
        modality_loss_weights: modality name, or `text`, -> weight of its loss terms in the total,
            default 1.
        loss_where_counted: whether output layer and language loss run on the positions whose label counts alone, where
            the host knows them; off, on every position.
        origin: what the pretrained parts came from, of `from_pretrained`; `save_pretrained` reads it.
        whole_spans: modalities of whose media all positions see the whole medium, and not what is before them alone
            (PaliGemma, BAGEL, Transfusion). `data.Handling.of` lays them out so. Refused where attention cannot do it.

    Raises:
        TypeError: an argument, a spec or an id has the wrong type.
        ValueError: a name without a modality, one id used twice, encoders or decoders without a
            token, a negative or infinite weight, or a generation, begin or end token outside the vocabulary.

    Example:
        >>> from megatron.core.transformer.spec_utils import ModuleSpec
        >>> config = MimoModelConfig(language_model=ModuleSpec(module=object),
        ...     modality_submodules={"images": ModuleSpec(module=object)},
        ...     special_token_ids={"images": -200})
        >>> config.reading_tables
        {'images': -200}
    """

    language_model: ModuleSpec
    modality_submodules: Mapping[str, ModuleSpec] = field(default_factory=dict)
    special_token_ids: Mapping[str, int] = field(default_factory=dict)
    generation_token_ids: Mapping[str, int] = field(default_factory=dict)
    modality_loss_weights: Mapping[str, float] = field(default_factory=dict)
    origin: object | None = None
    begin_token_ids: Mapping[str, int] = field(default_factory=dict)
    end_token_ids: Mapping[str, int] = field(default_factory=dict)
    loss_where_counted: bool = True
    whole_spans: Collection[str] = ()

    def __post_init__(self) -> None:
        _check_spec("language_model", self.language_model)
        for name in (
            "modality_submodules",
            "special_token_ids",
            "generation_token_ids",
            "modality_loss_weights",
            "begin_token_ids",
            "end_token_ids",
        ):
            _check_mapping(name, getattr(self, name))
        for modality, spec in self.modality_submodules.items():
            _check_modality_spec(modality, spec)
        for name in ("special_token_ids", "generation_token_ids"):
            self._check_names(name, self.modality_submodules)
        for name in ("begin_token_ids", "end_token_ids"):
            self._check_names(name, self.generation_token_ids)
        if isinstance(self.whole_spans, str):
            raise TypeError(f"whole_spans must be a collection of names, got {self.whole_spans!r}")
        self._check_names("whole_spans", self.modality_submodules)
        self._check_names("modality_loss_weights", ("text", *self.modality_submodules))
        self._check_token_ids()
        self._check_span_tokens()
        self._check_weights()
        self._check_connections()
        self._check_vocabulary()

    @property
    def language_config(self) -> TransformerConfig:
        """The language model's configuration.

        Raises:
            ValueError: the spec's params have none.
        """
        if "config" not in (self.language_model.params or {}):
            raise ValueError(
                f"language_model's params have no config, found {sorted(self.language_model.params or {})}. Give it "
                "the TransformerConfig of the language model."
            )
        return self.language_model.params["config"]

    @property
    def reading_tables(self) -> dict[str, int]:
        """Tables of rows that fill positions, with the token id each one fills.

        One per special token, named after its modality, and one per generation token that a
        decoder's input rule feeds, named `<modality>/generation`. A modality whose generation id
        equals its special id has one table, filled by whichever side has rows for the batch.
        """
        tables = dict(self.special_token_ids)
        for modality, token_id in self.generation_token_ids.items():
            feeds = self.submodule_specs(modality).get("generation_input") is not None
            if feeds and tables.get(modality) != token_id:
                tables[generation_table(modality)] = token_id
        return tables

    def submodule_specs(self, modality: str) -> Mapping[str, object]:
        """`submodules` of a modality's spec, empty if it has none."""
        return self.modality_submodules[modality].submodules or {}

    def with_submodules(self, modality_submodules: Mapping[str, ModuleSpec]) -> MimoModelConfig:
        """A copy in which these modalities' specs replace or join the present ones."""
        _check_mapping("modality_submodules", modality_submodules)
        return replace(self, modality_submodules={**self.modality_submodules, **modality_submodules})

    def _check_names(self, name: str, known: Collection[str]) -> None:
        for modality in getattr(self, name):
            if modality not in known:
                raise ValueError(
                    f"{name} names modality {modality!r}, but modality_submodules has "
                    f"{sorted(self.modality_submodules)}. Add its spec or remove the entry."
                )

    def _check_token_ids(self) -> None:
        users: dict[int, str] = {}
        for name in ("special_token_ids", "generation_token_ids"):
            for modality, token_id in getattr(self, name).items():
                if isinstance(token_id, bool) or not isinstance(token_id, int):
                    raise TypeError(f"{name}[{modality!r}] must be an int, got {type(token_id).__name__}")
                if not -(2**63) <= token_id < 2**63:
                    raise ValueError(f"{name}[{modality!r}] = {token_id} does not fit the int64 of input_ids.")
                other = users.setdefault(token_id, modality)
                if other != modality:
                    raise ValueError(
                        f"token id {token_id} is used by two modalities, {other!r} and "
                        f"{modality!r} ({name}). Give each modality an id of its own."
                    )

    def _check_span_tokens(self) -> None:
        """Begin and end tokens are text: inside the vocabulary, no modality's own token, one begin token each."""
        vocabulary = self.language_model.params.get("vocab_size")
        own = {*self.special_token_ids.values(), *self.generation_token_ids.values()}
        begins: dict[int, str] = {}
        for name in ("begin_token_ids", "end_token_ids"):
            for modality, token_id in getattr(self, name).items():
                what = f"{name}[{modality!r}]"
                if isinstance(token_id, bool) or not isinstance(token_id, int):
                    raise TypeError(f"{what} must be an int, got {type(token_id).__name__}")
                if token_id < 0 or (vocabulary is not None and token_id >= vocabulary):
                    raise ValueError(
                        f"{what} = {token_id} is outside the vocabulary [0, {vocabulary}). Begin and end tokens are "
                        "text, which the language model reads and predicts: choose an id inside it."
                    )
                if token_id in own or (name == "end_token_ids" and token_id in begins):
                    raise ValueError(
                        f"{what} = {token_id} is a special, generation or begin token too. Give it an id of its own."
                    )
                other = begins.setdefault(token_id, modality) if name == "begin_token_ids" else modality
                if other != modality:
                    raise ValueError(
                        f"token id {token_id} begins two modalities, {other!r} and {modality!r}: nothing could tell "
                        "them apart. Give each a begin token of its own."
                    )

    def _check_weights(self) -> None:
        for modality, weight in self.modality_loss_weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"modality_loss_weights[{modality!r}] must be a number, got {type(weight).__name__}")
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"modality_loss_weights[{modality!r}] must be finite and >= 0, got {weight}")

    def _check_connections(self) -> None:
        """Modules that no token reaches would wait for a gradient that never comes."""
        for key, name in (
            ("encoders", "special_token_ids"),
            ("decoders", "generation_token_ids"),
            ("generation_input", "generation_token_ids"),
        ):
            for modality in self.modality_submodules:
                if self.submodule_specs(modality).get(key) and modality not in getattr(self, name):
                    raise ValueError(
                        f"modality {modality!r} has {key}, but {name} has only "
                        f"{sorted(getattr(self, name))}: no token connects them to the language "
                        f"model. Add its id or remove the {key}."
                    )

    def _check_vocabulary(self) -> None:
        vocabulary = self.language_model.params.get("vocab_size")
        tables = self.reading_tables
        for modality, token_id in self.generation_token_ids.items():
            fed = generation_table(modality) in tables or tables.get(modality) == token_id
            if vocabulary is None or fed or 0 <= token_id < vocabulary:
                continue
            raise ValueError(
                f"generation_token_ids[{modality!r}] = {token_id} is outside the vocabulary "
                f"[0, {vocabulary}), and without a generation_input its positions are looked up "
                "there. Choose an id inside it or give the modality a generation_input."
            )


def generation_table(modality: str) -> str:
    """Name of the table whose rows fill a modality's generation tokens."""
    return f"{modality}/generation"


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of names, got {type(value).__name__}")


def _check_spec(name: str, spec: object) -> None:
    # By name, because importing Megatron's class would make this module need Megatron.
    if not any(base.__name__ == "ModuleSpec" for base in type(spec).__mro__):
        raise TypeError(f"{name} must be a ModuleSpec, got {type(spec).__name__}")


def check_part_name(what: str, name: object) -> None:
    """Refuses what cannot name a modality, an encoder or a decoder.

    Raises:
        TypeError: no string.
        ValueError: a separator of names, or what torch's `ModuleDict` has of its own.
    """
    from torch import nn  # not needed to import this module

    if not isinstance(name, str):
        raise TypeError(f"{what} names must be strings, got {name!r}")
    if not name or "/" in name or "." in name:
        raise ValueError(
            f"{name!r} cannot name {what}: '/' and '.' separate names in loss terms and parameter names. Choose "
            "another name."
        )
    if name == "training" or name in dir(nn.ModuleDict):
        raise ValueError(f"{name!r} cannot name {what}: torch's ModuleDict has it of its own. Choose another name.")


def _check_modality_spec(modality: str, spec: ModuleSpec) -> None:
    if modality == "text":
        raise ValueError("'text' cannot name a modality: it is the language model's own. Choose another name.")
    check_part_name("a modality", modality)
    _check_spec(f"modality_submodules[{modality!r}]", spec)
    if spec.submodules is not None:
        _check_mapping(f"submodules of modality_submodules[{modality!r}]", spec.submodules)
    for key in spec.submodules or {}:
        if key not in SUBMODULE_KEYS:
            raise ValueError(
                f"modality_submodules[{modality!r}] has submodules entry {key!r}; "
                f"expected some of {list(SUBMODULE_KEYS)}"
            )
        parts = spec.submodules[key]
        for name in parts if key in ("encoders", "decoders") and isinstance(parts, Mapping) else ():
            check_part_name(f"one of the {key} of modality_submodules[{modality!r}]", name)
