"""`train`: a recipe's stages one after another, from where the directory of the run stands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.batch import Batch
from megatron_mimo.cli.answering import TEXT_TOKENS
from megatron_mimo.cli.building import frozen_parts, model_config, weights_of, written_by
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.graphs import check_graphs, step_graphs, with_graphs
from megatron_mimo.cli.laying_out import processor_of
from megatron_mimo.cli.logs import loggers_of
from megatron_mimo.cli.prompts import Spoken, prompts_of
from megatron_mimo.cli.readers import described, keep_readers
from megatron_mimo.cli.reading import written
from megatron_mimo.cli.recipe import Recipe, Source, Stage
from megatron_mimo.cli.settings import Settings, settings_of
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data import PackedData, PackShape, ReadingOptions, SampleProcessor, open_source, split
from megatron_mimo.data.sources import Source as OpenSource
from megatron_mimo.data.written import write_whole
from megatron_mimo.launch import Run
from megatron_mimo.layout import check_layout
from megatron_mimo.pretrained import save_pretrained
from megatron_mimo.sharding import sequence_multiple
from megatron_mimo.training import (
    CheckpointSettings,
    EarlyStopping,
    Logger,
    PackSource,
    Samples,
    TensorBoard,
    Trainer,
    TrainerSettings,
    TrainingControl,
)
from megatron_mimo.training.agreement import agree, error_of
from megatron_mimo.training.checkpoints.directories import best_of, newest_first
from megatron_mimo.training.sources import batch_of

logger = logging.getLogger(__name__)

#: Below the directory of a run.
RECIPE, MODEL, STAGES, SAMPLES = "recipe.yaml", "model", "stages", "samples"
#: With ema_decay: the model with the averages for its weights.
MODEL_EMA = "model-ema"


@dataclass(frozen=True)
class Prepared:
    """What every stage shares.

    Args:
        recipe: of the run.
        run: in progress.
        settings: of Megatron.
        config: of the model.
        process: makes samples.
    """

    recipe: Recipe
    run: Run
    settings: Settings
    config: MimoModelConfig
    process: SampleProcessor


def train(recipe: Recipe, run: Run) -> bool:
    """Trains the stages of a recipe that are not done yet, and writes the model. Collective over all ranks.

    Args:
        recipe: of the run.
        run: in progress, on the recipe's layout.

    Returns:
        Whether it came to its end; False where a SIGTERM stopped it.

    Raises:
        Refused: a part that the model does not have, on every rank.
        FileNotFoundError, ValueError: data or a model that is not there or does not fit.
    """
    if (recipe.directory / MODEL).is_dir():
        logger.warning("%s: this run is done; its model is in %s", recipe.directory, recipe.directory / MODEL)
        return True
    prepared = _prepared(recipe, run)
    if run.rank == 0:
        recipe.directory.mkdir(parents=True, exist_ok=True)
        write_whole(recipe.directory / RECIPE, written(recipe))
    before: Path | None = None
    trainer: Trainer | None = None
    for stage in recipe.stages:
        directory = stage_directory(recipe, stage)
        done = [path for path in newest_first(directory) if path.name == f"step_{stage.steps:08d}"]
        if done and stage is not recipe.stages[-1]:
            before = _kept(recipe, directory)
            continue
        trainer = _trained(prepared, stage, before)
        if trainer is None:
            return False
        before = _kept(recipe, directory)
    assert trainer is not None and before is not None  # of the last stage, which is never passed over
    if recipe.ema_decay is not None:
        with trainer.ema_weights():
            save_pretrained(trainer.models, recipe.directory / MODEL_EMA)
    if recipe.checkpoints.keep_best:
        trainer.load(before, weights_only=True)
    save_pretrained(trainer.models, recipe.directory / MODEL)
    if run.rank == 0:
        for directory in (recipe.directory / MODEL, recipe.directory / MODEL_EMA):
            if directory.is_dir():
                model = described(recipe.model)
                keep_readers(model, directory)
                write_whole(directory / RECIPE, written(recipe.model_copy(update={"model": model})))
    if dist.is_initialized() and run.world_size > 1:
        dist.barrier()
    return True


def _kept(recipe: Recipe, directory: Path) -> Path:
    """The checkpoint of a stage that ended that what follows begins from."""
    whole = newest_first(directory)
    best = best_of(whole, recipe.evaluation.compare) if recipe.checkpoints.keep_best else None
    return best or whole[0]


def stage_directory(recipe: Recipe, stage: Stage) -> Path:
    """Where the checkpoints of a stage lie."""
    return recipe.directory / STAGES / stage.name


def packs_of(
    recipe: Recipe, sources: Sequence[Source], process: SampleProcessor, run: Run | None, *, shuffle: bool = True
) -> PackedData:
    """Packs of a recipe's sources.

    Args:
        recipe: of the run.
        sources: some of its data.
        process: makes samples.
        run: whose data-parallel rank reads; None for one that reads all.
        shuffle: whether it is to train on, in a drawn order; otherwise to evaluate on.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    return PackedData(
        [parts_of(recipe, source)[0 if shuffle else 1] for source in sources],
        process,
        pack_shape(recipe),
        weights=weights or None,
        rank=0 if run is None else run.data_rank,
        size=1 if run is None else run.layout.data_parallel_size,
        options=ReadingOptions(
            corrupt=recipe.processor.corrupt,
            too_long=recipe.processor.too_long,
            workers=recipe.processor.workers if shuffle else 0,
            seed=recipe.seed,
            shuffle=shuffle,
        ),
    )


