"""A recipe's model: its configuration on the run's layout, and what its weights begin from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.model_recipe import Codes, Flow, Modality, Model
from megatron_mimo.cli.readers import described
from megatron_mimo.cli.settings import Settings
from megatron_mimo.config import SUBMODULE_KEYS, MimoModelConfig
from megatron_mimo.decoders import (
    CodeInput,
    CodeTokenizer,
    DiscreteDecoder,
    FlowDecoder,
    FlowTransformerDecoder,
    NoisedTargetInput,
    QueryInput,
)
from megatron_mimo.hf.codec import HFCodec, SoundCodes, sound_codes
from megatron_mimo.hf.encoder import HFEncoder
from megatron_mimo.hf.image_codec import HFImageCodec, ImageCodes, image_codes
from megatron_mimo.hf.source import resolve
from megatron_mimo.modality.kinds import AudioModalitySubmodules
from megatron_mimo.pretrained import Source, pretrained_config
from megatron_mimo.training.parts.control import parameter_prefixes

#: The encoder of a recipe's modality; decoders are named by what they write.
ENCODER = "tower"


def decoder_of(writes: Flow | Codes) -> str:
    """The name of what writes a modality."""
    return "codes" if writes.kind == "codes" else "pixels"


def tokenizer_of(config: MimoModelConfig, name: str) -> tuple[ImageCodes | SoundCodes, tuple[int, ...]]:
    """What codes a modality is written as, and the grid of one image or clip.

    Args:
        config: of the model, whose codec need not lie where the recipe has it any more.
        name: of a modality that a recipe writes as codes.
    """
    decoders = cast(Mapping[str, Any], config.submodule_specs(name)["decoders"])
    params = decoders["codes"].params["tokenizer"].params
    codec = params["module"]
    told = image_codes if codec.module is HFImageCodec else sound_codes
    return told(**codec.params), tuple(params["grid"])


def model_config(model: Model, settings: Settings, *, sequence_parallel: bool = False) -> MimoModelConfig:
    """The configuration of a recipe's model, on the layout of the run in progress.

    Args:
        model: of the recipe.
        settings: its Megatron settings.
        sequence_parallel: of the language model.

    Raises:
        FileNotFoundError, ConnectionError: a part that is not there.
        ValueError: parts or sizes that do not fit.
    """
    shared: dict[str, Any] = dict(
        dtype=None if model.dtype is None else getattr(torch, model.dtype),
        backend=model.backend,
        sequence_parallel=sequence_parallel,
        transformer=settings.transformer,
    )
    if model.source is not None:
        return pretrained_config(model.source, **shared)
    reads = {name: one for name, one in model.modalities.items() if one.reads is not None}
    writes = {name: one.writes for name, one in model.modalities.items() if one.writes is not None}
    width = _width(model)
    config = pretrained_config(
        language_model=model.language_model,
        encoders={name: {ENCODER: _encoder(name, one)} for name, one in reads.items()},
        special_tokens={name: token_of(name, one) for name, one in reads.items()},
        decoders={name: {decoder_of(one): _decoder(one, width)} for name, one in writes.items()},
        generation_tokens={name: model.modalities[name].generation_token for name in writes},
        submodules={name: _inputs(one, width) for name, one in writes.items()},
        **shared,
    )
    if not writes:
        return config
    specs = {name: _finishing(spec, model.modalities[name].writes) for name, spec in config.modality_submodules.items()}
    return replace(config, modality_submodules=specs)


@dataclass(frozen=True)
class Written:
    """What a recipe's model writes.

    Args:
        rows: generation tokens of the longest image or clip; 0 where it writes none.
        sampling_rate: of clips, in Hz.
    """

    rows: int = 0
    sampling_rate: int = 16_000


def written_by(config: MimoModelConfig, model: Model | None) -> Written:
    """What a model writes.

    Args:
        config: of the model.
        model: of the recipe that put it together; None where there is none.
    """
    found = Written()
    for name, modality in (described(model).modalities if model is not None else {}).items():
        if isinstance(modality.writes, Flow):
            found = replace(found, rows=max(found.rows, modality.writes.rows))
        elif modality.writes is not None:
            told, grid = tokenizer_of(config, name)
            found = replace(found, rows=max(found.rows, math.prod(grid)))
            if isinstance(told, SoundCodes):
                found = replace(found, sampling_rate=told.sampling_rate)
    return found


def token_of(name: str, modality: Modality) -> str:
    """The token at which a modality's rows are placed."""
    return modality.token or ("<image>" if modality.medium_at(name) == "image" else "<sound>")


def weights_of(model: Model) -> Source:
    """What the weights of a model's first stage begin from, as a `Trainer` takes it."""
    if model.source is not None:
        return model.source
    towers = {
        f"{name}/encoders/{ENCODER}": one.reads.name
        for name, one in model.modalities.items()
        if one.reads is not None and not one.reads.as_it_is
    }
    return {"language_model": str(model.language_model), **towers}


