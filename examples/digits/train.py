"""Training of the demo: one plain loop over Megatron's data parallelism and optimizer."""

from collections.abc import Iterator, Mapping

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from examples.digits.data import Digits, draw_samples, training_batch
from megatron_mimo import LossTerm, MimoModel, global_counts, loss_terms, total_loss
from megatron_mimo.launch import Run

Losses = dict[str, float | None]


def train(
    model: MimoModel, run: Run, digits: Digits, *, steps: int, batch_size: int, seed: int
) -> Iterator[Losses]:
    """Trains `model`, giving after each step the loss of every term, None where nothing was counted.

    Args:
        batch_size: samples a step over all data-parallel ranks, which share them out.
        seed: of the samples; the same on every rank.
    """
    data_parallel = run.layout.data_parallel_size
    model = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(), model, pg_collection=run.groups
    )
    optimizer, schedule = build_optimizer(model, run, steps)
    model.train()
    for step in range(steps):
        samples = draw_samples(digits, batch_size, seed, step).part(run.data_rank, data_parallel)
        outputs, loss_mask = model(**training_batch(samples))
        terms = loss_terms(outputs, loss_mask)
        counts = global_counts(terms, run.groups.dp_cp)

        model.zero_grad_buffer()
        optimizer.zero_grad()
        total_loss(terms, counts=counts).backward()
        finalize_model_grads([model], pg_collection=run.groups)
        optimizer.step()
        schedule.step(increment=1)
        yield means(terms, counts, run)


def build_optimizer(model: DistributedDataParallel, run: Run, steps: int):
    """Megatron's AdamW, and its schedule: a short warm-up, then a cosine down to a fiftieth."""
    config = OptimizerConfig(
        optimizer="adam", lr=2e-3, min_lr=4e-5, adam_beta2=0.99, weight_decay=0.01, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(
        config, [model], pg_collection=run.groups, use_gloo_process_groups=False
    )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=min(100, steps // 2),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, schedule


def means(terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor], run: Run) -> Losses:
    """Every term's mean over the whole batch, on every rank."""
    sums = torch.stack([term.sum.detach() for term in terms.values()])
    torch.distributed.all_reduce(sums, group=run.groups.dp_cp)
    return {
        name: total / count if (count := counts[name].item()) else None
        for name, total in zip(terms, sums.tolist())
    }
