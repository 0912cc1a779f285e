"""fp8 in the language model beside bf16: losses of 200 steps on data that can be learned, and step times.

    python -m benchmarks.fp8                       # both, on a GPU with TransformerEngine
    python -m benchmarks.fp8 --only train          # losses alone
    python -m benchmarks.fp8 --only steps          # times alone
    python -m benchmarks.fp8 --small               # toy sizes, on the CPU too (there without fp8)

**Losses.** bf16 with three seeds, each with weights and samples of its own, and every fp8 recipe with the first.
A sample's image says which of eight permutations its tokens follow, nine times in ten. fp8 holds where each of its
first 20 steps is within 1 % of bf16's loss with the same seed, and the mean of its last 20 lies between the lowest
and the highest of the three seeds.

**Times.** Forward, loss and backward without an optimizer, launched kernel by kernel and as one CUDA graph, which is
what counts: fp8 launches half as many kernels again. Weights are made fp8 in each step, as in the first microbatch of a
training step.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

import megatron_mimo
from benchmarks.kinds import device_times, launches_a_second
from benchmarks.step import SIZES, SMALL, Size, build, loss_of_ours, placed_on, to_device
from examples.recipes import vlm_clip_1b as recipe
from megatron_mimo import MimoModelConfig, VisionModalitySubmodules, specs
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.parts.captured import Captures
from megatron_mimo.training.speed.counts import count_batch
from megatron_mimo.training.speed.flops import part_sizes, stated_peak, step_flops

RECIPES = ("delayed", "tensorwise", "blockwise")
SEEDS = (1, 2, 3)
FIRST, LAST, WITHIN = 20, 20, 0.01
IMAGE_TOKEN, IMAGE_ROWS, PIXELS = -200, 8, 32
RULES = 8
ASKED = 1.25  # times bf16's speed


@dataclass(frozen=True)
class Learned:
    """A language model, and microbatches that it can learn from."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    length: int
    batch: int


FULL = Learned(layers=10, hidden=1024, ffn=2816, heads=8, vocabulary=512, length=512, batch=16)
TOY = Learned(layers=2, hidden=64, ffn=128, heads=4, vocabulary=32, length=32, batch=4)


