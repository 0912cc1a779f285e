"""Where a stage's losses go: a line of JSON a step, TensorBoard, Weights & Biases."""

from __future__ import annotations

from pathlib import Path

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.recipe import Loggers
from megatron_mimo.training import Lines, Logger, TensorBoard, Wandb


def loggers_of(directory: Path, stage: str, wanted: Loggers) -> list[Logger]:
    """The loggers of one stage.

    Args:
        directory: of the run.
        stage: its name.
        wanted: of the recipe.

    Raises:
        Refused: what one needs is not installed.
    """
    found: list[Logger] = []
    if wanted.lines:
        found.append(Lines(directory / "log.jsonl", {"stage": stage}))
    try:
        if wanted.tensorboard:
            found.append(TensorBoard(directory / "tensorboard" / stage))
        if wanted.wandb is not None:
            name = f"{directory.name}-{stage}"
            found.append(
                Wandb(directory, wanted.wandb.project, wanted.wandb.mode, {"name": name, "group": directory.name})
            )
    except ImportError as error:
        key, _, fix = str(error).partition(": ")
        raise Refused(f"loggers.{key.lower()}: {fix}, or leave it out") from error
    return found
