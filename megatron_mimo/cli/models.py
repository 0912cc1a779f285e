"""A model that a command is given: a name, a directory, a run's directory or one of its checkpoints."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mimo.cli.building import Written, model_config, written_by
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.laying_out import processor_of
from megatron_mimo.cli.model_recipe import Model
from megatron_mimo.cli.readers import kept_readers
from megatron_mimo.cli.reading import read_recipe
from megatron_mimo.cli.settings import Settings
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data import SampleProcessor
from megatron_mimo.hf.files import INDEX, SINGLE
from megatron_mimo.hf.source import OWN, resolve
from megatron_mimo.launch import Run
from megatron_mimo.layout import check_layout
from megatron_mimo.model import MimoModel
from megatron_mimo.pretrained import from_pretrained
from megatron_mimo.specs import Backend
from megatron_mimo.training.checkpoints.directories import found_at, is_complete
from megatron_mimo.training.checkpoints.inert import check_inert, description_of
from megatron_mimo.training.checkpoints.parts import LoadReport, load_parts
from megatron_mimo.training.checkpoints.safetensors import import_weights, source_of
from megatron_mimo.training.chunks import build_chunks
from megatron_mimo.training.ema import is_there
from megatron_mimo.training.parts.control import TrainingControl

#: Of a run's directory and of what it writes.
RECIPE, MODEL, MODEL_EMA = "recipe.yaml", "model", "model-ema"
#: Of a checkpoint that `convert` wrote: the directory or name that the model's configuration is read from.
SOURCE = "source.txt"
# What a model's directory has, whole or not, and a run's has not.
_OF_MODEL = (OWN, SINGLE, INDEX, "config.json")


@dataclass(frozen=True)
class Place:
    """Where a model is read from.

    Args:
        directory: of the weights: a model's, or a checkpoint's; or a file of safetensors that `convert` wrote.
        model: how its recipe put it together; None where there is none.
        checkpoint: whether it is one of Megatron's form, or such a file.
        template: the recipe's chat template.
        source: of what `convert` wrote: where the model's configuration is read from.
        judge: of the recipe's evaluation.
        ema: of a checkpoint: whether its averages stand in for the weights that have one.
        recipe: file of the recipe; None where there is none.
        origin: of what `convert` wrote: what it was written from, which is `source`, or a checkpoint of training.
    """

    directory: Path
    model: Model | None
    checkpoint: bool
    template: str | None = None
    source: str | None = None
    judge: str | None = None
    ema: bool = False
    recipe: Path | None = None
    origin: str | None = None

    @property
    def backend(self) -> Backend:
        """What the recipe's layers compute with; "auto" where there is none."""
        return "auto" if self.model is None else self.model.backend


@dataclass(frozen=True)
class Opened:
    """A model, ready to answer.

    Args:
        models: this rank's chunks, in evaluation mode.
        process: makes prompts.
        written: what it writes.
    """

    models: list[MimoModel]
    process: SampleProcessor
    written: Written

    @property
    def config(self) -> MimoModelConfig:
        """Of the model."""
        return self.models[0].mimo_config


def find(given: str, *, ema: bool = False) -> Place:
    """Where a model lies: of a run's directory its model, or a checkpoint with the recipe that it keeps.

    Args:
        given: by the command line.
        ema: take the averages of the weights: a run's `model-ema`, or those in a checkpoint.

    Raises:
        Refused: a run that has no model yet, a checkpoint without a recipe, or averages that are not there.
        FileNotFoundError, ConnectionError: there is nothing of that name.
    """
    place = _averaged(Path(given)) if ema else _found(given)
    return replace(place, ema=ema and place.checkpoint)


def _averaged(path: Path) -> Place:
    """A run's model of averages, or a checkpoint that has them."""
    if (path / RECIPE).is_file() and (path / MODEL_EMA).is_dir():
        return _found(str(path / MODEL_EMA))
    if is_complete(path) or (path / ".metadata").is_file():
        checkpoint = found_at(path)
        check_inert(checkpoint)
        if is_there(description_of(checkpoint / ".metadata").state_dict_metadata):
            return _found(str(path))
    raise Refused(
        f"--ema: expected a checkpoint with averages of the weights, or a run's directory with {MODEL_EMA}, found none "
        f"in {path}; train with ema_decay=0.999, or leave --ema out"
    )


