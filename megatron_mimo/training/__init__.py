"""Training: batches, losses, control of the parts, and a small loop; `megatron.training.pretrain` fits too."""

from importlib import import_module
from typing import TYPE_CHECKING

from megatron_mimo.compat.notices import Answered

if TYPE_CHECKING:
    from megatron_mimo.data.step import read_step
    from megatron_mimo.layout import check_layout
    from megatron_mimo.training.checkpoints.directories import CheckpointSettings
    from megatron_mimo.training.checkpoints.parts import LoadReport
    from megatron_mimo.training.forward import ForwardStep
    from megatron_mimo.training.hooks import Began, Callback, FurtherLoss, Hooks
    from megatron_mimo.training.loggers import Lines, Logger, TensorBoard, Wandb
    from megatron_mimo.training.parts.control import TrainingControl
    from megatron_mimo.training.parts.whole_step import StepGraphs
    from megatron_mimo.training.pretraining.arguments import add_mimo_args
    from megatron_mimo.training.pretraining.configs import (
        backend_from_args,
        encoder_config_from_args,
        language_spec_from_args,
    )
    from megatron_mimo.training.pretraining.dataset import Recipe, dataset_provider
    from megatron_mimo.training.pretraining.loop import adapt_megatron, pretrain
    from megatron_mimo.training.pretraining.provider import forward_step, model_provider
    from megatron_mimo.training.scale import StepScale, loss_func
    from megatron_mimo.training.settings import EarlyStopping, StepReport, TrainerSettings
    from megatron_mimo.training.showing import Samples
    from megatron_mimo.training.sources import DataSource, PackSource
    from megatron_mimo.training.trainer import Trainer

_HOMES = {
    "Began": "training.hooks",
    "Callback": "training.hooks",
    "CheckpointSettings": "training.checkpoints.directories",
    "DataSource": "training.sources",
    "EarlyStopping": "training.settings",
    "ForwardStep": "training.forward",
    "FurtherLoss": "training.hooks",
    "Hooks": "training.hooks",
    "Lines": "training.loggers",
    "LoadReport": "training.checkpoints.parts",
    "Logger": "training.loggers",
    "PackSource": "training.sources",
    "Recipe": "training.pretraining.dataset",
    "Samples": "training.showing",
    "StepGraphs": "training.parts.whole_step",
    "StepReport": "training.settings",
    "StepScale": "training.scale",
    "TensorBoard": "training.loggers",
    "Trainer": "training.trainer",
    "TrainerSettings": "training.settings",
    "TrainingControl": "training.parts.control",
    "Wandb": "training.loggers",
    "adapt_megatron": "training.pretraining.loop",
    "add_mimo_args": "training.pretraining.arguments",
    "backend_from_args": "training.pretraining.configs",
    "check_layout": "layout",
    "dataset_provider": "training.pretraining.dataset",
    "encoder_config_from_args": "training.pretraining.configs",
    "forward_step": "training.pretraining.provider",
    "language_spec_from_args": "training.pretraining.configs",
    "loss_func": "training.scale",
    "model_provider": "training.pretraining.provider",
    "pretrain": "training.pretraining.loop",
    "read_step": "data.step",
}

__all__ = sorted(_HOMES)

# Modules of version 0.1 that are gone; the last place that is looked into.
__path__.append(f"{__path__[0]}/../moved/training")


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with Answered():
        return getattr(import_module(f"megatron_mimo.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
