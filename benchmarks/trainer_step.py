"""A step of `Trainer` on `vlm_clip_1b`: reading, the schedule, the optimizer; launched kernel by kernel and replayed.

    python -m benchmarks.trainer_step             # CLIP ViT-L/14 at 336, 1.2 B, S 4096, on a GPU
    python -m benchmarks.trainer_step --small     # toy sizes, on the CPU too (without graphs)

Batches change from step to step. Each step ends with the losses on the host, as every step of a `Trainer` does.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from benchmarks.kinds import device_times, launches_a_second
from benchmarks.step import SIZES, SMALL, Size, configs
from examples.recipes import vlm_clip_1b as recipe
from megatron_mimo import MimoModelConfig, specs
from megatron_mimo.launch import Run
from megatron_mimo.training import StepGraphs, Trainer, TrainerSettings, TrainingControl

BATCHES = 4
GRAPHED = ["eager", "eager, compiled", "graph", "graph, compiled", "graph, compiled, fused"]
UNTIMED = 5  # libraries start, kernels compile, the step is captured


@dataclass(frozen=True)
class Timed:
    """What a variant took.

    Args:
        step_ms: median; `busy_ms`: time in which the device does anything; `replayed`: steps by a graph.
        losses: of the first steps.
    """

    name: str
    step_ms: float
    busy_ms: float
    replayed: int
    losses: list[float]


def batches_of(size: Size) -> list[dict]:
    """Different microbatches on the CPU."""
    samples = recipe.RandomSamples(size.length, size.vocabulary, side=size.side)
    return [recipe.collate([samples[size.batch * i + j] for j in range(size.batch)]) for i in range(BATCHES)]


def measure(name: str, run: Run, size: Size, batches: Sequence[dict], steps: int) -> Timed:
    """A trainer of its own, timed over `steps` steps."""
    on_gpu = run.device.type == "cuda"
    language, images = configs(size, specs.choose_backend("auto"), torch.bfloat16 if on_gpu else torch.float32)
    torch.manual_seed(1)
    trainer = Trainer(
        MimoModelConfig(language, {"images": images}, {"images": recipe.IMAGE_TOKEN}),
        run,
        TrainerSettings(steps=10_000, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=1e-4),
        control=TrainingControl(compiled=["encoders"]) if "compiled" in name else None,
        graphs=StepGraphs() if "graph" in name else None,
    )
    if "fused" in name:  # TransformerEngine's layers add to the float32 gradients themselves
        for module in trainer.models[0].language_model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True

    def step() -> float:
        index = trainer.steps_done
        return trainer.train_step(lambda *_: [batches[index % BATCHES]]).losses["text"]

    losses = [step() for _ in range(UNTIMED)]
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(step())
        times.append(1e3 * (time.perf_counter() - started))
    busy = device_times(step, 3)[1] if on_gpu else 0.0
    replayed = trainer.graphs.counts.replayed if trainer.graphs is not None else 0
    return Timed(name, statistics.median(times), busy, replayed, losses)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--variants", nargs="+", default=None, help=f"some of {GRAPHED}, on a GPU")
    parser.add_argument("--out", type=Path, default=None, help="JSON with every figure")
    options = parser.parse_args()
    run = megatron_mimo.initialize(seed=1, graph_safe_rng=True)
    size = SMALL if options.small else SIZES["1b"]
    batches = batches_of(size)
    quiet, names = None, ["eager"]
    if run.device.type == "cuda":
        quiet, names = launches_a_second(), options.variants or GRAPHED
        print(f"{torch.cuda.get_device_name()}; the host launches {quiet / 1e3:.0f} k small kernels a second")
    results = []
    for name in names:
        results.append(measure(name, run, size, batches, options.steps))
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        timed = results[-1]
        print(
            f"{name:16s} {timed.step_ms:8.1f} ms a step, device busy {timed.busy_ms:7.1f} ms, "
            f"{timed.replayed} replayed, last loss {timed.losses[-1]:.6f}"
        )
    if options.out:
        figures = {"launches_a_second": quiet, "results": [vars(timed) for timed in results]}
        options.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