def pack_shape(recipe: Recipe) -> PackShape:
    """Of the packs that a recipe trains on.

    Raises:
        Refused: a length that its layout does not share out.
    """
    layout, packing = recipe.layout, recipe.packing
    splits = layout.tensor if layout.sequence_parallel else 1
    multiple = sequence_multiple(context_parallel=layout.context, sequence_parallel=splits)
    try:
        return PackShape(packing.length, multiple, packing.budget, packing.buffer)
    except ValueError as error:
        raise Refused(f"packing.length: {str(error).removeprefix('PackShape: ')}") from error


def parts_of(recipe: Recipe, source: Source) -> tuple[OpenSource, OpenSource]:
    """What of a source is trained on, and what is evaluated on; the whole of it where nothing is held out.

    Raises:
        FileNotFoundError, ValueError: as `opened`, or there is nothing to hold out.
    """
    whole = opened(source)
    return (whole, whole) if recipe.held_out is None else split(whole, recipe.held_out, recipe.seed)


def opened(source: Source) -> OpenSource:
    """A source of a recipe, opened.

    Raises:
        FileNotFoundError, ValueError: there is none at its path, or nothing that is one.
    """
    return open_source(source.path, media_root=source.media_root, columns=source.columns)


def _prepared(recipe: Recipe, run: Run) -> Prepared:
    """The model's configuration and what makes samples; what one rank refuses, all refuse."""
    made: list[Prepared] = []

    def make() -> None:
        settings = with_graphs(settings_of(recipe.megatron), recipe.graphs)
        config = model_config(recipe.model, settings, sequence_parallel=recipe.layout.sequence_parallel)
        for stage in recipe.stages:
            frozen_parts(config, stage.trains, f"stages.{stage.name}.trains")
        check_layout(run.layout, config)
        check_graphs(recipe.graphs, config, settings, run)
        process = processor_of(config, recipe.model, recipe.processor.template)
        made.append(Prepared(recipe, run, settings, config, process))

    error = error_of(make)
    agree(Refused(str(error)) if isinstance(error, ValueError | FileNotFoundError) else error, run)
    return made[0]