def names_of(model: Model) -> list[str]:
    """Everything that a model is read from: directories and names on the hub."""
    parts = [one.reads.name for one in model.modalities.values() if one.reads is not None]
    codecs = [one.writes.codec for one in model.modalities.values() if isinstance(one.writes, Codes)]
    return [str(model.source or model.language_model), *parts, *codecs]


def frozen_parts(config: MimoModelConfig, trained: Mapping[str, float], where: str) -> tuple[str, ...]:
    """The parts of a model that do not train, by those that do.

    Args:
        config: of the model.
        trained: parts, as `TrainingControl` names them.
        where: of the recipe, for messages.

    Raises:
        Refused: a part that the model does not have.
    """
    leaves = {"language_model": "language_model."}
    for modality in config.modality_submodules:
        for key, found in config.submodule_specs(modality).items():
            if key not in SUBMODULE_KEYS or not found:
                continue
            names = list(found) if isinstance(found, Mapping) else [None]
            for name in names:
                path = "/".join(filter(None, (modality, key, name)))
                leaves[path] = f"modality_submodules.{path.replace('/', '.')}."
    wanted: list[str] = []
    for part in trained:
        try:
            wanted += parameter_prefixes(part, config, where)
        except ValueError as error:
            raise Refused(str(error)) from error
    return tuple(path for path, prefix in leaves.items() if not prefix.startswith(tuple(wanted)))


def _encoder(name: str, modality: Modality) -> str | ModuleSpec:
    reads = modality.reads
    assert reads is not None
    if not reads.as_it_is:
        return reads.name
    params = dict(
        name_or_path=str(resolve(reads.name)),
        modality=modality.medium_at(name),
        layer=reads.layer,
        select=reads.select,
        frozen=reads.frozen,
    )
    return ModuleSpec(HFEncoder, params=params)


def _decoder(writes: Flow | Codes, width: int) -> ModuleSpec:
    if isinstance(writes, Codes):
        return _code_decoder(writes, width)
    targets = writes.channels * writes.patch**2
    sizes = dict(width=width, target_width=targets, hidden_width=writes.hidden_width, depth=writes.depth)
    if writes.kind == "flow":
        return ModuleSpec(FlowDecoder, params=sizes | {"rows_per_item": writes.rows})
    items = dict(rows_per_item=writes.rows, targets_per_item=writes.rows, heads=writes.heads, condition="own")
    return ModuleSpec(FlowTransformerDecoder, params=sizes | items)


def _code_decoder(writes: Codes, width: int) -> ModuleSpec:
    """The heads and the frozen codec, whose own files are read where the model is built."""
    params: dict[str, Any] = {"name_or_path": str(resolve(writes.codec))}
    codec: type[HFImageCodec | HFCodec]
    grid: tuple[int, ...]
    books: int | list[int]
    if writes.size is not None:
        images = image_codes(**params)
        codec, grid, taken, books = HFImageCodec, images.grid(writes.size), 1, images.codebook_size
    else:
        params["codebooks"] = writes.codebooks
        sounds = sound_codes(**params)
        frames = math.ceil(cast(float, writes.seconds) * sounds.sampling_rate / sounds.samples_per_token)
        codec, grid, taken, books = HFCodec, (frames,), sounds.codebooks, [sounds.codebook_size] * sounds.codebooks
    tokenizer = ModuleSpec(
        CodeTokenizer, params={"module": ModuleSpec(codec, params=params), "grid": grid, "codebooks": taken}
    )
    return ModuleSpec(
        DiscreteDecoder,
        params=dict(width=width, codebook_sizes=books, hidden_width=writes.hidden_width, tokenizer=tokenizer),
    )


def _inputs(writes: Flow | Codes, width: int) -> dict[str, ModuleSpec]:
    """What the language model sees at the positions that a decoder writes."""
    shown = {"hidden_size": width, "decoder": decoder_of(writes)}
    if isinstance(writes, Codes):
        return {"generation_input": ModuleSpec(CodeInput, params=shown)}
    if writes.kind == "flow":
        return {"generation_input": ModuleSpec(NoisedTargetInput, params=shown)}
    return {"generation_input": ModuleSpec(QueryInput, params={"hidden_size": width, "rows_per_item": writes.rows})}


def _finishing(spec: ModuleSpec, writes: Flow | Codes | None) -> ModuleSpec:
    """A modality's spec with what makes whole images or clips of its decoder's samples."""
    if isinstance(writes, Flow):
        return replace(spec, params={**(spec.params or {}), "image_shape": (writes.channels, *writes.size)})
    if writes is not None and writes.seconds is not None:
        return replace(spec, module=AudioModalitySubmodules)
    return spec


def _width(model: Model) -> int:
    from transformers import AutoConfig

    directory = resolve(str(model.language_model))
    return int(AutoConfig.from_pretrained(directory, local_files_only=True).hidden_size)
