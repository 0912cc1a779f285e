"""Training: batches, losses, control of the parts, and a small loop; `megatron.training.pretrain` fits too."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mimo.training.arguments import add_mimo_args
    from megatron_mimo.training.batches import read_step
    from megatron_mimo.training.control import TrainingControl
    from megatron_mimo.training.forward import ForwardStep
    from megatron_mimo.training.layouts import check_layout
    from megatron_mimo.training.loss import StepScale, loss_func
    from megatron_mimo.training.pretraining import Recipe, adapt_megatron, dataset_provider, pretrain
    from megatron_mimo.training.script import forward_step, model_provider
    from megatron_mimo.training.trainer import StepReport, Trainer, TrainerSettings

_HOMES = {
    "ForwardStep": "forward",
    "Recipe": "pretraining",
    "StepReport": "trainer",
    "StepScale": "loss",
    "Trainer": "trainer",
    "TrainerSettings": "trainer",
    "TrainingControl": "control",
    "adapt_megatron": "pretraining",
    "add_mimo_args": "arguments",
    "check_layout": "layouts",
    "dataset_provider": "pretraining",
    "forward_step": "script",
    "loss_func": "loss",
    "model_provider": "script",
    "pretrain": "pretraining",
    "read_step": "batches",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
