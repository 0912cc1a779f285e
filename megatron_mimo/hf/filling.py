"""The parts of a MimoModel, found by their paths, and filled from a checkpoint's tensors."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf import own
from megatron_mimo.hf.blueprint import Chunk, Origin, Part
from megatron_mimo.hf.comparing import vocabulary_of
from megatron_mimo.hf.files import read_header
from megatron_mimo.hf.names import parameters_by_name
from megatron_mimo.hf.reading import Place, differences, fill, refuse, unfilled

logger = logging.getLogger(__name__)

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Rows of an embedding that are read at once for their mean.
_ROWS = 8192


def place_of(groups) -> Place:
    """Where this rank stands, from Megatron's process groups; experts are shared out in equal, contiguous ranges."""
    return Place(
        groups.tp.rank(),
        groups.tp.size(),
        groups.expt_tp.rank(),
        groups.expt_tp.size(),
        groups.ep.rank(),
        groups.ep.size(),
    )


def module_at(model: Chunk, path: str) -> nn.Module | None:
    """The part of a MimoModel at `path`, None where this stage has it not.

    Raises:
        ValueError: the model has no such part on any stage.
    """
    if path == "language_model":
        return model.language_model
    modality, kind, name = path.split("/")
    config = model.mimo_config
    if modality not in config.modality_submodules:
        raise ValueError(
            f"part {path!r}: expected one of the modalities {sorted(config.modality_submodules)}, found {modality!r}. "
            "Give the model that modality, or leave the part out."
        )
    specs = config.submodule_specs(modality).get(kind) or {}
    known = list(specs) if isinstance(specs, dict) else [str(index) for index in range(len(specs))]
    if name not in known:
        raise ValueError(
            f"part {path!r}: expected one of {known} among the {kind} of {modality!r}, found {name!r}. Name them "
            "alike, or leave the part out."
        )
    held = getattr(model.modality_submodules[modality], kind)
    if isinstance(held, nn.ModuleDict):
        return dict(held.items()).get(name)
    return held[int(name)] if int(name) < len(held) else None


def parameters_of(part: nn.Module, place: Place) -> dict[str, nn.Parameter]:
    """The parameters of a part by the tables' names."""
    kinds = None
    each: Iterable[Any] = part.modules()
    for module in each:
        if type(module).__name__ == "HybridModel":
            kinds = [kind for kind in module.hybrid_layer_pattern if kind in "*-E"]
    experts = part.config.num_moe_experts if isinstance(part, MegatronModule) else None
    first_expert = place.share * ((experts or 0) // place.shares)
    return parameters_by_name(part, first_expert=first_expert, layer_kinds=kinds)


def fill_parts(
    models: Sequence[Chunk], origin: Origin, place: Place, problems: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Fills the parts of this rank's model chunks; nothing changes where one does not fit.

    Args:
        models: this rank's chunks.
        origin: the parts with their tensors.
        place: of this rank.
        problems: path of a part -> what was found before.

    Raises:
        ValueError: naming those, and every parameter that a part's tensors do not fill.
    """
    found = [(part, parameters_of(module, place)) for part, module in _parts(models, origin.parts)]
    for part in origin.parts:
        told = list((problems or {}).get(part.path, ()))
        for one, parameters in found:
            told += unfilled(parameters, part.table, place) if one is part else []
        refuse(f"{part.directory}: {part.path}", told)
    for part, parameters in found:
        fill(parameters, part.stored, part.table, place)
        if part.path == "language_model" and origin.fresh_rows:
            _fill_fresh_rows(parameters, part, origin.fresh_rows, place)


def _parts(models: Sequence[Chunk], parts: Iterable[Part]) -> Iterator[tuple[Part, nn.Module]]:
    for part in parts:
        for model in models if part.stored else ():
            module = module_at(model, part.path)
            if module is not None:
                yield part, module


def fill_own(models: Sequence[Chunk], origin: Origin, file: Path, place: Place) -> None:
    """Fills the parts that no table covers, by their names; nothing changes where one does not fit.

    Args:
        models: this rank's chunks.
        origin: the parts that tables cover.
        file: with the weights.
        place: of this rank.

    Raises:
        ValueError: naming every tensor that is missing, surplus or of another shape.
    """
    tensors = own.tensors_of(models, origin)
    table, stored = own.table_of(models, tensors, place), read_header(file)
    told = [line for line in differences(stored, table) if not line.startswith("surplus")]
    refuse(str(file), [*told, *(f"surplus: {name}" for name in stored if _nowhere(models, name, tensors))])
    fill(own.as_parameters(tensors), stored, table, place)


def _nowhere(models: Sequence[Chunk], name: str, here: Container[str]) -> bool:
    """Whether no stage of the model has a tensor of that name, as far as this rank can tell: other stages' parts it
    has not built are theirs to compare.
    """
    if name in here:
        return False
    prefix, *path = name.split(".")
    if prefix != "modality_submodules" or len(path) < 3:
        return True
    modality, kind, part = path[:3]
    if kind == "generation_input":
        config = models[0].mimo_config
        feeds = modality in config.modality_submodules and config.submodule_specs(modality).get(kind) is not None
        return not feeds or any(model.modality_submodules[modality].generation_input is not None for model in models)
    try:
        return any(module_at(model, f"{modality}/{kind}/{part}") is not None for model in models)
    except ValueError:
        return True


def with_fresh_rows(origin: Origin, config: MimoModelConfig) -> Origin:
    """`origin` for a model of `config`, whose vocabulary may have rows that the checkpoint lacks or never trained."""
    language, known = origin.part("language_model"), config.origin
    if language is None:
        return origin
    rows = set(range(language.config.vocab_size, vocabulary_of(config)))
    if rows:
        logger.info(
            "load_pretrained: %s has %d rows of the vocabulary; rows %d to %d of the model begin as the mean of those.",
            language.directory,
            language.config.vocab_size,
            min(rows),
            max(rows),
        )
    if isinstance(known, Origin) and (same := known.part("language_model")) and same.directory == language.directory:
        rows |= set(known.fresh_rows)
    return replace(origin, fresh_rows=tuple(sorted(rows)))


@torch.no_grad()
def _fill_fresh_rows(parameters, part: Part, rows: Sequence[int], place: Place) -> None:
    """Rows of new tokens become the mean of those that the checkpoint has before them."""
    rules = {rule.ours: rule for rule in part.table.rules}
    for name in {EMBEDDING, OUTPUT} & set(parameters):
        parameter = parameters[name]
        (theirs,) = rules[name].theirs
        stored = part.stored[theirs]
        old = min(min(rows), stored.shape[0])
        total = torch.zeros(stored.shape[1], dtype=torch.float64)
        for start in range(0, old, _ROWS):
            total += stored.read(0, start, min(start + _ROWS, old)).double().sum(0)
        first = place.rank * parameter.shape[0]
        for row in rows:
            if first <= row < first + parameter.shape[0]:
                parameter[row - first] = (total / old).to(parameter)
