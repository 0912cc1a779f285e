"""A training step of `vlm_clip_1b`, ours beside upstream's `megatron.core.models.mimo.MimoModel`.

    python -m benchmarks.step                     # CLIP ViT-L/14 at 336, 1.2 B, S 4096, on a GPU
    python -m benchmarks.step --small             # toy sizes, on the CPU too
    torchrun --nproc-per-node 2 -m benchmarks.step --size 7b --tensor 2       # each layer on two GPUs

Both models hold the very same modules, so weights, kernels and FLOPs are equal; what differs is what
lies between them; `layers` has modules of its own, of the same sizes. A step is forward, loss and backward;
each ends with a wait for the device, as a step of Megatron's does when it reads the gradient norm. Variants:

    upstream    upstream's MimoModel
    ours        ours, as it is
    everywhere  ours, the language loss at every position
    compiled    ours, the encoder through torch.compile (TrainingControl.compiled)
    graphed     ours, the encoder's launches replayed as CUDA graphs (TrainingControl.graphed)
    both        ours, the compiled encoder's launches replayed
    whole       ours, forward, loss and backward as one CUDA graph (Trainer(graphs=StepGraphs()))
    best        the same with the compiled encoder
    layers      ours built of plain torch, one CUDA graph, the encoder and the language model's layers compiled

Variants take turns of a few steps, so that a drift of the machine meets all of them; device time by stage
comes from `benchmarks.stages`, by kind of kernel from `benchmarks.kinds`. A ratio to upstream says as much about the
host as about the code: what it launches in a second is measured first. The MFU counts the operations that are needed,
logits where a label counts, for every variant alike; of every GPU's peak, where there are several.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import megatron_mimo
from benchmarks.kinds import device_times, launches_a_second
from benchmarks.stages import STAGES, Marks, kernel_times, mark
from examples.recipes import vlm_clip_1b as recipe
from megatron_mimo import MimoModel, MimoModelConfig, loss_terms, specs, total_loss
from megatron_mimo.launch import Run
from megatron_mimo.training.parts.captured import Captures
from megatron_mimo.training.parts.compiled import CompiledForward, compile_layers
from megatron_mimo.training.parts.graphed import GraphedForward
from megatron_mimo.training.speed.counts import count_batch
from megatron_mimo.training.speed.flops import part_sizes, stated_peak, step_flops

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing upstream's model warns that it is experimental
    from megatron.core.models.mimo import MimoModel as UpstreamModel
    from megatron.core.models.mimo import MimoModelConfig as UpstreamConfig
    from megatron.core.models.mimo.submodules.vision import (
        VisionModalitySubmodules as UpstreamSubmodules,
    )

STEPS_A_TURN = 5
WHOLE = ["whole", "best", "layers"]
ON_GPU = ["compiled", "graphed", "both", *WHOLE]
VARIANTS = ["ours", "everywhere", *ON_GPU]
PLAIN = [name for name in VARIANTS if name != "layers"]


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
THREE_B = replace(
    FULL,
    language=dict(num_layers=28, hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24),
    batch=1,
)
SEVEN_B = replace(
    FULL,
    language=dict(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32),
    batch=1,
)
SMALL = Size(
    language=dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4),
    vision=dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4),
    vocabulary=512,
    length=64,
    side=42,
    batch=2,
)


SIZES = {"1b": FULL, "3b": THREE_B, "7b": SEVEN_B}

# Models ----------------------------------------------------------------------------------


def configs(
    size: Size, backend: specs.Backend, dtype: torch.dtype, changes: Mapping[str, Any] | None = None
) -> tuple[ModuleSpec, ModuleSpec]:
    """Specs of the language model, its configuration with `changes`, and of the images' submodules."""
    common = dict(
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    settings = dict(
        **size.language,
        **common,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        calculate_per_token_loss=True,
        apply_rope_fusion=backend == "transformer_engine",
        bias_activation_fusion=True,  # as Megatron's arguments have it
    )
    language = TransformerConfig(**settings | dict(changes or {}))
    common["tensor_model_parallel_size"] = language.tensor_model_parallel_size
    vision = TransformerConfig(**size.vision, **common, activation_func=F.gelu)
    projection = TransformerConfig(
        num_layers=1,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.hidden_size,
        num_attention_heads=language.tensor_model_parallel_size,  # of none, but it has to be a multiple
        **common,
    )
    layers = specs.language_layer_spec(language, backend)
    if backend == "torch":
        layers = specs.with_fused_attention(layers)
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


def build(
    size: Size,
    backend: specs.Backend,
    dtype: torch.dtype,
    device: torch.device,
    changes: Mapping[str, Any] | None = None,
):
    """Both models around the same modules; `changes` of the language model's configuration."""
    language, images = configs(size, backend, dtype, changes)
    if language.params["config"].sequence_parallel:
        language.params["scatter_embedding_sequence_parallel"] = False  # upstream's asks for it; ours does without
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


@dataclass(frozen=True)
class Variant:
    """A model and how its encoder runs.

    Args:
        modules: what it is made of, whose gradients a step makes.
        loss: runs the model on the batch.
        make_forward: makes what the encoder's `forward` is meanwhile; holds what it captured.
        captures: where the whole step is captured; None where it is launched kernel by kernel.
    """

    name: str
    modules: MimoModel
    loss: Callable[[], Tensor]
    make_forward: Callable[[], Callable]
    captures: Captures | None = None


def encoder_of(model: MimoModel) -> torch.nn.Module:
    return model.modality_submodules["images"].encoders["clip"]


class Steps:
    """Runs single training steps of variants."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu

    def step(self, variant: Variant, forward: Callable) -> tuple[float, Tensor, float]:
        """Milliseconds of one step, to the end of its work on the device, its loss, and milliseconds of the host."""
        encoder = encoder_of(variant.modules)
        encoder.forward = forward
        started = time.perf_counter()
        run = partial(self._passes, variant)
        captures, name = variant.captures, variant.name
        loss = run(()) if captures is None else captures(name, (), run, captures.ready(name))
        launched = time.perf_counter()
        self.wait()
        ended = time.perf_counter()
        del encoder.forward
        return 1e3 * (ended - started), loss, 1e3 * (launched - started)

    def _passes(self, variant: Variant, inputs: Sequence[Tensor]) -> Tensor:
        variant.modules.zero_grad(set_to_none=True)
        loss = variant.loss()
        mark("language model")
        loss.backward()
        return loss.detach()

    def wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def peaks(self, variant: Variant, warmup: int) -> tuple[float, float, float]:
        """Peaks of the allocator in GiB, of tensors and of all it holds, from a clean start; and the first loss."""
        variant.modules.zero_grad(set_to_none=True)
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        forward = variant.make_forward()
        first = self.step(variant, forward)[1].item()
        for _ in range(warmup - 1):
            self.step(variant, forward)
        if not self._on_gpu:
            return 0.0, 0.0, first
        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30, first


@dataclass(frozen=True)
class Result:
    """What a variant took.

    Args:
        step_ms: median of the steps; `step_ms_p20`, `step_ms_p80`: of the distribution.
        host_ms: median of what the host took to launch a step.
        kernels_ms: device time by stage.
        kinds_ms: device time by kind of kernel; `busy_ms`: time in which the device does anything; `kernels`: how many.
        allocated_gib, reserved_gib: peaks of the allocator: what tensors held, and what it held.
        loss: of the first step.
    """

    name: str
    step_ms: float
    step_ms_p20: float
    step_ms_p80: float
    host_ms: float
    kernels_ms: dict[str, float]
    kinds_ms: dict[str, float]
    busy_ms: float
    kernels: float
    allocated_gib: float
    reserved_gib: float
    loss: float


def measure(variants: list[Variant], steps: Steps, marks: Mapping[str, Marks], rounds: int, warmup: int, on_gpu: bool):
    """Results of the variants, whose turns take `STEPS_A_TURN` steps each: a drift of the machine meets all of them."""
    peaks = {variant.name: steps.peaks(variant, warmup) for variant in variants}
    step = {variant.name: partial(steps.step, variant, variant.make_forward()) for variant in variants}
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    hosts: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for name in [variant.name for variant in variants] * (rounds + 1):
        step[name]()  # finds the allocator as its own steps leave it, and captures in the first turn
        turn = [step[name]() for _ in range(STEPS_A_TURN)]
        times[name] += [milliseconds for milliseconds, _, _ in turn]
        hosts[name] += [host for _, _, host in turn]
    results = []
    for variant in variants:
        kernels, kinds = dict.fromkeys(STAGES, 0.0), ({}, 0.0, 0.0)
        if on_gpu:
            kinds = device_times(step[variant.name], 3)
        if on_gpu and variant.captures is None:  # a replay passes no stage
            with marks[variant.name]:
                kernels = kernel_times(step[variant.name], 3)
        ordered = sorted(times[variant.name][STEPS_A_TURN:])  # without the first turn
        p20, p80 = ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5]
        median = statistics.median(ordered)
        host = statistics.median(hosts[variant.name][STEPS_A_TURN:])
        results.append(Result(variant.name, median, p20, p80, host, kernels, *kinds, *peaks[variant.name]))
    return results


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


def kinds_table(results: list[Result]) -> list[str]:
    """Device time of a step by kind of kernel, how long the device waits, and what the host took."""
    kinds = sorted({kind for result in results for kind in result.kinds_ms}, key=lambda kind: -_most(kind, results))
    lines = ["variant     busy ms  idle %  host ms  kernels  " + "  ".join(f"{kind:>11s}" for kind in kinds)]
    for result in results:
        idle = 100 * max(0.0, 1 - result.busy_ms / result.step_ms)
        lines.append(
            f"{result.name:11s} {result.busy_ms:7.1f}  {idle:6.1f}  {result.host_ms:7.1f}  {result.kernels:7.0f}  "
            + "  ".join(f"{result.kinds_ms.get(kind, 0.0):11.2f}" for kind in kinds)
        )
    return lines


def _most(kind: str, results: list[Result]) -> float:
    return max(result.kinds_ms.get(kind, 0.0) for result in results)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the language model, in parameters")
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "transformer_engine"])
    parser.add_argument("--variants", nargs="*", default=PLAIN, choices=VARIANTS, help="beside upstream's")
    parser.add_argument("--length", type=int, default=None, help="of the sequences; the size's own where left out")
    parser.add_argument("--recompute", action="store_true", help="every layer's activations, in the backward pass")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks, with sequence parallelism")
    parser.add_argument("--alone", action="store_true", help="without upstream's")
    parser.add_argument("--rounds", type=int, default=8, help=f"turns of each variant, of {STEPS_A_TURN} steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="JSON with every figure")
    options = parser.parse_args()

    run = megatron_mimo.initialize(options.tensor, seed=1, graph_safe_rng=True)
    if run.world_size != options.tensor:
        parser.error(f"{run.world_size} ranks, of which --tensor {options.tensor} take part")
    on_gpu = run.device.type == "cuda"
    quiet = launches_a_second() if on_gpu else None
    size = SMALL if options.small else SIZES[options.size]
    size = replace(size, length=options.length or size.length)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    backend = specs.choose_backend(options.backend)
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    changes: dict[str, Any] = recompute if options.recompute else {}
    if run.world_size > 1:
        changes |= dict(tensor_model_parallel_size=options.tensor, sequence_parallel=True)
    samples = recipe.RandomSamples(size.length, size.vocabulary, side=size.side)
    batch = recipe.collate([samples[index] for index in range(size.batch)])
    captures: Captures | None = Captures(len(WHOLE), 3, run.device) if on_gpu else None
    chosen = [name for name in options.variants if on_gpu or name not in ON_GPU]
    variants = []
    if chosen != ["layers"] or not options.alone:
        ours, theirs = build(size, backend, dtype, run.device, changes)
        device_batch = to_device(batch, run.device, dtype)
        if not options.alone:
            variants.append(Variant("upstream", ours, partial(loss_of_theirs, theirs, device_batch), as_it_is(ours)))
        variants += [variant(name, ours, batch, captures) for name in chosen if name != "layers"]
    if "layers" in chosen:
        ours = build(size, "torch", dtype, run.device, changes)[0]
        compile_layers(ours.language_model)
        variants.append(variant("layers", ours, batch, captures))
    flops = step_flops(part_sizes([ours]), count_batch(batch, ours))
    marks = {each.name: Marks(each.modules, "images", "clip") for each in variants}
    results = measure(variants, Steps(on_gpu), marks, options.rounds, options.warmup, on_gpu)
    if run.rank == 0:
        report(options, run, size, backend, ours, flops, quiet, results)
    megatron_mimo.shutdown()


def report(
    options: Namespace,
    run: Run,
    size: Size,
    backend: specs.Backend,
    ours: MimoModel,
    flops: dict[str, float],
    quiet: float | None,
    results: list[Result],
) -> None:
    """Prints the tables, and writes the figures to `options.out`."""
    on_gpu, name, peak = run.device.type == "cuda", "CPU", None
    if on_gpu:
        name = torch.cuda.get_device_name()
        peak = stated_peak(name)
    device = name if run.world_size == 1 else f"{run.world_size} x {name}"
    peak = peak and peak * run.world_size
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    dtype = next(ours.parameters()).dtype
    each = "" if run.world_size == 1 else " a rank"
    print(
        f"{device}, torch {torch.__version__}, layers by {backend}, {dtype}, {parameters / 1e9:.2f} B parameters{each}"
    )
    if quiet is not None:
        print(f"the host launches {quiet / 1e3:.0f} k small kernels a second")
    print("FLOPs that a step needs (TFLOP):", {part: round(value / 1e12, 3) for part, value in flops.items()})
    print(f"stated peak: {peak / 1e12 if peak else 'unknown'} TFLOP/s")
    print(*table(results, flops, peak, size.batch * size.length), sep="\n")
    if on_gpu:
        print(*kinds_table(results), sep="\n")
    print("loss of the first step:", {result.name: result.loss for result in results}, flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "device": device,
            "launches_a_second": quiet,
            "backend": backend,
            "flops": flops,
            "peak": peak,
            "size": asdict(size),
        }
        options.out.write_text(json.dumps(figures | {"results": [asdict(r) for r in results]}, indent=1))


def as_it_is(model: MimoModel) -> Callable[[], Callable]:
    encoder = encoder_of(model)
    return lambda: encoder.forward


def variant(name: str, model: MimoModel, batch: dict, captures: Captures | None) -> Variant:
    """One of ours, see the top of this file."""
    device, dtype = (getattr(next(model.parameters()), what) for what in ("device", "dtype"))
    encoder = encoder_of(model)
    compiled = partial(CompiledForward, encoder, dynamic=False)
    forwards = {
        "compiled": compiled,
        "graphed": partial(GraphedForward, encoder),
        "both": partial(GraphedForward, encoder, compiled=True),
        "best": compiled,
        "layers": compiled,
    }
    moved = to_device(batch, device, dtype)
    if name == "everywhere":  # the language loss at every position, as upstream's
        moved |= {"placement": model.place(batch["input_ids"]).to(device)}
    else:
        moved = placed_on(model, batch, moved, device)
    return Variant(
        name,
        model,
        partial(loss_of_ours, model, moved),
        forwards.get(name, as_it_is(model)),
        captures if name in WHOLE else None,
    )


def placed_on(model: MimoModel, batch: dict, moved: dict, device: torch.device) -> dict:
    """`moved`, the batch on the device, with the placement that the reader of batches makes on the CPU."""
    counting = model.place(batch["input_ids"]).bound().counting(batch["loss_mask"])  # training/reading.py
    counting = model.settle({**batch, "placement": counting}) or counting
    return moved | {"placement": counting.to(device)}


def to_device(batch: dict, device: torch.device, dtype: torch.dtype) -> dict:
    """The batch on the device, images in the encoder's dtype."""
    images = batch["modality_inputs"]["images"]["clip"]["images"].to(device, dtype)
    moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    return moved | {"modality_inputs": {"images": {"clip": {"images": images}}}}


if __name__ == "__main__":
    sys.exit(main())
