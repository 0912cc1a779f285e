"""What a source holds, as the configuration of a MimoModel and the tensors that fill its parts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo import specs
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf import clip, llama, llava, mistral, qwen2, qwen3, qwen_vl, siglip
from megatron_mimo.hf.family import Family, settings_of
from megatron_mimo.hf.files import Checkpoint, Stored, open_checkpoint, read_config
from megatron_mimo.hf.language import language_spec
from megatron_mimo.hf.names import renamed, respelled
from megatron_mimo.hf.reading import differences, refuse
from megatron_mimo.hf.table import Table
from megatron_mimo.hf.vision import Select, tower_spec
from megatron_mimo.modality.kinds import AudioModalitySubmodules, VisionModalitySubmodules

logger = logging.getLogger(__name__)

LANGUAGE_MODELS = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}
LANGUAGE_MODELS |= qwen_vl.FAMILIES
TOWERS = {module.FAMILY.model_type: module.FAMILY for module in (clip, siglip)}
# Two-tower models whose vision tower is one of those.
_TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_SUBTYPES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_OTHER_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
#: A MimoModel, which this room does not import.
Chunk = Any


def add_family(family: Family) -> None:
    """Makes a family of language models known to everything in this process that reads or writes models.

    Args:
        family: whose `model_type` no other has.

    Raises:
        ValueError: its `model_type` is that of another family.
    """
    known = {**TOWERS, **LANGUAGE_MODELS}.get(family.model_type, family)
    if known is not family:
        raise ValueError(
            f"add_family: expected a model_type that is none of {sorted({**TOWERS, **LANGUAGE_MODELS})}, found "
            f"{family.model_type!r}. Give the family another name, or leave it out."
        )
    LANGUAGE_MODELS[family.model_type] = family


MODALITY, ENCODER, PROJECTOR = "images", "tower", "llava_projector"


@dataclass(frozen=True)
class Part:
    """One part of a model that a checkpoint of transformers fills.

    Args:
        path: in the model: `language_model`, or `<modality>/encoders/<name>`, or `<modality>/input_projections/<n>`.
        model_type: of its family; `PROJECTOR` for LLaVA's projector, `qwen_vl.TOWER_TYPE` for a tower of Qwen-VL's.
        config: of transformers, of that tower the whole model's; for the projector an `llava.Projection`.
        table: its tensors, without the prefix that a whole model's have.
        directory: where it came from.
        stored: its tensors there, by the table's names; empty for one that begins fresh.
        layer, select: of a tower, which states are taken.
    """

    path: str
    model_type: str
    config: Any
    table: Table
    directory: Path | None
    stored: Mapping[str, Stored] = field(default_factory=dict, repr=False)
    layer: int | None = None
    select: Select = "patch"


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what export says of it.

    Args:
        parts: those that a table covers.
        directory: with the processor's and tokenizer's files; None where there are none.
        tokens: tokens that were added to that tokenizer.
        fresh_rows: ids of embedding rows that begin as the mean of those before.
        config: of a whole model that came with its own; None for one put together from parts.
        saved: file with the weights of parts that no table covers.
    """

    parts: tuple[Part, ...]
    directory: Path | None
    tokens: tuple[str, ...] = ()
    fresh_rows: tuple[int, ...] = ()
    config: Any = field(default=None, repr=False)
    saved: Path | None = None

    def part(self, path: str) -> Part | None:
        """The part at `path`, if a table covers it."""
        return next((part for part in self.parts if part.path == path), None)


@dataclass(frozen=True)
class Building:
    """What a model is built for.

    Args:
        sizes: of the layout, as `TransformerConfig` names them.
        dtype: of the weights; None for the files'.
        backend: what layers compute with.
        changes: to the language model's `TransformerConfig`.
    """

    sizes: Mapping[str, int | None]
    dtype: torch.dtype | None = None
    backend: specs.Backend = "auto"
    changes: Mapping[str, object] = field(default_factory=dict)


