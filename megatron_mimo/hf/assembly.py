"""Models put together of parts: a language model, encoders, fresh projections and decoders, and tokens for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf import llava, own
from megatron_mimo.hf.blueprint import (
    Building,
    Origin,
    Part,
    encoder_spec,
    language_model_spec,
    modality_spec,
    projector_part,
    read_language_model,
    read_tower,
    weights_dtype,
)
from megatron_mimo.hf.encoder import HFEncoder, encoder_of
from megatron_mimo.hf.files import read_json
from megatron_mimo.hf.language import precision
from megatron_mimo.hf.registry import restore
from megatron_mimo.hf.saving import FORMAT, LANGUAGE_DIRECTORY, TOKENS
from megatron_mimo.hf.source import OWN
from megatron_mimo.hf.towers import Found

logger = logging.getLogger(__name__)

# What LLaVA takes of a tower.
FEATURE_LAYER = -2


@dataclass(frozen=True)
class Assembly:
    """What a model is put together of; its fields are those of `pretrained_config`, with directories for names."""

    language_model: Path
    encoders: Mapping[str, Mapping[str, Path | ModuleSpec]] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    decoders: Mapping[str, Mapping[str, ModuleSpec]] = field(default_factory=dict)
    generation_tokens: Mapping[str, str] = field(default_factory=dict)
    submodules: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        """In the order in which they are named."""
        return list(dict.fromkeys([*self.encoders, *self.decoders, *self.submodules]))


def assembled(parts: Assembly, building: Building) -> MimoModelConfig:
    """The configuration of a model that is put together of `parts`.

    Raises:
        FileNotFoundError, ValueError: a part that no table covers, or tokens without a tokenizer.
    """
    language = read_language_model(parts.language_model)
    ids, added, fresh = _token_ids(parts, language.config.vocab_size)
    vocabulary = max([language.config.vocab_size, *(number + 1 for number in ids.values())])
    dtype = weights_dtype(language, building)
    modalities, pretrained = {}, [language]
    for modality in parts.modalities:
        spec, of_modality = _modality(modality, parts, language, building, dtype)
        modalities[modality] = spec
        pretrained += of_modality
    return MimoModelConfig(
        language_model_spec(language, building, vocabulary),
        modality_submodules=modalities,
        special_token_ids={modality: ids[token] for modality, token in parts.special_tokens.items()},
        generation_token_ids={modality: ids[token] for modality, token in parts.generation_tokens.items()},
        origin=Origin(tuple(pretrained), parts.language_model, added, fresh),
    )


def _token_ids(parts: Assembly, vocabulary: int) -> tuple[dict[str, int], tuple[str, ...], tuple[int, ...]]:
    """Token -> id, the tokens that the tokenizer lacked, and the rows of the embedding that begin anew.

    Those are the rows of tokens that the tokenizer lacked, and those that the table lacked, whoever's they are.

    Ids come from the tokenizer, which counts on from its last one: rows of the table that it did not use are taken
    first, then the table grows.
    """
    tokens = list(dict.fromkeys([*parts.special_tokens.values(), *parts.generation_tokens.values()]))
    if not tokens:
        return {}, (), ()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(parts.language_model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{parts.language_model}: expected a tokenizer to give {tokens} their ids, found none that loads ({error})."
        ) from None
    known = tokenizer.get_vocab()
    added = tuple(token for token in tokens if token not in known)
    tokenizer.add_tokens(list(added), special_tokens=True)
    known = tokenizer.get_vocab()
    ids = {token: int(known[token]) for token in tokens}
    rows = max([vocabulary, *(number + 1 for number in ids.values())])
    fresh = tuple(sorted({*(ids[token] for token in added), *range(vocabulary, rows)}))
    if fresh:
        logger.info(
            "from_pretrained: the tokenizer lacked the tokens %s; rows %s of the embedding begin as the mean of those "
            "before; the table has %d.",
            list(added),
            list(fresh),
            rows,
        )
    return ids, added, fresh


def _modality(
    modality: str, parts: Assembly, language: Part, building: Building, dtype: Any
) -> tuple[ModuleSpec, list[Part]]:
    """The spec of a modality, and those of its parts that tables cover."""
    encoders, towers, found = {}, list[Part](), list[Found]()
    for name, encoder in parts.encoders.get(modality, {}).items():
        if isinstance(encoder, ModuleSpec):
            encoders[name] = encoder
            found += [encoder_of(encoder)] if encoder.module is HFEncoder else []
            continue
        tower = _llava_tower(encoder, f"{modality}/encoders/{name}")
        encoders[name] = encoder_spec(tower, building, dtype)
        towers.append(tower)
    further: dict[str, Any] = dict(parts.submodules.get(modality, {}))
    given = further.pop("input_projections", None)
    widths = [tower.config.hidden_size for tower in towers] + [one.width for one in found]
    if given is None and len(widths) == 1 == len(encoders):
        projection = llava.Projection(widths[0], language.config.hidden_size)
        towers.append(projector_part(f"{modality}/input_projections/0", projection))
        given = [projection.spec()]
    if modality in parts.decoders:
        further["decoders"] = dict(parts.decoders[modality])
    audio = any(one.hears for one in found)
    return modality_spec(encoders, list(given or []), audio=audio, **further), towers


def _llava_tower(directory: Path, path: str) -> Part:
    """The vision tower of a directory, up to the states that LLaVA takes."""
    tower = read_tower(directory, path, FEATURE_LAYER, "patch")
    if tower.model_type == "siglip_vision_model":  # which has no class token to leave out
        return replace(tower, select="all")
    return tower


# What save_pretrained wrote in parts --------------------------------------------------------------------------------


def saved_parts(directory: Path) -> Origin:
    """The parts of a directory that `save_pretrained` wrote in parts.

    Raises:
        FileNotFoundError, ValueError: it is not whole.
    """
    described = _described(directory)
    parts = []
    for entry in described["parts"]:
        where = directory / entry["path"].replace("/", ".")
        if entry["path"] == LANGUAGE_DIRECTORY:
            parts.append(read_language_model(where))
        else:
            parts.append(read_tower(where, entry["path"], entry["layer"], entry["select"]))
    saved = directory / own.FILE
    return Origin(
        tuple(parts),
        directory / LANGUAGE_DIRECTORY,
        tuple(described["tokens"]),
        saved=saved if saved.is_file() else None,
    )


def restored(directory: Path, building: Building) -> MimoModelConfig:
    """The configuration of a model that `save_pretrained` wrote in parts.

    Raises:
        FileNotFoundError, ValueError: it is not whole, or has parts of classes that no file can name.
    """
    described, origin = _described(directory), saved_parts(directory)
    if "modalities" not in described:
        raise ValueError(
            f"{directory}: expected modalities in {OWN}, found none: the model has parts of classes that no file can "
            "name. Give its configuration: from_pretrained(directory, config=...)."
        )
    language = origin.parts[0]
    dtype = weights_dtype(language, building)
    of_run = precision(dtype) | {"tensor_model_parallel_size": building.sizes["tensor_model_parallel_size"]}
    modalities = {}
    for modality, entry in described["modalities"].items():
        spec = restore(entry["spec"], of_run)
        encoders = {}
        for name in entry["encoders"]:
            part = origin.part(f"{modality}/encoders/{name}")
            encoders[name] = spec.submodules["encoders"][name] if part is None else encoder_spec(part, building, dtype)
        modalities[modality] = replace(spec, submodules={**spec.submodules, "encoders": encoders})
    return MimoModelConfig(
        language_model_spec(language, building),
        modality_submodules=modalities,
        origin=origin,
        **{name: described[name] for name in TOKENS},
        whole_spans=tuple(described.get("whole_spans", ())),
    )


def _described(directory: Path) -> dict[str, Any]:
    described = read_json(directory / OWN)
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{directory / OWN}: expected format {FORMAT}, found {described.get('format')!r}. Take the version of the "
            "library that wrote it."
        )
    return described
