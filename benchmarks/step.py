"""A training step of `vlm_clip_1b`, ours beside upstream's `megatron.core.models.mimo.MimoModel`.

    python -m benchmarks.step                     # CLIP ViT-L/14 at 336, 1.2 B, S 4096, on a GPU
    python -m benchmarks.step --small             # toy sizes, on the CPU too

Both models hold the very same modules, so weights, kernels and FLOPs are equal; what differs is what
lies between them. A step is forward, loss and backward; each ends with a wait for the device, as a step
of Megatron's does when it reads the gradient norm. Variants:

    upstream    upstream's MimoModel
    ours        ours, as it is
    graphed     ours, the encoder's launches replayed as CUDA graphs (TrainingControl.graphed)

Time of a stage is the sum of its kernels' own times from torch's profiler, by the stage in which the
host launched them: wall-clock differences would mislead, because the encoder's launches hide behind
whatever the device is still busy with.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import megatron_mimo
from examples.recipes import vlm_clip_1b as recipe
from examples.recipes.parts import with_fused_attention
from megatron_mimo import MimoModel, MimoModelConfig, loss_terms, specs, total_loss
from megatron_mimo.training.counts import count_batch
from megatron_mimo.training.flops import part_sizes, stated_peak, step_flops
from megatron_mimo.training.graphed import GraphedForward

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing upstream's model warns that it is experimental
    from megatron.core.models.mimo import MimoModel as UpstreamModel
    from megatron.core.models.mimo import MimoModelConfig as UpstreamConfig
    from megatron.core.models.mimo.submodules.vision import (
        VisionModalitySubmodules as UpstreamSubmodules,
    )

STAGES = ("encoder", "projection", "language model", "outside")


@dataclass(frozen=True)
class Size:
    """A language model, an encoder and a batch."""

    language: dict
    vision: dict
    vocabulary: int
    length: int
    side: int
    batch: int


FULL = Size(
    language=dict(num_layers=20, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16),
    vision=recipe.VISION,
    vocabulary=50304,
    length=4096,
    side=recipe.SIDE,
    batch=2,
)
SMALL = Size(
    language=dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4),
    vision=dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4),
    vocabulary=512,
    length=64,
    side=42,
    batch=2,
)


# Models ----------------------------------------------------------------------------------


def configs(size: Size, backend: specs.Backend, dtype: torch.dtype) -> tuple[ModuleSpec, ModuleSpec]:
    """Specs of the language model and of the images' submodules."""
    common = dict(
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    language = TransformerConfig(
        **size.language,
        **common,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        calculate_per_token_loss=True,
        apply_rope_fusion=backend == "transformer_engine",
    )
    vision = TransformerConfig(**size.vision, **common, activation_func=F.gelu)
    projection = TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.hidden_size,
        num_attention_heads=1,
        **common,
    )
    layers = specs.language_layer_spec(language, backend)
    if backend == "torch":
        layers = with_fused_attention(layers)
    images = recipe.image_spec(vision, projection, size.side)
    model = ModuleSpec(
        module=GPTModel,
        params=dict(
            config=language,
            transformer_layer_spec=layers,
            vocab_size=size.vocabulary,
            max_sequence_length=size.length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ),
    )
    return model, images


