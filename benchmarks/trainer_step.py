"""A step of `Trainer` on `vlm_clip_1b`: reading, the schedule, the optimizer; launched kernel by kernel and replayed.

    python -m benchmarks.trainer_step             # CLIP ViT-L/14 at 336, 1.2 B, S 4096, on a GPU
    python -m benchmarks.trainer_step --small     # toy sizes, on the CPU too (without graphs)
    torchrun --nproc-per-node 2 -m benchmarks.trainer_step --tensor 2               # or --pipeline 2, --microbatches 4

Batches change from step to step; ranks beyond the axes that are named share data. On several GPUs the device is also
busy where it waits for another. Each step ends with the losses on the host, as every step of a `Trainer` does.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

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
        zeroing_ms: of it, setting the gradients to zero.
        losses: of the first steps.
    """

    name: str
    step_ms: float
    busy_ms: float
    zeroing_ms: float
    replayed: int
    losses: list[float]


def batches_of(size: Size) -> list[dict]:
    """Different microbatches on the CPU."""
    samples = recipe.RandomSamples(size.length, size.vocabulary, side=size.side)
    return [recipe.collate([samples[size.batch * i + j] for j in range(size.batch)]) for i in range(BATCHES)]


def models_of(run: Run, size: Size) -> MimoModelConfig:
    """The model, on the axes of a run."""
    layout, dtype = run.layout, torch.bfloat16 if run.device.type == "cuda" else torch.float32
    backend = specs.choose_backend("auto")
    axes = dict(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        sequence_parallel=layout.tensor_model_parallel_size > 1,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        pipeline_dtype=dtype,
        batch_p2p_sync=False,
    )
    language, images = configs(size, backend, dtype, axes)
    if layout.pipeline_model_parallel_size > 1:
        language.params["transformer_layer_spec"] = partial(_stage, backend)
    return MimoModelConfig(language, {"images": images}, {"images": recipe.IMAGE_TOKEN})


def _stage(
    backend: specs.Backend, config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> ModuleSpec:
    """Layers of a pipeline stage."""
    layers = specs.language_layer_spec(config, backend, vp_stage, pp_rank)
    return specs.with_fused_attention(layers) if backend == "torch" else layers


def measure(name: str, run: Run, size: Size, batches: Sequence[dict], steps: int, microbatches: int) -> Timed:
    """A trainer of its own, timed over `steps` steps of so many microbatches a rank."""
    on_gpu = run.device.type == "cuda"
    torch.manual_seed(1)
    trainer = Trainer(
        models_of(run, size),
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
        first = trainer.steps_done * microbatches
        given = [batches[(first + index) % BATCHES] for index in range(microbatches)]
        return trainer.train_step(lambda *_: given).losses["text"]

    def zero() -> None:
        for chunk in trainer.chunks:
            chunk.zero_grad_buffer()
        trainer.optimizer.zero_grad()

    losses = [step() for _ in range(UNTIMED)]
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(step())
        times.append(1e3 * (time.perf_counter() - started))
    busy = device_times(step, 3)[1] if on_gpu else 0.0
    zeroing = device_times(zero, 3)[1] if on_gpu else 0.0
    replayed = trainer.graphs.counts.replayed if trainer.graphs is not None else 0
    return Timed(name, statistics.median(times), busy, zeroing, replayed, losses)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the language model, in parameters")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--variants", nargs="+", default=None, help=f"some of {GRAPHED}, on a GPU")
    parser.add_argument("--out", type=Path, default=None, help="JSON with every figure")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks, with sequence parallelism")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--microbatches", type=int, default=1, help="of a rank in a step")
    options = parser.parse_args()
    begin = partial(megatron_mimo.initialize, options.tensor, options.pipeline, seed=1, graph_safe_rng=True)
    run = begin()
    speaks = run.rank == 0
    size = SMALL if options.small else SIZES[options.size]
    batches = batches_of(size)
    quiet, names = None, ["eager"]
    if run.device.type == "cuda":
        quiet, names = launches_a_second(), options.variants or GRAPHED
        device = f"{run.world_size} x {torch.cuda.get_device_name()}, {run.layout}"
        if speaks:
            print(f"{device}; the host launches {quiet / 1e3:.0f} k small kernels a second")
    results = []
    for name in names:
        megatron_mimo.shutdown()
        run = begin()  # the same weights, whatever was drawn before
        results.append(measure(name, run, size, batches, options.steps, options.microbatches))
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        timed = results[-1]
        if speaks:
            print(
                f"{name:16s} {timed.step_ms:8.1f} ms a step, device busy {timed.busy_ms:7.1f} ms, "
                f"zeroing {timed.zeroing_ms:.2f} ms, "
                f"{timed.replayed} replayed, last loss {timed.losses[-1]:.6f}",
                flush=True,
            )
    if options.out and speaks:
        figures = {"launches_a_second": quiet, "results": [vars(timed) for timed in results]}
        options.out.write_text(json.dumps(figures, indent=1))
    megatron_mimo.shutdown()


if __name__ == "__main__":
    main()