def read_source(directory: Path) -> tuple[Part, ...]:
    """The parts of a directory in transformers' form: of a language model, a vision tower, LLaVA or Qwen-VL.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`, and naming everything that the tables do not cover.
    """
    kind = str(read_config(directory).get("model_type"))
    if kind == llava.MODEL_TYPE:
        return _read_llava(directory)
    if kind in qwen_vl.ARCHITECTURES:
        return _read_qwen_vl(directory)
    if kind in LANGUAGE_MODELS:
        return (read_language_model(directory),)
    if kind in TOWERS or kind in _TWO_TOWERS:
        return (read_tower(directory, f"{MODALITY}/encoders/{ENCODER}", None, "all"),)
    raise ValueError(unknown(directory, kind))


def read_language_model(directory: Path) -> Part:
    """The language model of a directory.

    Raises:
        FileNotFoundError, ValueError: as `read_source`.
    """
    kind = str(read_config(directory).get("model_type"))
    if kind == llava.MODEL_TYPE:
        return _read_llava(directory)[0]
    if kind not in LANGUAGE_MODELS:
        raise ValueError(unknown(directory, kind))
    checkpoint = open_checkpoint(directory)
    part = _language_part(_config(directory), checkpoint.tensors, directory)
    _, problems = settings_of(LANGUAGE_MODELS[kind], part.config)
    refuse(str(directory), [*problems, *differences(part.stored, part.table)])
    return part


def read_tower(directory: Path, path: str, layer: int | None, select: Select) -> Part:
    """The vision tower of a directory: of one that holds nothing else, of CLIP or SigLIP, or of LLaVA.

    Args:
        directory: that holds it.
        path: of the part in the model.
        layer: whose states are taken, as transformers counts `hidden_states`; None for the last, after the final norm.
        select: whether the class token is among them.

    Raises:
        FileNotFoundError, ValueError: as `read_source`.
    """
    config = read_config(directory)
    kind = str(config.get("model_type"))
    if kind == llava.MODEL_TYPE:
        return replace(_read_llava(directory)[1], path=path)
    if _TWO_TOWERS.get(kind, kind) not in TOWERS:
        raise ValueError(
            f"{unknown(directory, kind)} To take an encoder of transformers as it is, give its spec: "
            f"ModuleSpec(megatron_mimo.HFEncoder, params={{'name_or_path': {str(directory)!r}}})."
        )
    checkpoint, read = open_checkpoint(directory), _config(directory)
    own = {
        name: stored
        for name, stored in checkpoint.tensors.items()
        if kind not in _TWO_TOWERS or not name.startswith(_OTHER_TOWER)
    }
    tensors = renamed(own, lambda name: name.removeprefix("vision_model."))
    part = _tower_part(read.vision_config if kind in _TWO_TOWERS else read, tensors, directory, path, layer, select)
    _, problems = settings_of(TOWERS[part.model_type], part.config)
    refuse(str(directory), [*problems, *differences(part.stored, part.table)])
    return part


