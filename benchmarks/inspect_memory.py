"""What `inspect` says that a training step takes, beside what it takes on a GPU.

    python -m benchmarks.inspect_memory                    # vlm_clip_1b, and 7 B with a frozen language model
    python -m benchmarks.inspect_memory --backend torch
    python -m benchmarks.inspect_memory --models 1b --recompute full
    python -m benchmarks.inspect_memory --small                        # toy sizes, the estimate alone without a GPU

`Trainer` takes three steps with Adam. Parameters, gradients and the optimizer's states are what their tensors take on
the device; activations are the peak without these, in forward and backward.
"""

from __future__ import annotations

import gc
import json
from argparse import ArgumentParser
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from benchmarks.step import SIZES, SMALL, Size, configs
from examples.recipes import vlm_clip_1b as recipe
from megatron_mimo import MimoModelConfig, specs
from megatron_mimo.axes import Layout
from megatron_mimo.launch import Run, pretended
from megatron_mimo.training import Trainer, TrainerSettings, TrainingControl
from megatron_mimo.training.footprint import Footprint, footprint

STEPS = 3
GIB = 2**30
#: Adam's states of 7 B do not fit beside it on one GPU: encoder and projection train.
FROZEN = {"7b": ("language_model",)}
PARTS = ("weights", "gradients", "optimizer", "activations", "peak")


def config_of(size: Size, backend: specs.Backend, recompute: str | None) -> MimoModelConfig:
    """The model of `benchmarks.step`."""
    language, images = configs(size, backend, torch.bfloat16)
    if recompute is not None:
        config = language.params["config"]
        whole = dict(recompute_method="uniform", recompute_num_layers=1) if recompute == "full" else {}
        language.params["config"] = replace(config, recompute_granularity=recompute, **whole)
    return MimoModelConfig(language, {"images": images}, {"images": recipe.IMAGE_TOKEN})


def estimated(name: str, size: Size, backend: specs.Backend, recompute: str | None) -> Footprint:
    """Without a GPU, and with layers of plain torch in place of the backend's."""
    with pretended(Layout(1)) as run:
        config = config_of(size, "torch", recompute)
        if backend == "transformer_engine":
            params = config.language_model.params
            params["transformer_layer_spec"] = specs.language_layer_spec(params["config"], "torch")
        control = TrainingControl(frozen=FROZEN.get(name, ()))
        return footprint(
            config, run, batch_of(size), control=control, backend=backend, fused_adam=fused_adam(), **options()
        )


def measured(name: str, run: Run, size: Size, backend: specs.Backend, recompute: str | None) -> dict[str, int]:
    """Bytes by part of three steps on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    batch = batch_of(size)
    trainer = Trainer(
        config_of(size, backend, recompute),
        run,
        TrainerSettings(steps=STEPS, progress=False, decay="constant"),
        control=TrainingControl(frozen=FROZEN.get(name, ())),
        **options(),
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train(lambda *_: [batch])
    peak = torch.cuda.max_memory_allocated() - before
    weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in trainer.models[0].parameters()}.values())
    buffers = (buffer for chunk in trainer.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers)
    gradients = sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers)
    trainer.optimizer.zero_grad()  # as the next step would begin: gradients in float32 are gone
    torch.cuda.synchronize()
    gc.collect()
    held = torch.cuda.memory_allocated() - before - weights - gradients
    parts = {"weights": weights, "gradients": gradients, "optimizer": held}
    return parts | {"activations": peak - sum(parts.values()), "peak": peak}


def fused_adam() -> bool:
    """Whether an Adam is here that Megatron takes before torch's."""
    return any(find_spec(name) is not None for name in ("transformer_engine", "apex"))


def options() -> dict:
    """Of optimizer and DDP, the same for both."""
    return {"optimizer": OptimizerConfig(lr=1e-5), "ddp": DistributedDataParallelConfig()}


def batch_of(size: Size) -> dict:
    samples = recipe.RandomSamples(size.length, size.vocabulary, side=size.side)
    return recipe.collate([samples[index] for index in range(size.batch)])


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--models", nargs="+", default=["1b", "7b"], choices=SIZES)
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "transformer_engine"])
    parser.add_argument("--recompute", choices=["selective", "full"])
    parser.add_argument("--out", type=Path, default=None, help="JSON with every figure")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    backend = specs.choose_backend(given.backend)
    # The estimates first: they take the process for one without a GPU.
    sizes = {"small": SMALL} if given.small else {name: SIZES[name] for name in given.models}
    figures: dict[str, dict] = {}
    for name, size in sizes.items():
        found = estimated(name, size, backend, given.recompute)
        figures[name] = {"estimated": {part: getattr(found, part) for part in PARTS} | {"stepping": found.stepping}}
    run = megatron_mimo.initialize(seed=1) if on_gpu else None
    device = torch.cuda.get_device_name() if on_gpu else "no GPU"
    print(f"{device}, torch {torch.__version__}, layers by {backend}, recomputation {given.recompute}, GiB")
    for name, size in sizes.items():
        taken = measured(name, run, size, backend, given.recompute) if run is not None else {}
        figures[name]["measured"] = taken
        for part in PARTS:
            told = figures[name]["estimated"][part]
            beside = f"  measured {taken[part] / GIB:8.3f}  ratio {told / max(taken[part], 1):.3f}" if taken else ""
            print(f"{name:6s} {part:12s} estimated {told / GIB:8.3f}{beside}")
        stepping = figures[name]["estimated"]["stepping"]
        print(f"{name:6s} the optimizer's step holds {stepping / GIB:.3f} besides, while there are no activations")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"device": device, "backend": backend, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