class Pixels(nn.Module):
    """`[n, IMAGE_ROWS, PIXELS]` -> `[n, IMAGE_ROWS, width]`, in the run's precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(PIXELS, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype))


def config_of(shape: Learned, backend: specs.Backend, dtype: torch.dtype, **changes) -> MimoModelConfig:
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        **changes,
    )
    language = ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config,
            transformer_layer_spec=specs.language_layer_spec(config, backend),
            vocab_size=shape.vocabulary,
            max_sequence_length=shape.length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ),
    )
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={"encoders": {"pixels": ModuleSpec(module=Pixels, params={"width": shape.hidden})}},
    )
    return MimoModelConfig(language, {"images": images}, {"images": IMAGE_TOKEN})


def microbatch(shape: Learned, seed: int, step: int) -> dict:
    """Samples of a step: which permutation they follow is in their images alone."""
    tables = torch.stack(
        [torch.randperm(shape.vocabulary, generator=torch.Generator().manual_seed(r)) for r in range(RULES)]
    )
    draw = torch.Generator().manual_seed(1_000_003 * seed + step)
    rules = torch.randint(RULES, (shape.batch,), generator=draw)
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=draw)
    follows = torch.rand(shape.batch, shape.length, generator=draw) < 0.9
    for place in range(IMAGE_ROWS + 1, shape.length):
        ids[:, place] = torch.where(follows[:, place], tables[rules, ids[:, place - 1]], ids[:, place])
    labels = ids.roll(-1, 1)
    mask = torch.ones(ids.shape)
    mask[:, :IMAGE_ROWS] = 0
    mask[:, -1] = 0
    ids[:, :IMAGE_ROWS] = IMAGE_TOKEN
    pixels = F.one_hot(rules, PIXELS).float()[:, None] + 0.1 * torch.randn(
        shape.batch, IMAGE_ROWS, PIXELS, generator=draw
    )
    inputs = {"images": {"pixels": {"x": pixels}}}
    return dict(input_ids=ids, labels=labels, loss_mask=mask, modality_inputs=inputs)


def train(shape: Learned, seed: int, steps: int, fp8_recipe: str | None = None, moved: float = 0.0) -> dict:
    """Losses of a run from the seed's weights, moved by a relative part of them, on the seed's samples."""
    megatron_mimo.shutdown()
    run = megatron_mimo.initialize(seed=seed)
    on_gpu = run.device.type == "cuda"
    backend, dtype = specs.choose_backend("auto"), torch.bfloat16 if on_gpu else torch.float32
    fp8 = {} if fp8_recipe is None else {"fp8": "hybrid", "fp8_recipe": fp8_recipe}
    trainer = Trainer(
        config_of(shape, backend, dtype, **fp8),
        run,
        TrainerSettings(steps=steps, warmup_steps=max(steps // 4, 1), decay="cosine", progress=False),
        optimizer=OptimizerConfig(lr=3e-4, weight_decay=0.1, clip_grad=1.0),
    )
    if moved:
        with torch.no_grad():
            for parameter in trainer.models[0].parameters():
                parameter.mul_(1 + moved * torch.randn_like(parameter))
        trainer.optimizer.reload_model_params()
    batches = [microbatch(shape, seed, step) for step in range(steps)]
    started = time.perf_counter()
    losses = [trainer.train_step(lambda step, *_: [batches[step]]).losses["text"] for _ in range(steps)]
    spent = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in trainer.models[0].parameters())
    return {"seed": seed, "fp8_recipe": fp8_recipe, "parameters": parameters, "seconds": spent, "losses": losses}


def verdict(losses: Sequence[float], same_seed: Sequence[float], seeds: Sequence[Sequence[float]]) -> dict:
    """Whether a run's losses are those of another precision, and by how much they are not.

    Args:
        losses: of the run, a step.
        same_seed: of the other precision with its seed.
        seeds: of the other precision with each seed.

    Example:
        >>> found = verdict([4.0, 2.0], [4.02, 2.0], [[4.02, 2.0], [4.1, 1.9], [4.0, 2.1]])
        >>> found["holds"], round(found["first_apart"], 4)
        (True, 0.005)
        >>> verdict([4.0, 2.2], [4.02, 2.2], [[4.02, 2.0], [4.1, 1.9], [4.0, 2.1]])["holds"]
        False
    """
    first, last = min(FIRST, len(losses) // 2), min(LAST, len(losses) // 2)
    apart = max(abs(one - other) / other for one, other in zip(losses[:first], same_seed[:first]))
    ends = [statistics.fmean(each[-last:]) for each in seeds]
    end = statistics.fmean(losses[-last:])
    inside = min(ends) <= end <= max(ends)
    return {
        "first_apart": apart,
        "end": end,
        "ends_of_seeds": ends,
        "inside": inside,
        "holds": apart <= WITHIN and inside,
    }


def compare_losses(shape: Learned, steps: int, recipes: Sequence[str]) -> dict:
    runs = []
    for seed in SEEDS:
        runs.append(train(shape, seed, steps))
        _free(torch.cuda.is_available())
    plain = [run["losses"] for run in runs]
    print(
        f"{runs[0]['parameters'] / 1e6:.0f} M parameters, {steps} steps; bf16 by seed, mean of the last {LAST} steps:"
    )
    for run in runs:
        print(f"  seed {run['seed']}: first {run['losses'][0]:.4f}, last {statistics.fmean(run['losses'][-LAST:]):.4f}")
    # What rounding alone does to the first steps: weights of the first seed, each moved by as much as bf16 rounds.
    runs.append(train(shape, SEEDS[0], steps, moved=2.0**-9))
    apart = verdict(runs[-1]["losses"], plain[0], plain)["first_apart"]
    print(f"  seed {SEEDS[0]}, weights moved by 2 ** -9 of them: first {FIRST} steps at most {100 * apart:.2f} % apart")
    _free(torch.cuda.is_available())
    verdicts = {}
    for name in recipes:
        runs.append(train(shape, SEEDS[0], steps, name))
        _free(torch.cuda.is_available())
        found = verdicts[name] = verdict(runs[-1]["losses"], plain[0], plain)
        inside = "inside" if found["inside"] else "OUTSIDE"
        print(
            f"  fp8 {name}: first {FIRST} steps at most {100 * found['first_apart']:.2f} % from bf16's (1 asked), last "
            f"{found['end']:.4f}, {inside} {min(found['ends_of_seeds']):.4f} to {max(found['ends_of_seeds']):.4f}: "
            f"{'holds' if found['holds'] else 'DOES NOT HOLD'}"
        )
    return {"runs": runs, "verdicts": verdicts}


def time_of(size: Size, name: str, steps: int, **changes) -> dict:
    """Milliseconds of a step of a model that is built for it, its loss and its peak of memory."""
    megatron_mimo.shutdown()
    run = megatron_mimo.initialize(seed=1, graph_safe_rng=True)
    on_gpu = run.device.type == "cuda"
    dtype, backend = torch.bfloat16 if on_gpu else torch.float32, specs.choose_backend("auto")
    model, _ = build(size, backend, dtype, run.device, changes)
    samples = recipe.RandomSamples(size.length, size.vocabulary, side=size.side)
    batch = recipe.collate([samples[index] for index in range(size.batch)])
    flops = sum(step_flops(part_sizes([model]), count_batch(batch, model)).values())
    given = placed_on(model, batch, to_device(batch, run.device, dtype), run.device)

    def passes(inputs: Sequence[Tensor]) -> Tensor:
        model.zero_grad(set_to_none=True)
        model.set_is_first_microbatch()
        loss = loss_of_ours(model, given)
        loss.backward()
        return loss.detach()

    def step() -> float:
        return passes(()).item()

    captures: Captures | None = Captures(1, 3, run.device) if on_gpu else None

    def replayed() -> float:
        assert captures is not None
        return captures("step", (), passes, captures.ready("step")).item()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses = [step() for _ in range(3)]
    kinds, busy, kernels = device_times(step, 2) if on_gpu else ({}, 0.0, 0.0)
    result = {
        "name": name,
        "step_ms": timed(step, steps),
        "busy_ms": busy,
        "kinds_ms": kinds,
        "kernels": kernels,
        "loss": losses[0],
        "flops": flops,
    }
    if on_gpu:
        again = [replayed() for _ in range(6)]  # three launched, captured, replayed
        result |= {"graph_ms": timed(replayed, steps), "graph_busy_ms": device_times(replayed, 2)[1]}
        result |= {"eager_loss": again[0], "graph_loss": again[-1]}
        result |= {"reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    return result


def timed(step: Callable[[], float], steps: int) -> float:
    """Median milliseconds of a step, which waits for its loss."""
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def compare_times(size: Size, steps: int, recipes: Sequence[str], device: str) -> list[dict]:
    """Times in bf16 and with each recipe; one that the device lacks is told and left out."""
    results: list[dict] = []
    peak = stated_peak(device)
    for name in (None, *recipes):
        fp8 = {} if name is None else {"fp8": "hybrid", "fp8_recipe": name}
        title = "bf16" if name is None else f"fp8 {name}"
        try:
            found = time_of(size, title, steps, **fp8)
        except (RuntimeError, AssertionError) as error:
            if not results:
                raise
            print(f"{title}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        finally:
            _free(device != "CPU")
        results.append(found)
        told = f"{title:15s} {found['step_ms']:8.1f} ms a step, busy {found['busy_ms']:7.1f}, loss {found['loss']:.5f}"
        if "graph_ms" in found:
            ratio = results[0]["graph_ms"] / found["graph_ms"]
            asked = "" if name is None else f" ({'at least' if ratio >= ASKED else 'BELOW'} the {ASKED} asked)"
            share = f", {100 * found['flops'] / (found['graph_ms'] / 1e3) / peak:.1f} % of bf16's peak" if peak else ""
            same = "the same loss" if found["graph_loss"] == found["eager_loss"] else "ANOTHER LOSS"
            kinds = ", ".join(f"{kind} {spent:.1f}" for kind, spent in found["kinds_ms"].items() if spent >= 1)
            told += (
                f", {results[0]['step_ms'] / found['step_ms']:.3f} x bf16; one graph {found['graph_ms']:.1f} ms, busy "
                f"{found['graph_busy_ms']:.1f}, {ratio:.3f} x bf16{asked}{share}, {same} "
                f"({found['graph_loss'] - found['eager_loss']:+.2e}); {found['reserved_gib']:.1f} GiB; {kinds}"
            )
        print(told, flush=True)
    return results


def _free(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--only", choices=["train", "steps"], default=None)
    parser.add_argument("--size", choices=SIZES, default="7b", help="of the language model that is timed")
    parser.add_argument("--recipes", nargs="*", default=RECIPES, choices=RECIPES)
    parser.add_argument("--steps", type=int, default=200, help="that are trained")
    parser.add_argument("--timed", type=int, default=10, help="steps that are timed")
    parser.add_argument("--out", type=Path, default=None, help="JSON with every figure")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    recipes = options.recipes if on_gpu else ()
    figures: dict = {"device": device, "launches_a_second": launches_a_second() if on_gpu else None}
    print(device, torch.__version__, figures["launches_a_second"])
    if options.only != "train":
        size = SMALL if options.small else SIZES[options.size]
        figures["times"] = compare_times(size, options.timed, recipes, device)
        _write(options.out, figures)
    if options.only != "steps":
        figures["training"] = compare_losses(TOY if options.small else FULL, options.steps, recipes)
        _write(options.out, figures)


def _write(path: Path | None, figures: Mapping) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