def _read_llava(directory: Path) -> tuple[Part, Part, Part]:
    config, checkpoint = _config(directory), open_checkpoint(directory)
    text, vision = copy.deepcopy(config.text_config), config.vision_config
    text.tie_word_embeddings = config.tie_word_embeddings or text.tie_word_embeddings
    problems = llava.problems(config)
    for sub, families in ((text, LANGUAGE_MODELS), (vision, TOWERS)):
        if sub.model_type not in families:
            problems.append(f"llava: {sub.model_type} is none of the families {sorted(families)}")
    refuse(str(directory), problems)  # without families there are no tables to compare with
    named = respelled(checkpoint.tensors, llava.SPELLINGS)

    def under(prefix: str) -> dict[str, Stored]:
        return {name.removeprefix(prefix): one for name, one in named.items() if name.startswith(prefix)}

    select: Select = "patch" if config.vision_feature_select_strategy == "default" else "all"
    if select == "patch" and vision.model_type == "siglip_vision_model":
        refuse(str(directory), ["llava: vision_feature_select_strategy 'default' drops a patch of SigLIP: not mapped"])
    own = llava.Projection(
        vision.hidden_size, text.hidden_size, config.projector_hidden_act, config.multimodal_projector_bias
    )
    parts = (
        _language_part(text, under(llava.LANGUAGE), directory),
        _tower_part(
            vision, under(llava.TOWER), directory, f"{MODALITY}/encoders/{ENCODER}", config.vision_feature_layer, select
        ),
        projector_part(f"{MODALITY}/input_projections/0", own, directory, under(llava.PROJECTOR)),
    )
    prefixes = (llava.LANGUAGE, llava.TOWER, llava.PROJECTOR)
    told = [f"surplus: {name} {list(one.shape)}" for name, one in named.items() if not name.startswith(prefixes)]
    for part, prefix in zip(parts, prefixes, strict=True):
        family = LANGUAGE_MODELS.get(part.model_type) or TOWERS.get(part.model_type)
        told += settings_of(family, part.config)[1] if family else []
        told += [f"{prefix} {line}" for line in differences(part.stored, part.table)]
    refuse(str(directory), told)
    return parts


def _read_qwen_vl(directory: Path) -> tuple[Part, Part]:
    config, named = _config(directory), respelled(open_checkpoint(directory).tensors, qwen_vl.SPELLINGS)
    tower = {name.removeprefix(qwen_vl.TOWER): one for name, one in named.items() if name.startswith(qwen_vl.TOWER)}
    text = {name: one for name, one in named.items() if not name.startswith(qwen_vl.TOWER)}
    language = _language_part(qwen_vl.text_config(config), text, directory)
    path, own = f"{MODALITY}/encoders/{ENCODER}", qwen_vl.tower_table(config)
    told = [*qwen_vl.problems(config), *settings_of(LANGUAGE_MODELS[language.model_type], language.config)[1]]
    told += [*differences(text, language.table), *(f"{qwen_vl.TOWER} {line}" for line in differences(tower, own))]
    refuse(str(directory), told)
    return language, Part(path, qwen_vl.TOWER_TYPE, config, own, directory, tower)


def _language_part(config: Any, tensors: Mapping[str, Stored], directory: Path) -> Part:
    table = LANGUAGE_MODELS[config.model_type].table(config)
    return Part("language_model", config.model_type, config, table, directory, tensors)


def _tower_part(
    config: Any, tensors: Mapping[str, Stored], directory: Path, path: str, layer: int | None, select: Select
) -> Part:
    table = TOWERS[config.model_type].table(config, layer)
    return Part(path, config.model_type, config, table, directory, tensors, layer, select)


def projector_part(
    path: str, own: llava.Projection, directory: Path | None = None, tensors: Mapping[str, Stored] | None = None
) -> Part:
    """LLaVA's projector; without tensors it begins fresh."""
    return Part(path, PROJECTOR, own, own.table(), directory, tensors or {})


