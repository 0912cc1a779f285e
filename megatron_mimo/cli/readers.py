"""The files that say what a model's encoders take, kept beside its weights: it is then whole wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_mimo.cli.model_recipe import Model
from megatron_mimo.cli.reading import read_recipe
from megatron_mimo.hf.source import BESIDE, resolve

#: Below a model's directory: a folder for each modality that it reads.
READERS = "readers"

_FILES = ("config.json", *(name for name in BESIDE if "processor" in name))


def keep_readers(model: Model, directory: Path) -> None:
    """Copies them beside a model's weights; of an encoder that is not there any more there is nothing to copy.

    Args:
        model: of the recipe; each encoder's name is where they are read from.
        directory: of the weights.
    """
    for name, modality in model.modalities.items():
        if modality.reads is None:
            continue
        try:
            source = resolve(modality.reads.name)
        except (FileNotFoundError, ConnectionError):
            continue
        target = directory / READERS / name
        target.mkdir(parents=True, exist_ok=True)
        for file in _FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, target / file)


def described(model: Model) -> Model:
    """A recipe's model with what it reads and writes; of a whole one that a run wrote, as that run's recipe says."""
    recipe = None if model.source is None else Path(model.source) / "recipe.yaml"
    if recipe is None or not recipe.is_file():
        return model
    return kept_readers(described(read_recipe(str(recipe)).model), recipe.parent)


def kept_readers(model: Model, directory: Path) -> Model:
    """The model of a recipe with the encoders' names changed for what is kept in a model's directory.

    Args:
        model: of the recipe that the directory has.
        directory: of the weights; one without such files leaves the names as they are.
    """
    modalities = {}
    for name, modality in model.modalities.items():
        kept = directory / READERS / name
        if modality.reads is not None and kept.is_dir():
            modality = modality.model_copy(update={"reads": modality.reads.model_copy(update={"name": str(kept)})})
        modalities[name] = modality
    return model.model_copy(update={"modalities": modalities})
