"""Trains one model to read, hear, draw and dial, and reports how well it does.

    python -m examples.digits
    torchrun --nproc-per-node 2 -m examples.digits --tensor-parallel 2 --sequence-parallel
    torchrun --nproc-per-node 2 -m examples.digits          # two data-parallel ranks, the same losses
"""

import argparse
import json
import time
from pathlib import Path

import torch
from megatron.core.optimizer import OptimizerConfig
from tqdm import tqdm

from examples.digits.data import draw_samples, load_split, training_batch
from examples.digits.evaluate import evaluate
from examples.digits.model import digits_config
from examples.digits.report import write_report
from megatron_mimo.launch import exit_on_error, initialize, shutdown
from megatron_mimo.training import Trainer, TrainerSettings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=64, help="samples a step, over all ranks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--only-train", action="store_true", help="write losses.json and no report")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates and writes losses.json, metrics.json and report.html to `--out`."""
    options = parse_arguments(arguments)
    # A second thread makes a step of matrices this small 0.25 core seconds instead of 0.18, and beside another
    # busy process seconds, because threads then wait for each other at every operation.
    torch.set_num_threads(1)
    run = initialize(tensor_model_parallel_size=options.tensor_parallel, seed=options.seed)
    train, held_out = load_split()

    def data(step: int, rank: int, size: int) -> list[dict]:
        samples = draw_samples(train, options.batch_size, options.seed, step)
        return [training_batch(samples.part(rank, size))]

    trainer = Trainer(
        digits_config(
            tensor_parallel=options.tensor_parallel, sequence_parallel=options.sequence_parallel
        ),
        run,
        TrainerSettings(steps=options.steps, warmup_steps=min(100, options.steps - 1), seed=options.seed),
        optimizer=OptimizerConfig(lr=2e-3, min_lr=4e-5, adam_beta2=0.99, weight_decay=0.01, clip_grad=1.0),
    )
    started = time.perf_counter()
    losses = []
    with exit_on_error(), tqdm(total=options.steps, desc="training", disable=run.rank > 0) as progress:
        for _ in range(options.steps):
            losses.append(trainer.train_step(data).losses)
            told = "  ".join(f"{name} {loss:.3f}" for name, loss in losses[-1].items())
            progress.set_postfix_str(told, refresh=False)
            progress.update()
    train_seconds = time.perf_counter() - started
    if run.rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "losses.json").write_text(json.dumps(losses))
    if not options.only_train:
        results = evaluate(trainer.models[0], train, held_out, seed=options.seed)
        results.figures["train_seconds"] = round(train_seconds, 1)
        if run.rank == 0:
            write_report(options.out, results, losses, held_out)
    shutdown()

