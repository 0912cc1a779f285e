"""Loading what a checkpoint has of a model, such as a language model into one of several modalities."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mimo.model import MimoModel
from megatron_mimo.training.checkpoints import identity, manifest
from megatron_mimo.training.checkpoints.directories import found_at
from megatron_mimo.training.checkpoints.inert import description_of
from megatron_mimo.training.checkpoints.reading import check, leaves, read
from megatron_mimo.training.ema import PREFIX

logger = logging.getLogger(__name__)

# A language model that was trained by itself has its names without it.
_LANGUAGE_MODEL = "language_model."
_STATE = ("optimizer.", "chained_", PREFIX)


@dataclass(frozen=True)
class LoadReport:
    """What became of each weight, by its name in the model; equal on all ranks.

    Args:
        loaded: those that were in the checkpoint.
        initialised: those that were not, or that were not asked for, and are as they were.
        left_out: names of the checkpoint that went nowhere.

    Example:
        >>> print(LoadReport(("language_model.a", "language_model.b"), ("modality_submodules.images.c",), ()))
        loaded: language_model (2)
        kept as initialised: modality_submodules.images (1)
        left out: nothing
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = {"loaded": self.loaded, "kept as initialised": self.initialised, "left out": self.left_out}
        return "\n".join(f"{said}: {_summary(names)}" for said, names in lines.items())


def _summary(names: Sequence[str]) -> str:
    """Names by their part, with the number of each."""
    counted: dict[str, int] = {}
    for name in names:
        words = name.split(".")
        part = ".".join(words[:2]) if words[0] == "modality_submodules" else words[0]
        counted[part] = counted.get(part, 0) + 1
    return ", ".join(f"{part} ({number})" for part, number in counted.items()) or "nothing"


def load_parts(
    path: Path, chunks: Sequence[MimoModel], prefixes: Collection[str] | None, *, ema: bool = False
) -> LoadReport:
    """Reads the weights that a checkpoint has of a model, and gives what became of each. Collective over all ranks.

    It may be a `Trainer`'s, of Megatron's loop, or of a language model that was trained by itself.

    Args:
        path: directory of the checkpoint.
        chunks: of the model on this rank.
        prefixes: what the names of the weights to load begin with; None for all.
        ema: the averages of weights that have one, in their place.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: on every rank, before anything has changed: loading would run what the file says, it is not whole,
            the sizes of a weight differ, or it has none of these weights, or no averages where they are asked for.
    """
    path = found_at(path)
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: expected a directory with .metadata, metadata.json and data."
        )
    check(path, chunks[0].mimo_config, whole=False)
    _warn_of_differences(path, chunks[0])
    stored = description_of(path / ".metadata").state_dict_metadata
    there = {name for name, kind in stored.items() if isinstance(kind, TensorStorageMetadata)}
    averaged = {name for name in there if name.startswith(PREFIX)}
    if ema and not averaged:
        raise ValueError(f"{path} has no averages of weights; its run had no ema_decay. Load it without ema=True.")
    there = {name for name in there if not name.startswith(_STATE)}
    state = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
    ours = _everywhere({each.key for each in leaves(state) if isinstance(each, ShardedTensor)})
    theirs = _names(ours, there, prefixes)
    if not theirs:
        raise ValueError(
            f"{path} has none of the weights asked for: it has {_summary(sorted(there))}; asked for were names that "
            f"begin with {sorted(prefixes) if prefixes is not None else 'any of ' + _summary(sorted(ours))}."
        )
    wanted, _ = extract_matching_values(state, lambda leaf: _is_there(leaf, theirs, stored))
    kept = {name: f"{PREFIX}{other}" for name, other in theirs.items() if ema and f"{PREFIX}{other}" in averaged}
    _rename(wanted, theirs | kept)
    found = read(wanted, path, whole=False)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(found.get(f"model{index}", {}), strict=False)
    report = LoadReport(
        loaded=tuple(sorted(theirs)),
        initialised=tuple(sorted(ours - {*theirs})),
        left_out=tuple(sorted(there - {*theirs.values()})),
    )
    logger.info("%s\n%s", path, report)
    return report


def _warn_of_differences(path: Path, chunk: MimoModel) -> None:
    found = manifest.read(path)
    if found is not None and dist.get_rank() == 0:
        for line in identity.differences(found.model, identity.identity_of(chunk.mimo_config)):
            logger.warning("%s: %s", path, line)


def _names(ours: set[str], there: set[str], prefixes: Collection[str] | None) -> dict[str, str]:
    """Our name -> the checkpoint's, of what is to be loaded."""
    # `megatron.core.models.mimo` names the wrappers of parts that have a grid of ranks of their own.
    unwrapped = {".".join(word for word in name.split(".") if word != "module"): name for name in sorted(there)}
    pairs = {name: name if name in there else unwrapped.get(name) for name in ours}
    alone = not any(pairs.values())
    if alone:
        pairs = {name: name.removeprefix(_LANGUAGE_MODEL) for name in ours}
    return {
        name: other
        for name, other in pairs.items()
        if other in there
        and (not alone or name.startswith(_LANGUAGE_MODEL))
        and (prefixes is None or name.startswith(tuple(prefixes)))
    }


def _is_there(leaf: Any, theirs: Mapping[str, str], stored: Mapping[str, Any]) -> bool:
    if isinstance(leaf, ShardedObject):
        return leaf.unique_key in stored and any(leaf.key.startswith(name.rpartition(".")[0]) for name in theirs)
    return isinstance(leaf, ShardedTensor | ShardedTensorFactory) and leaf.key in theirs


def _rename(wanted: dict, theirs: Mapping[str, str]) -> None:
    for name, leaf in wanted.items():
        if isinstance(leaf, dict):
            _rename(leaf, theirs)
        elif not isinstance(leaf, ShardedObject):
            wanted[name] = replace(leaf, key=theirs[leaf.key])


def _everywhere(names: set[str]) -> set[str]:
    """The names of all ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    return set().union(*gathered)
