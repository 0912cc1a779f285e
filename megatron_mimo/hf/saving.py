"""A model's directory: in transformers' form where one of its classes can hold the model, in parts otherwise."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo.config import SUBMODULE_KEYS, MimoModelConfig
from megatron_mimo.hf import llava, own, qwen_vl
from megatron_mimo.hf.blueprint import LANGUAGE_MODELS, PROJECTOR, TOWERS, Chunk, Origin, Part
from megatron_mimo.hf.codec import HFCodec
from megatron_mimo.hf.comparing import unlike, vocabulary_of
from megatron_mimo.hf.encoder import HFEncoder
from megatron_mimo.hf.filling import module_at, parameters_of, place_of
from megatron_mimo.hf.image_codec import HFImageCodec, own_config
from megatron_mimo.hf.processors import llava_processor, tokenizer_of
from megatron_mimo.hf.reading import Place, refuse
from megatron_mimo.hf.registry import Undescribed, describe
from megatron_mimo.hf.source import BESIDE, OWN
from megatron_mimo.hf.table import Table
from megatron_mimo.hf.towers import as_json, source
from megatron_mimo.hf.writing import File, Outgoing, begin, finish, outgoing, write

logger = logging.getLogger(__name__)

FORMAT = 1
LANGUAGE_DIRECTORY = "language_model"
TOKENS = ("special_token_ids", "generation_token_ids", "begin_token_ids", "end_token_ids", "modality_loss_weights")


def save(
    models: Sequence[Chunk], directory: Path, dtype: torch.dtype | None, max_shard_bytes: int, source: Path | None
) -> None:
    """Writes this rank's model chunks and all other ranks' into `directory`. Collective over all ranks.

    Args:
        models: this rank's chunks.
        directory: that is not there, or is empty.
        dtype: of the weights; None for the model's.
        max_shard_bytes: of a file.
        source: where the parts' own directory is now, if it was moved.

    Raises:
        FileExistsError: `directory` holds something.
        FileNotFoundError: tensors that are carried along are to be read, and their file is gone.
        ValueError: the model has no pretrained parts, or computes something else than the configuration that would be
            written beside its weights.
    """
    config = models[0].mimo_config
    origin = config.origin
    if not isinstance(origin, Origin):
        raise ValueError(
            "save_pretrained: expected a model of from_pretrained or pretrained_config, found one whose configuration "
            "has no origin. Make its configuration with megatron_mimo.pretrained_config(...)."
        )
    refuse("save_pretrained", [line for part in origin.parts for line in unlike(config, part)])
    if source is not None:
        origin = _moved(origin, source)
    unfinished = directory.with_name(directory.name + ".partial")
    _on_first_rank(lambda: begin(directory, unfinished))
    _on_first_rank(lambda: _check_carried(origin))
    place = place_of(models[0].pg_collection)
    if _layout(config, origin) is not None or not config.modality_submodules:
        _save_whole(models, origin, unfinished, place, dtype, max_shard_bytes)
    else:
        _save_parts(models, config, origin, unfinished, place, dtype, max_shard_bytes)
    _on_first_rank(lambda: finish(unfinished, directory))


def _on_first_rank(action: Callable[[], object]) -> None:
    """Runs `action` on the first rank; what it raises is raised on all of them."""
    told: list[BaseException | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            told = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise told[0]


def _check_carried(origin: Origin) -> None:
    for part in origin.parts:
        for name, stored in carried(part).items():
            if not stored.file.is_file():
                raise FileNotFoundError(
                    f"{stored.file}: expected the file with {part.path}'s {name}, which the model does not compute "
                    "with and export writes back; found none. Put it back, or give save_pretrained(source=...)."
                )


def _moved(origin: Origin, source: Path) -> Origin:
    parts = []
    for part in origin.parts:
        stored = {name: replace(one, file=source / one.file.name) for name, one in part.stored.items()}
        parts.append(replace(part, stored=stored, directory=source))
    return replace(origin, parts=tuple(parts), directory=source)


def carried(part: Part) -> dict[str, Any]:
    """Tensors that a part does not compute with, where they are."""
    return {name: part.stored[name] for name in part.table.unused if name in part.stored}


def as_llava(config: MimoModelConfig, origin: Origin) -> tuple[Part, Part, Part] | None:
    """Language model, tower and projector of a model that transformers' LLaVA holds; None for another."""
    language = origin.part("language_model")
    if language is None or len(config.modality_submodules) != 1 or config.generation_token_ids:
        return None
    (modality,) = config.modality_submodules
    parts = config.submodule_specs(modality)
    encoders: Any = parts.get("encoders") or {}
    projections: Any = parts.get("input_projections") or []
    if not isinstance(encoders, Mapping) or len(encoders) != 1 or len(projections) != 1:
        return None
    if any(parts.get(key) for key in SUBMODULE_KEYS if key not in ("encoders", "input_projections")):
        return None
    tower = origin.part(f"{modality}/encoders/{next(iter(encoders))}")
    projector = origin.part(f"{modality}/input_projections/0")
    if tower is None or projector is None or tower.layer is None:
        return None
    if tower.model_type == "clip_vision_model" or tower.select == "all":
        return language, tower, projector
    return None