def build(size: Size, backend: specs.Backend, dtype: torch.dtype, device: torch.device):
    """Both models around the same modules."""
    language, images = configs(size, backend, dtype)
    tokens = {"images": recipe.IMAGE_TOKEN}
    ours = MimoModel(MimoModelConfig(language, {"images": images}, tokens)).to(device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = UpstreamModel(
            UpstreamConfig(language, {"images": ModuleSpec(UpstreamSubmodules, submodules={})}, tokens)
        )
    theirs.language_model = ours.language_model
    theirs.modality_submodules["images"].encoders = ours.modality_submodules["images"].encoders
    theirs.modality_submodules["images"].input_projections = ours.modality_submodules["images"].input_projections
    return ours, theirs


def loss_of_ours(model: MimoModel, batch: dict) -> Tensor:
    outputs, loss_mask = model(**batch)
    return total_loss(loss_terms(outputs, loss_mask))


def loss_of_theirs(model: UpstreamModel, batch: dict) -> Tensor:
    # Its encoder is called with the inputs' own names; positions are not optional.
    positions = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    inputs = {"images": {"clip": {"x": batch["modality_inputs"]["images"]["clip"]["images"]}}}
    loss, loss_mask = model(
        input_ids=batch["input_ids"],
        position_ids=positions.expand_as(batch["input_ids"]),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        modality_inputs=inputs,
    )
    return (loss.float() * loss_mask).sum() / loss_mask.sum()


# Measuring -------------------------------------------------------------------------------


def mark(stage: str) -> None:
    """Writes the time at which the host turns to a stage into the profile."""
    with torch.profiler.record_function(f"stage:{stage}"):
        pass


class Marks:
    """Marks the host's way through the stages, forward and backward, of modules that both models hold."""

    def __init__(self, model: MimoModel) -> None:
        images = model.modality_submodules["images"]
        self._handles = []
        self._around(images.encoders["clip"], "encoder")
        self._around(images.input_projections[0], "projection")
        self._handles.append(
            model.language_model.register_forward_pre_hook(self._enter_language_model, with_kwargs=True)
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _around(self, module: torch.nn.Module, stage: str) -> None:
        def leave(module, args, output) -> None:
            mark("outside")
            first = output[0] if isinstance(output, tuple) else output
            # Its gradient is there: what the host launches next is this module's backward.
            first.register_hook(lambda gradient: mark(stage))

        self._handles.append(module.register_forward_pre_hook(lambda module, args: mark(stage)))
        self._handles.append(module.register_forward_hook(leave))

    @staticmethod
    def _enter_language_model(module, args, keywords) -> None:
        keywords["decoder_input"].register_hook(lambda gradient: mark("outside"))
        mark("language model")


def kernel_times(step: Callable[[], object], marks: Callable[[], Marks], steps: int) -> dict[str, float]:
    """Milliseconds of kernels, copies and fills a step, by stage."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    hooks = marks()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            mark("outside")
            step()
    hooks.remove()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return {stage: us / 1e3 / steps for stage, us in _by_stage(events).items()}


def _by_stage(events: list[dict]) -> dict[str, float]:
    """Microseconds on the device by the stage in which the host launched them."""
    turns = sorted(
        (event["ts"], event["name"].removeprefix("stage:"))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("stage:")
    )
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    times = dict.fromkeys(STAGES, 0.0)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            at = launched[event["args"]["correlation"]]
            stage = max((turn for turn in turns if turn[0] <= at), default=(0, "outside"))[1]
            times[stage] += event["dur"]
    return times


@dataclass(frozen=True)
class Result:
    """What a variant took.

    Args:
        step_ms: median of the steps; `step_ms_p20`, `step_ms_p80`: of the distribution.
        kernels_ms: device time by stage.
        allocated_gib, reserved_gib: peaks of the allocator: what tensors held, and what it held.
        loss: of the first step.
    """

    name: str
    step_ms: float
    step_ms_p20: float
    step_ms_p80: float
    kernels_ms: dict[str, float]
    allocated_gib: float
    reserved_gib: float
    loss: float


def measure(
    name: str, model, loss_of: Callable, batch: dict, ours: MimoModel, steps: int, warmup: int
) -> Result:
    """Times `steps` steps of a model after `warmup`, then profiles a few."""
    on_gpu = batch["input_ids"].device.type == "cuda"
    losses = []

    def step() -> float:
        started = time.perf_counter()
        ours.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        mark("language model")
        loss.backward()
        losses.append(loss.detach())
        if on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started)

    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    for _ in range(warmup):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = sorted(step() for _ in range(steps))
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (0, 0)
    kernels = kernel_times(step, partial(Marks, ours), 3) if on_gpu else dict.fromkeys(STAGES, 0.0)
    p20, p80 = times[len(times) // 5], times[len(times) * 4 // 5]
    allocated, reserved = (size / 2**30 for size in peak)
    return Result(
        name, statistics.median(times), p20, p80, kernels, allocated, reserved, losses[0].item()
    )


# Report ----------------------------------------------------------------------------------


def table(results: list[Result], flops: dict[str, float], peak: float | None, tokens: int) -> list[str]:
    base = results[0]
    lines = [
        "variant     step ms (p20..p80)          x upstream  tokens/s    MFU   GiB alloc/reserved  "
        + "  ".join(f"{stage} ms" for stage in STAGES)
        + "  outside %"
    ]
    for result in results:
        mfu = sum(flops.values()) / (result.step_ms / 1e3) / peak if peak else float("nan")
        kernels = result.kernels_ms
        share = 100 * kernels["outside"] / result.step_ms
        spread = f"{result.step_ms:.1f} ({result.step_ms_p20:.1f}..{result.step_ms_p80:.1f})"
        lines.append(
            f"{result.name:11s} {spread:27s} {base.step_ms / result.step_ms:8.3f}   "
            f"{tokens / result.step_ms * 1e3:9.0f}  {100 * mfu:5.1f}   "
            f"{result.allocated_gib:6.2f} / {result.reserved_gib:6.2f}    "
            + "  ".join(f"{kernels[stage]:{len(stage) + 3}.2f}" for stage in STAGES)
            + f"  {share:8.2f}"
        )
    return lines


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "transformer_engine"])
    parser.add_argument("--variants", nargs="+", default=["upstream", "ours", "graphed"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="JSON with every figure")
    options = parser.parse_args()

    run = megatron_mimo.initialize(seed=1)
    on_gpu = run.device.type == "cuda"
    size = SMALL if options.small else FULL
    dtype = torch.bfloat16 if on_gpu else torch.float32
    backend = specs.choose_backend(options.backend)
    ours, theirs = build(size, backend, dtype, run.device)
    samples = recipe.RandomSamples(size.length, size.vocabulary, side=size.side)
    batch = recipe.collate([samples[index] for index in range(size.batch)])
    counts = count_batch(batch, ours)
    flops = step_flops(part_sizes([ours]), counts)
    batch = to_device(batch, run.device, dtype)

    encoder = ours.modality_submodules["images"].encoders["clip"]
    eager, results = encoder.forward, []
    for name in options.variants:
        encoder.forward = GraphedForward(encoder) if name == "graphed" else eager
        chosen = (theirs, loss_of_theirs) if name == "upstream" else (ours, loss_of_ours)
        results.append(measure(name, *chosen, batch, ours, options.steps, options.warmup))
        encoder.forward = eager

    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = stated_peak(device) if on_gpu else None
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{device}, torch {torch.__version__}, layers by {backend}, {dtype}, {parameters / 1e9:.2f} B parameters")
    print("FLOPs of a step (TFLOP):", {part: round(value / 1e12, 3) for part, value in flops.items()})
    print(f"stated peak: {peak / 1e12 if peak else 'unknown'} TFLOP/s")
    print(*table(results, flops, peak, size.batch * size.length), sep="\n")
    print("loss of the first step:", {result.name: result.loss for result in results})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {"device": device, "backend": backend, "flops": flops, "peak": peak, "size": asdict(size)}
        options.out.write_text(json.dumps(figures | {"results": [asdict(r) for r in results]}, indent=1))


def to_device(batch: dict, device: torch.device, dtype: torch.dtype) -> dict:
    """The batch on the device, images in the encoder's dtype."""
    images = batch["modality_inputs"]["images"]["clip"]["images"].to(device, dtype)
    moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    return moved | {"modality_inputs": {"images": {"clip": {"images": images}}}}


if __name__ == "__main__":
    sys.exit(main())
