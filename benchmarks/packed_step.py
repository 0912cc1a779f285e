"""A step of `Trainer` on packs whose samples begin elsewhere each time: Megatron's self attention, ours, and one graph.

    python -m benchmarks.packed_step                        # 1.2 B, packs of 4,096, on a GPU
    python -m benchmarks.packed_step --small                # toy sizes, on the CPU too (without graphs)

Megatron's self attention finds rotary angles by the boundaries of the samples, for which it waits in every layer; ours
is told them position by position. Text alone, samples of 64 to 2,200 tokens, half of whose labels count.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.attention import SelfAttention

import megatron_mimo
from benchmarks.kinds import device_times, launches_a_second
from benchmarks.step import FULL, SMALL, Size, configs
from examples.recipes import vlm_clip_1b as recipe
from megatron_mimo import MimoModelConfig, specs
from megatron_mimo.batch import Batch
from megatron_mimo.launch import Run
from megatron_mimo.segments import segmented
from megatron_mimo.training import StepGraphs, Trainer, TrainerSettings

PACKS = 8
UNTIMED = 12  # libraries start, kernels compile, every shape is captured
BACKENDS: list[specs.Backend] = ["transformer_engine", "torch"]
VARIANTS = ["megatron's", "ours", "graph"]


def pack_of(seed: int, length: int, vocabulary: int) -> Batch:
    """Drawn samples end to end, the last one cut."""
    draw = torch.Generator().manual_seed(seed)
    bounds = [0]
    while bounds[-1] < length:
        size = int(torch.randint(length // 64, length // 2 + 152, (), generator=draw))
        bounds.append(min(bounds[-1] + size, length))
    ids = torch.randint(0, vocabulary - 8, (1, length), generator=draw)
    mask = torch.zeros(1, length)
    mask[0, torch.randperm(length, generator=draw)[: length // 2]] = 1
    own = torch.tensor(bounds, dtype=torch.int32)
    return Batch(input_ids=ids, labels=ids.roll(-1, 1), loss_mask=mask, packed_seq_params=segmented(own))


def trainer_of(run: Run, size: Size, backend: specs.Backend, variant: str) -> Trainer:
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    changes = {"apply_rope_fusion": False} if variant == "megatron's" else {}
    language, images = configs(size, backend, dtype, changes)
    layers = specs.language_layer_spec(language.params["config"], backend)
    if variant == "megatron's":
        for layer in layers.submodules.layer_specs:
            layer.submodules.self_attention.module = SelfAttention
    language.params["transformer_layer_spec"] = layers
    torch.manual_seed(1)
    return Trainer(
        MimoModelConfig(language, {"images": images}, {"images": recipe.IMAGE_TOKEN}),
        run,
        TrainerSettings(steps=10_000, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=1e-6),
        graphs=StepGraphs() if variant == "graph" else None,
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=None, help="JSON with every figure")
    options = parser.parse_args()
    run = megatron_mimo.initialize(seed=1, graph_safe_rng=True)
    size, on_gpu = (SMALL if options.small else FULL), run.device.type == "cuda"
    packs = [pack_of(seed, size.length, size.vocabulary) for seed in range(PACKS)]
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}; {launches_a_second() / 1e3:.0f} k small kernels a second")
    results = []
    for backend in BACKENDS if on_gpu else ["torch"]:
        for variant in VARIANTS if on_gpu else VARIANTS[:2]:
            megatron_mimo.shutdown()
            run = megatron_mimo.initialize(seed=1, graph_safe_rng=True)
            trainer = trainer_of(run, size, backend, variant)

            def step(trainer: Trainer = trainer) -> float:
                return trainer.train_step(lambda *_: [packs[trainer.steps_done % PACKS]]).losses["text"]

            losses = [step() for _ in range(UNTIMED if on_gpu else 1)]
            times = []
            for _ in range(options.steps):
                started = time.perf_counter()
                losses.append(step())
                times.append(1e3 * (time.perf_counter() - started))
            busy = device_times(step, 2)[1] if on_gpu else 0.0
            counts = "" if trainer.graphs is None else str(trainer.graphs.counts)
            took = statistics.median(times)
            told = f"losses {losses[0]:.5f}, {losses[-1]:.5f} {counts}"
            print(f"{backend}, {variant}: {took:.1f} ms, busy {busy:.1f} ms, {told}", flush=True)
            results.append(dict(backend=backend, variant=variant, ms=took, busy_ms=busy, losses=losses, graphs=counts))
            del trainer, step
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    megatron_mimo.shutdown()


if __name__ == "__main__":
    main()
