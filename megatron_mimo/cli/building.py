"""A recipe's model: its configuration on the run's layout, and what its weights begin from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.recipe import Decoder, Modality, Model
from megatron_mimo.cli.settings import Settings
from megatron_mimo.config import SUBMODULE_KEYS, MimoModelConfig
from megatron_mimo.decoders import FlowDecoder, FlowTransformerDecoder, NoisedTargetInput, QueryInput
from megatron_mimo.hf.encoder import HFEncoder
from megatron_mimo.hf.source import resolve
from megatron_mimo.pretrained import Source, pretrained_config
from megatron_mimo.training.parts.control import parameter_prefixes

#: Encoders and decoders of a recipe's modality have one name each.
ENCODER, DECODER = "tower", "pixels"


def medium_of(name: str, modality: Modality) -> str:
    """Which of the data's media a modality is: "image" or "audio"."""
    return modality.medium or ("image" if name.startswith("image") else "audio")


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
    writes = {name: one for name, one in model.modalities.items() if one.writes is not None}
    width = _width(model)
    config = pretrained_config(
        language_model=model.language_model,
        encoders={name: {ENCODER: _encoder(name, one)} for name, one in reads.items()},
        special_tokens={name: token_of(name, one) for name, one in reads.items()},
        decoders={name: {DECODER: _decoder(one.writes, width)} for name, one in writes.items() if one.writes},
        generation_tokens={name: one.generation_token for name, one in writes.items()},
        submodules={name: _inputs(one.writes, width) for name, one in writes.items() if one.writes},
        **shared,
    )
    if not writes:
        return config
    shapes = {name: (one.writes.channels, *one.writes.size) for name, one in writes.items() if one.writes}
    specs = {
        name: replace(spec, params={**(spec.params or {}), "image_shape": shapes[name]}) if name in shapes else spec
        for name, spec in config.modality_submodules.items()
    }
    return replace(config, modality_submodules=specs)


def token_of(name: str, modality: Modality) -> str:
    """The token at which a modality's rows are placed."""
    return modality.token or ("<image>" if medium_of(name, modality) == "image" else "<sound>")


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
    return [str(model.source or model.language_model), *parts]


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
        modality=medium_of(name, modality),
        layer=reads.layer,
        select=reads.select,
        frozen=reads.frozen,
    )
    return ModuleSpec(HFEncoder, params=params)


def _decoder(writes: Decoder, width: int) -> ModuleSpec:
    targets = writes.channels * writes.patch**2
    sizes = dict(width=width, target_width=targets, hidden_width=writes.hidden_width, depth=writes.depth)
    if writes.kind == "flow":
        return ModuleSpec(FlowDecoder, params=sizes | {"rows_per_item": writes.rows})
    items = dict(rows_per_item=writes.rows, targets_per_item=writes.rows, heads=writes.heads, condition="own")
    return ModuleSpec(FlowTransformerDecoder, params=sizes | items)


def _inputs(writes: Decoder, width: int) -> dict[str, ModuleSpec]:
    """What the language model sees at the positions that a decoder writes."""
    if writes.kind == "flow":
        return {"generation_input": ModuleSpec(NoisedTargetInput, params={"hidden_size": width, "decoder": DECODER})}
    return {"generation_input": ModuleSpec(QueryInput, params={"hidden_size": width, "rows_per_item": writes.rows})}


def _width(model: Model) -> int:
    from transformers import AutoConfig

    directory = resolve(str(model.language_model))
    return int(AutoConfig.from_pretrained(directory, local_files_only=True).hidden_size)
