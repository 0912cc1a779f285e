"""Trains two models on digits, one that reads, hears, draws and dials and one that draws with codes; reports both.

python -m examples.digits
python -m examples.digits --configuration codes
torchrun --nproc-per-node 2 -m examples.digits --tensor-parallel 2 --sequence-parallel
torchrun --nproc-per-node 2 -m examples.digits          # two data-parallel ranks, the same losses
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from examples.digits.data import Digits, code_batch, draw_samples, load_split, training_batch
from examples.digits.evaluate import evaluate_codes, evaluate_flow
from examples.digits.model import codes_config, flow_config
from examples.digits.report import write_report
from examples.digits.train import Trained, train
from examples.digits.vq import train_codec
from megatron_mimo import MimoModelConfig
from megatron_mimo.launch import Run, initialize, shutdown
from megatron_mimo.training.trainer import StepData

STEPS = {"flow": 800, "codes": 400}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples.digits", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--configuration",
        choices=(*STEPS, "both"),
        default="both",
        help="flow: reads, hears, draws and dials; codes: draws with codes of a VQ tokenizer trained first",
    )
    parser.add_argument("--steps", type=int, help=f"of each model; by default {STEPS}")
    parser.add_argument("--codec-steps", type=int, default=400, help="of the VQ tokenizer")
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
    digits, held_out = load_split()
    options.out.mkdir(parents=True, exist_ok=True)
    trained, results = {}, {}
    if options.configuration in ("flow", "both"):
        trained["flow"] = train_flow(options, run, digits)
        if not options.only_train:
            results["flow"] = evaluate_flow(trained["flow"], digits, held_out, seed=options.seed)
    if options.configuration in ("codes", "both"):
        trained["codes"] = train_codes(options, run, digits)
        if not options.only_train:
            results["codes"] = evaluate_codes(trained["codes"], digits, held_out, seed=options.seed)
    if run.rank == 0:
        losses = {name: model.losses for name, model in trained.items()}
        (options.out / "losses.json").write_text(json.dumps(losses))
        if results:
            write_report(options.out, losses, held_out, **results)
    shutdown()


def train_flow(options: argparse.Namespace, run: Run, digits: Digits) -> Trained:
    """The model that reads, hears, draws and dials."""

    def data(step: int, rank: int, size: int) -> list[dict]:
        samples = draw_samples(digits, options.batch_size, options.seed, step)
        return [training_batch(samples.part(rank, size))]

    return _train(flow_config, options, run, data, "flow")


def train_codes(options: argparse.Namespace, run: Run, digits: Digits) -> Trained:
    """A VQ tokenizer, and then the model that draws with its codes. The first rank trains it for all."""
    weights = options.out / "codec.pt"
    if run.rank == 0:
        train_codec(digits.images, steps=options.codec_steps, seed=options.seed).save(weights)
    dist.barrier()

    def data(step: int, rank: int, size: int) -> list[dict]:
        return [code_batch(digits, options.batch_size, options.seed, step, rank, size)]

    return _train(partial(codes_config, weights), options, run, data, "codes")


def _train(
    config: Callable[..., MimoModelConfig], options: argparse.Namespace, run: Run, data: StepData, name: str
) -> Trained:
    return train(
        config(tensor_parallel=options.tensor_parallel, sequence_parallel=options.sequence_parallel),
        run,
        data,
        steps=options.steps or STEPS[name],
        seed=options.seed,
        title=f"training {name}",
    )
