"""Trains one model of the demo."""

import time
from dataclasses import dataclass

import torch
from megatron.core.optimizer import OptimizerConfig
from tqdm import tqdm

from megatron_mimo import MimoModel, MimoModelConfig
from megatron_mimo.launch import Run, exit_on_error
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.trainer import StepData


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Args:
        losses: term -> mean over the batch, for each step; the same on all ranks.
        seconds: of wall-clock time that training took.
    """

    model: MimoModel
    losses: list[dict[str, float]]
    seconds: float


def train(config: MimoModelConfig, run: Run, data: StepData, *, steps: int, seed: int, title: str) -> Trained:
    """A model of `config` after `steps` steps on `data`, on the layout of the run."""
    torch.manual_seed(seed)  # the same first weights whatever was trained before
    trainer = Trainer(
        config,
        run,
        TrainerSettings(steps=steps, warmup_steps=min(100, steps - 1), seed=seed),
        optimizer=OptimizerConfig(lr=2e-3, min_lr=4e-5, adam_beta2=0.99, weight_decay=0.01, clip_grad=1.0),
    )
    started = time.perf_counter()
    losses = []
    with exit_on_error(), tqdm(total=steps, desc=title, disable=run.rank > 0) as progress:
        for _ in range(steps):
            losses.append(trainer.train_step(data).losses)
            told = "  ".join(f"{name} {loss:.3f}" for name, loss in losses[-1].items())
            progress.set_postfix_str(told, refresh=False)
            progress.update()
    return Trained(trainer.models[0], losses, time.perf_counter() - started)