def _trained(prepared: Prepared, stage: Stage, before: Path | None) -> Trainer | None:
    """A stage's trainer at its end; None where a SIGTERM stopped it."""
    recipe, run, settings = prepared.recipe, prepared.run, prepared.settings
    directory = stage_directory(recipe, stage)
    highest = max(stage.trains.values())
    optimizer: dict[str, Any] = {"weight_decay": stage.weight_decay, "clip_grad": stage.clip_grad, **settings.optimizer}
    begins = not newest_first(directory)
    if recipe.loggers.progress and run.rank == 0:
        place = f"{recipe.stages.index(stage) + 1} of {len(recipe.stages)}"
        packs = f"{stage.microbatches} pack{'' if stage.microbatches == 1 else 's'} of {recipe.packing.length}"
        trains = ", ".join(stage.trains)
        print(f"stage {place}, {stage.name}: {stage.steps} steps of {packs}, training {trains}", file=sys.stderr)
    patience = recipe.evaluation.patience
    loggers = loggers_of(recipe.directory, stage.name, recipe.loggers)
    trainer = Trainer(
        prepared.config,
        run,
        TrainerSettings(
            steps=stage.steps,
            warmup_steps=min(stage.steps - 1, round(stage.steps * stage.warmup)),
            decay=stage.decay,
            seed=recipe.seed,
            evaluate_every=recipe.evaluation.every,
            evaluation_steps=recipe.evaluation.steps,
            save_every=recipe.checkpoints.every,
            directory=directory,
            progress=recipe.loggers.progress,
            early_stopping=None if patience is None else EarlyStopping(patience, recipe.evaluation.compare),
            part_norms=recipe.loggers.part_norms,
            ema_decay=recipe.ema_decay,
        ),
        optimizer=OptimizerConfig(lr=highest, **optimizer),
        ddp=DistributedDataParallelConfig(**settings.ddp),
        control=_control(prepared, stage, highest),
        checkpoints=CheckpointSettings(
            background=recipe.checkpoints.background,
            keep_last=recipe.checkpoints.keep_last,
            texts={RECIPE: written(recipe)},
            keep_best=recipe.evaluation.compare if recipe.checkpoints.keep_best else None,
        ),
        pretrained=weights_of(recipe.model) if begins and before is None else None,
        samples=_samples(prepared, stage, loggers),
        callbacks=loggers,
        graphs=step_graphs(recipe.graphs),
    )
    if begins and before is not None:
        trainer.load(before, weights_only=True)
    trainer.load()
    source = PackSource(packs_of(recipe, recipe.data_of(stage), prepared.process, run), stage.microbatches)
    history = trainer.train(source, _evaluation(prepared, stage))
    if trainer.graphs is not None and run.rank == 0:
        print(f"{stage.name}: steps as one CUDA graph: {trainer.graphs.counts.told}", file=sys.stderr)
    return None if history.stopped else trainer


def _control(prepared: Prepared, stage: Stage, highest: float) -> TrainingControl:
    return TrainingControl(
        frozen=frozen_parts(prepared.config, stage.trains, f"stages.{stage.name}.trains"),
        learning_rate={part: rate / highest for part, rate in stage.trains.items() if rate != highest},
    )


def _evaluation(prepared: Prepared, stage: Stage):
    """Packs to evaluate on, the same each time, as a `Trainer` asks for them; None without data."""
    recipe, run = prepared.recipe, prepared.run
    if not _evaluated(recipe, stage):
        return None
    packs: list[Batch] = []

    def batches(step: int, rank: int, size: int) -> Sequence[Batch]:
        del rank, size
        if not packs:
            data = packs_of(recipe, _evaluated(recipe, stage), prepared.process, run, shuffle=False)
            packs.extend(batch_of(pack) for pack in islice(data, recipe.evaluation.steps))
        return packs[step : step + 1]

    return batches


def _evaluated(recipe: Recipe, stage: Stage) -> Sequence[Source]:
    """What a stage is evaluated on, or what records are held out of."""
    return recipe.data_of(stage) if recipe.held_out is not None else recipe.evaluation.data


def _samples(prepared: Prepared, stage: Stage, loggers: Sequence[Logger]) -> Samples | None:
    recipe = prepared.recipe
    wanted = recipe.evaluation.samples
    if not _evaluated(recipe, stage) or not wanted:
        return None
    boards = [each for each in loggers if isinstance(each, TensorBoard)]
    source, spoken = parts_of(recipe, _evaluated(recipe, stage)[0])[1], Spoken(prepared.config)
    asked = [prompt for prompt in islice(prompts_of(source, prepared.process), wanted) if prompt.given]
    directory = recipe.directory / SAMPLES / stage.name
    if prepared.run.rank == 0:  # NUMBER-PART.txt of each evaluation answers the record of that number
        directory.mkdir(parents=True, exist_ok=True)
        told = (f"{number}: {', '.join((*one.read, source.where(one.index)))}\n" for number, one in enumerate(asked))
        write_whole(directory / "records.txt", "".join(told))
    what = written_by(prepared.config, recipe.model)
    return Samples(
        [prompt.given for prompt in asked if prompt.given],
        recipe.evaluation.max_new_tokens or TEXT_TOKENS + what.rows,
        {"tokenizer": spoken, "stop_ids": spoken.ends},
        directory=directory,
        board=boards[0] if boards else None,
        sampling_rate=what.sampling_rate,
    )
