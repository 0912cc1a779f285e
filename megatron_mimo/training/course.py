"""Options of a `Trainer`'s optimizer, and the course of its learning rate."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mimo.model import MimoModel
from megatron_mimo.training.settings import TrainerSettings


def with_precision_of(
    model: MimoModel, optimizer: OptimizerConfig, ddp: DistributedDataParallelConfig
) -> OptimizerConfig:
    """The optimizer's options in the model's precision; its distributed form must be DDP's too."""
    if optimizer.use_distributed_optimizer != ddp.use_distributed_optimizer:
        raise ValueError(
            f"use_distributed_optimizer: the optimizer has {optimizer.use_distributed_optimizer}, DDP "
            f"{ddp.use_distributed_optimizer}. Give both the same."
        )
    if optimizer.lr is None:
        raise ValueError("OptimizerConfig.lr is None, expected a learning rate, such as 1e-4")
    config = model.config
    return replace(
        optimizer,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=config.params_dtype,
        min_lr=optimizer.min_lr or 0.0,  # Megatron's schedule computes with it
    )


def schedule_of(
    optimizer: MegatronOptimizer, config: OptimizerConfig, settings: TrainerSettings
) -> OptimizerParamScheduler:
    """The course of the learning rate, from the optimizer's options over the run's steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=settings.steps,
        lr_decay_style=settings.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run follows its own settings, as when it is to be longer than the checkpoint's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