def _found(given: str) -> Place:
    """As `find`, with the weights themselves."""
    path = Path(given)
    if path.suffix == ".safetensors" and path.is_file():
        source = source_of(path)
        if source is None:
            raise Refused(f"{given}: expected a file that convert wrote, found none that says where its model is from")
        return _weights_of(path, source)
    if is_complete(path) or (path / ".metadata").is_file():
        if (path / SOURCE).is_file():
            return _weights_of(path, (path / SOURCE).read_text("utf-8").strip())
        for above in (path, *path.resolve().parents[:3]):
            if (above / RECIPE).is_file():
                recipe = read_recipe(str(above / RECIPE))
                options: dict[str, Any] = {"judge": recipe.evaluation.judge, "recipe": above / RECIPE}
                return Place(path, recipe.model, True, recipe.processor.template, **options)
        raise Refused(f"{given}: expected a checkpoint that a recipe trained, found no {RECIPE} in it")
    if (path / RECIPE).is_file() and not any((path / name).is_file() for name in _OF_MODEL):
        if not (path / MODEL).is_dir():
            raise Refused(f"{given}: its run is not done; finish it with train, or name a checkpoint in {path}/stages")
        path = path / MODEL
    steps = sorted(path.glob("step_*")) or sorted(path.glob("*/step_*"))
    if steps and not any((path / name).is_file() for name in _OF_MODEL):
        raise Refused(f"{given}: expected a model or one checkpoint, found a directory of several; name {steps[-1]}")
    directory = resolve(path if path.is_dir() else given)
    if not (directory / RECIPE).is_file():
        return Place(directory, None, False)
    recipe = read_recipe(str(directory / RECIPE))
    model = kept_readers(recipe.model, directory)
    options = {"judge": recipe.evaluation.judge, "recipe": directory / RECIPE}
    return Place(directory, model, False, recipe.processor.template, **options)


def _weights_of(path: Path, source: str) -> Place:
    """Weights that `convert` wrote, of a model whose configuration is read from another place."""
    found = _found(source)
    read_from = found.source or (None if found.checkpoint else source)
    return replace(found, directory=path, checkpoint=True, source=read_from, origin=found.origin or source)


def model_of(place: Place) -> Model:
    """The model of a place as a recipe has it: of a checkpoint as it was trained, else what lies in the directory."""
    if place.checkpoint and place.source is None:
        assert place.model is not None  # as `find` sees to
        return place.model
    return Model(source=place.source or str(place.directory))


def open_model(place: Place, run: Run, dtype: str | None = None) -> Opened:
    """The model of a place on the layout of the run. Collective over all ranks.

    Args:
        place: from `find`.
        run: in progress.
        dtype: of the weights; None for the files', or the recipe's of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: as `from_pretrained` and `load_parts`.
    """
    models = read_model(place, run, dtype)
    config = models[0].mimo_config
    return Opened(models, processor_of(config, place.model, place.template), written_by(config, place.model))


def read_model(place: Place, run: Run, dtype: str | None = None) -> list[MimoModel]:
    """This rank's chunks of a model, in evaluation mode; as `open_model`."""
    if not place.checkpoint:
        made = from_pretrained(place.directory, dtype=None if dtype is None else getattr(torch, dtype))
        return made if isinstance(made, list) else [made]
    model = model_of(place)
    if dtype is not None:
        model = model.model_copy(update={"dtype": dtype})
    config = model_config(model, Settings())
    check_layout(run.layout, config)
    models = build_chunks(config, run, TrainingControl())
    if place.directory.is_file():
        report = _load_file(place.directory, models, run)
    else:
        report = load_parts(place.directory, models, None, ema=place.ema)
    if report.initialised:
        raise ValueError(f"{place.directory}: expected every weight of the recipe's model, found: {report}")
    own = config.language_model.params["config"].params_dtype
    return [chunk.to(dtype=own).eval() for chunk in models]


def _load_file(file: Path, models: list[MimoModel], run: Run) -> LoadReport:
    """Loads a file of safetensors, by way of a checkpoint beside it. Collective over all ranks."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="reading-") as folder:
        told = [Path(folder) / "checkpoint"]
        if run.world_size > 1:
            dist.broadcast_object_list(told, src=0)
        import_weights(file, told[0], models[0].mimo_config, run)
        report = load_parts(told[0], models, None)
        if run.world_size > 1:
            dist.barrier()
    return report