def as_qwen_vl(config: MimoModelConfig, origin: Origin) -> tuple[Part, Part] | None:
    """Language model and tower of a Qwen2-VL or Qwen2.5-VL as it came; None for another model.

    Raises:
        ValueError: parts were added to it, which no class of transformers holds.
    """
    if not any(part.model_type == qwen_vl.TOWER_TYPE for part in origin.parts):
        return None
    language, tower = origin.parts
    modalities = {path: config.submodule_specs(path) for path in config.modality_submodules}
    added = [f"{path}/{key}" for path, of in modalities.items() for key in of if of[key] and key != "encoders"]
    added += [path for path in modalities if path != tower.path.split("/")[0]]
    if added:
        raise ValueError(
            f"save_pretrained: expected a {tower.config.model_type} with its own parts alone, found {added} too: "
            "transformers has no class for it. Save a checkpoint of the run (Trainer.save) instead."
        )
    return language, tower


def _layout(config: MimoModelConfig, origin: Origin) -> tuple[tuple[Part, ...], tuple[str, ...]] | None:
    """The parts of a model that a class of transformers holds, and their prefixes; None where it has none."""
    if (found := as_qwen_vl(config, origin)) is not None:
        return found, ("", qwen_vl.TOWER)
    if (parts := as_llava(config, origin)) is not None:
        return parts, (llava.LANGUAGE, llava.TOWER, llava.PROJECTOR)
    return None


def _tensors(
    models: Sequence[Chunk], part: Part, place: Place, prefix: str, dtype: torch.dtype | None
) -> list[Outgoing]:
    """The tensors of one part, its vocabulary as large as the model's."""
    parameters: dict[str, nn.Parameter] = {}
    for model in models:
        module = module_at(model, part.path)
        parameters |= {} if module is None else parameters_of(module, place)
    return outgoing(parameters, part.table, place, prefix=prefix, carried=carried(part), dtype=dtype)


def _grown(part: Part, vocabulary: int) -> Part:
    """A language model part with `vocabulary` tokens."""
    if part.config.vocab_size == vocabulary:
        return part
    config = copy.deepcopy(part.config)
    config.vocab_size = vocabulary
    return replace(part, config=config, table=LANGUAGE_MODELS[part.model_type].table(config))


def _save_whole(
    models: Sequence[Chunk],
    origin: Origin,
    directory: Path,
    place: Place,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    config = models[0].mimo_config
    found = _layout(config, origin)
    language = _language_part(config, origin)
    if found is None:
        tensors = _tensors(models, language, place, "", dtype)
        written = _configured(language.config, LANGUAGE_MODELS[language.model_type].architecture, tensors)
    else:
        parts, prefixes = (language, *found[0][1:]), found[1]
        tensors = [
            one
            for part, prefix in zip(parts, prefixes, strict=True)
            for one in _tensors(models, part, place, prefix, dtype)
        ]
        if len(parts) == 2:
            written = _configured(origin.config, qwen_vl.ARCHITECTURES[origin.config.model_type], tensors)
        else:
            written = _configured(_llava_config(config, origin, parts), llava.ARCHITECTURE, tensors)
    write(directory, tensors, max_shard_bytes)
    _on_first_rank(lambda: written.save_pretrained(directory))
    _on_first_rank(lambda: save_beside(origin, directory))
    if (processor := processor_of(config, origin)) is not None:
        _on_first_rank(lambda: processor.save_pretrained(directory))


def processor_of(config: MimoModelConfig, origin: Origin) -> Any | None:
    """LLaVA's processor for a model that was put together as one; None for another, which has its own or none."""
    parts = as_llava(config, origin)
    if parts is None or origin.config is not None or origin.directory is None:
        return None
    return llava_processor(origin, parts[1], next(iter(config.special_token_ids.values())))


def _language_part(config: MimoModelConfig, origin: Origin) -> Part:
    part = origin.part("language_model")
    if part is None:
        raise ValueError("save_pretrained: expected a pretrained language model, found one that no table covers.")
    return _grown(part, vocabulary_of(config))


def _configured(config: Any, architecture: str, tensors: Sequence[Outgoing]) -> Any:
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    config.dtype = max(tensors, key=lambda one: one.size).dtype
    return config


def _llava_config(config: MimoModelConfig, origin: Origin, parts: tuple[Part, ...]) -> Any:
    from transformers import LlavaConfig

    language, tower, projector = parts
    if origin.config is not None:
        whole = copy.deepcopy(origin.config)
        whole.text_config.vocab_size = language.config.vocab_size
        return whole
    own, layer = projector.config, tower.layer
    assert layer is not None  # as_llava has seen to it
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    return LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=next(iter(config.special_token_ids.values())),
        image_seq_length=patches + (tower.model_type == "clip_vision_model" and tower.select == "all"),
        projector_hidden_act=own.activation,
        multimodal_projector_bias=own.bias,
        vision_feature_select_strategy="default" if tower.select == "patch" else "full",
        vision_feature_layer=layer,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )


