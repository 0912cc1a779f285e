"""LLaVA's two stages: the projector alone, then the language model with it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from examples.llava.reading import reading
from megatron_mimo import MimoModelConfig
from megatron_mimo.data import PackedData, PackShape, open_source
from megatron_mimo.launch import Run
from megatron_mimo.training import PackSource, Trainer, TrainerSettings, TrainingControl


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        frozen: parts that do not train.
        learning_rate: at its highest.
    """

    frozen: tuple[str, ...]
    learning_rate: float


#: As LLaVA 1.5 was trained; the tower never trains.
STAGES = {
    "projector": Stage(("language_model", "images/encoders"), 1e-3),
    "instructions": Stage(("images/encoders",), 2e-5),
}


def packs(config: MimoModelConfig, file: Path, length: int, run: Run) -> PackedData:
    """Packs of `length` positions of the conversations in `file`, for this rank."""
    return PackedData(
        [open_source(file)],
        reading(config),
        PackShape(length=length),
        rank=run.data_rank,
        size=run.layout.data_parallel_size,
    )


def train(
    run: Run,
    source: str | Path,
    file: Path,
    stage: Stage,
    *,
    steps: int,
    microbatches: int,
    length: int,
    dtype: torch.dtype | None = None,
    learning_rate: float | None = None,
) -> Trainer:
    """One stage that begins from the weights of `source`, on the layout of the run."""
    config = megatron_mimo.pretrained_config(source, dtype=dtype)
    trainer = Trainer(
        config,
        run,
        TrainerSettings(steps=steps, warmup_steps=max(1, steps * 3 // 100), progress=run.rank == 0),
        optimizer=OptimizerConfig(lr=learning_rate or stage.learning_rate, weight_decay=0.0, clip_grad=1.0),
        control=TrainingControl(frozen=stage.frozen),
        pretrained=source,
    )
    trainer.train(PackSource(packs(config, file, length, run), microbatches=microbatches))
    return trainer