def _config(directory: Path) -> Any:
    """The configuration that transformers reads, with old spellings of its fields made new.

    Raises:
        ValueError: transformers does not read it, or takes it for a model of another family.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of its own kinds and of huggingface_hub's, by field
        raise ValueError(f"{directory / 'config.json'}: transformers does not read it: {error}") from error
    told = read_config(directory).get("model_type")
    if config.model_type != told:
        raise ValueError(
            f"{directory / 'config.json'}: transformers takes this {told!r} for {config.model_type!r}. "
            f"{unknown(directory, config.model_type)}"
        )
    return config


def unknown(directory: Path, kind: str) -> str:
    """Why a model is refused, with the family that comes nearest."""
    languages = [name for name in LANGUAGE_MODELS if name not in qwen_vl.FAMILIES]
    known = [*languages, *TOWERS, *_TWO_TOWERS, llava.MODEL_TYPE, *qwen_vl.ARCHITECTURES]
    alike = [name for name in known if name.rstrip("0123456789") == kind.split("_")[0].rstrip("0123456789")]
    nearest = alike[0] if alike else "llama"
    gemma = (
        " Megatron-Core has neither soft-capped logits nor norms after attention and MLP." if "gemma" in kind else ""
    )
    return (
        f"{directory}: expected one of the families {known}, found model_type {kind!r}.{gemma} The nearest is "
        f"{nearest!r}; docs/weights.md says how a family is added."
    )


# Parts -> the configuration of a model ------------------------------------------------------------------------------


def language_model_spec(part: Part, building: Building, vocabulary: int | None = None) -> ModuleSpec:
    """The spec of a language model part, with `vocabulary` rows where tokens were added."""
    settings, _ = settings_of(LANGUAGE_MODELS[part.model_type], part.config)
    settings |= {} if vocabulary is None else {"vocab_size": vocabulary}
    return language_spec(
        settings,
        dtype=weights_dtype(part, building),
        sizes=building.sizes,
        backend=building.backend,
        changes=building.changes,
    )


def encoder_spec(part: Part, building: Building, dtype: torch.dtype) -> ModuleSpec:
    """The spec of a vision tower part."""
    settings, _ = settings_of(TOWERS[part.model_type], part.config)
    subtype = _SUBTYPES[part.model_type]
    return tower_spec(
        settings,
        "clip" if subtype == "clip" else "siglip",
        layers=clip.layers_built(part.config, part.layer),
        final_norm=part.layer is None,
        select=part.select,
        dtype=dtype,
        tensor_parallel=building.sizes.get("tensor_model_parallel_size") or 1,
        backend=building.backend,
    )


def weights_dtype(part: Part, building: Building) -> torch.dtype:
    """That was asked for, or the files'."""
    if building.dtype is not None or part.directory is None:
        return building.dtype or torch.float32
    return Checkpoint(part.directory, {}, part.stored).dtype


def model_config(parts: tuple[Part, ...], building: Building, directory: Path) -> MimoModelConfig:
    """The configuration of a whole model: of LLaVA, of Qwen-VL, or of a language model alone."""
    if parts[0].path != "language_model":
        raise ValueError(
            f"{directory}: expected a language model or LLaVA, found {parts[0].model_type!r}. Give it as an encoder "
            "beside one: from_pretrained(language_model=..., encoders={'images': {'tower': ...}}, special_tokens=...)."
        )
    language = language_model_spec(parts[0], building)
    if len(parts) == 1:
        return MimoModelConfig(language, origin=Origin(parts, directory))
    own = _config(directory)
    if len(parts) == 2:
        return MimoModelConfig(
            language,
            modality_submodules={MODALITY: modality_spec({ENCODER: qwen_vl.tower_spec(own)}, [])},
            special_token_ids={MODALITY: own.image_token_id},
            origin=Origin(parts, directory, config=own),
        )
    _, tower, projector = parts
    dtype = weights_dtype(parts[0], building)
    images = modality_spec({ENCODER: encoder_spec(tower, building, dtype)}, [projector.config.spec()])
    return MimoModelConfig(
        language,
        modality_submodules={MODALITY: images},
        special_token_ids={MODALITY: own.image_token_index},
        origin=Origin(parts, directory, config=own),
    )


def modality_spec(
    encoders: Mapping[str, ModuleSpec], projections: list[ModuleSpec], *, audio: bool = False, **others: object
) -> ModuleSpec:
    """The spec of a modality that reads images, or sound."""
    submodules = {"encoders": dict(encoders), "input_projections": projections, **others}
    return ModuleSpec(module=AudioModalitySubmodules if audio else VisionModalitySubmodules, submodules=submodules)