def save_beside(origin: Origin, directory: Path) -> None:
    """Files of processor and tokenizer, with the tokens that were added."""
    if origin.directory is None:
        return
    for name in BESIDE:
        if (origin.directory / name).is_file():
            shutil.copyfile(origin.directory / name, directory / name)
    if origin.tokens:
        tokenizer_of(origin).save_pretrained(directory)


# In parts -----------------------------------------------------------------------------------------------------------


def _save_parts(
    models: Sequence[Chunk],
    config: MimoModelConfig,
    origin: Origin,
    directory: Path,
    place: Place,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    described: dict[str, Any] = {"format": FORMAT, "parts": [], "tokens": list(origin.tokens)}
    described |= {name: dict(getattr(config, name)) for name in TOKENS}
    described["whole_spans"] = sorted(config.whole_spans)
    _language_part(config, origin)
    for part in origin.parts:
        if part.model_type == PROJECTOR:
            continue  # saved among our own
        grown = _grown(part, vocabulary_of(config)) if part.path == "language_model" else part
        where = grown.path.replace("/", ".")
        _on_first_rank((directory / where).mkdir)
        tensors = _tensors(models, grown, place, "", dtype)
        write(directory / where, tensors, max_shard_bytes)
        family = LANGUAGE_MODELS.get(grown.model_type) or TOWERS[grown.model_type]
        written = _configured(grown.config, family.architecture, tensors)
        _on_first_rank(partial(written.save_pretrained, directory / where))
        described["parts"].append({"path": grown.path, "layer": grown.layer, "select": grown.select})
    named = replace(origin, parts=tuple(part for part in origin.parts if part.model_type != PROJECTOR))
    _write_own(models, named, directory, place, dtype)
    _describe_modalities(models[0], named, described)

    def finish() -> None:
        save_beside(origin, directory / LANGUAGE_DIRECTORY)
        (directory / OWN).write_text(json.dumps(described, indent=2) + "\n")

    _on_first_rank(finish)


def _write_own(
    models: Sequence[Chunk], origin: Origin, directory: Path, place: Place, dtype: torch.dtype | None
) -> None:
    tensors = own.tensors_of(models, origin)
    table: Table = own.table_of_all(own.table_of(models, tensors, place))
    if not table.rules:
        return
    sent = outgoing(own.as_parameters(tensors), table, place, dtype=dtype)
    if dist.is_initialized() and dist.get_rank() > 0:
        for one in sent:
            one.tensor()
        return
    with File(directory / own.FILE, sent) as file:
        for one in sent:
            file.write(one.tensor())


def _describe_modalities(model: Chunk, origin: Origin, described: dict[str, Any]) -> None:
    """Adds the modalities' specs, without the parts that have directories of their own."""
    config = model.mimo_config
    covered = {part.path for part in origin.parts}
    modalities = {}
    try:
        for modality, spec in config.modality_submodules.items():
            parts = dict(spec.submodules or {})
            encoders = {
                name: _standalone(encoder, model.modality_submodules[modality].encoders, name)
                for name, encoder in (parts.get("encoders") or {}).items()
                if f"{modality}/encoders/{name}" not in covered
            }
            order = list(parts.get("encoders") or {})
            others = {key: _standalone(one, {}) for key, one in parts.items()}
            modalities[modality] = {
                "spec": describe(replace(spec, submodules={**others, "encoders": encoders})),
                "encoders": order,
            }
    except Undescribed as undescribed:
        logger.warning(
            "save_pretrained: %s has no place in %s. The weights are saved; load them with from_pretrained(directory, "
            "config=...).",
            undescribed,
            OWN,
        )
        return
    described["modalities"] = modalities


def _standalone(spec: Any, built: Mapping[str, Any], name: str = "") -> Any:
    """A spec that no longer needs the directories that transformers' encoders and codecs came from.

    Args:
        spec: or what holds specs.
        built: this rank's encoders.
        name: of the encoder whose spec it is.
    """
    if isinstance(spec, Mapping):
        return {key: _standalone(one, built) for key, one in spec.items()}
    if isinstance(spec, list):
        return [_standalone(one, built) for one in spec]
    if not isinstance(spec, ModuleSpec):
        return spec
    if spec.module is HFEncoder and name in built:
        return ModuleSpec(module=HFEncoder, params=built[name].saved_params())
    params = dict(spec.params or {})
    if spec.module in (HFCodec, HFImageCodec):
        _, config = source(params.pop("name_or_path", None), params.pop("config", None))
        config = own_config(config) if spec.module is HFImageCodec else config
        return ModuleSpec(module=spec.module, params=params | {"config": as_json(config)})
    return replace(spec, params=_standalone(params, built), submodules=_standalone(spec.submodules, built))
