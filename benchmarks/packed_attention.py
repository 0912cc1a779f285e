"""Attention of packed samples on a GPU: TransformerEngine, torch's kernels, and a call for each sample.

    python -m benchmarks.packed_attention                    # a pack of 4,096, 16 heads of 128, bfloat16
    python -m benchmarks.packed_attention --length 32768 --output out/packed_attention.json

Forward and backward of one attention, `--repeats` times, after a warm-up; median milliseconds and peak of memory beyond
the inputs. Samples are drawn as in `benchmarks.data`; a third of each is a medium, whose positions see all of it in the
last two rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.segments import SegmentAttention, SegmentedParams, segmented


class Apart(SegmentAttention):
    """A call for each sample."""

    one_kernel = False


def pack(length: int, whole: bool, device: torch.device) -> SegmentedParams:
    """Boundaries of drawn samples that fill `length`."""
    draw = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < length:
        size = int(torch.randint(64, 2200, (), generator=draw))
        bounds.append(min(bounds[-1] + size, length))
    spans = torch.full((length,), -1, dtype=torch.int32)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        third = (stop - start) // 3
        spans[start + third : start + 2 * third] = number
    told = segmented(torch.tensor(bounds, dtype=torch.int32), spans=spans if whole else None)
    for name, value in vars(told).items():
        if isinstance(value, Tensor):
            setattr(told, name, value.to(device))
    return told


def measured(step: Callable[[], None], repeats: int, on_gpu: bool) -> tuple[float, float]:
    """Median milliseconds, and the peak of memory in MiB."""

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - started))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else 0.0
    return statistics.median(times), peak


def main() -> None:
    """Measures every attention that is installed, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="file of JSON for the figures")
    arguments = parser.parse_args()
    run = megatron_mimo.initialize(seed=1)
    on_gpu = run.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = TransformerConfig(
        num_layers=1, hidden_size=arguments.heads * arguments.width, num_attention_heads=arguments.heads,
        attention_dropout=0.0, params_dtype=dtype, bf16=dtype is torch.bfloat16,
    )  # fmt: skip
    shape = (arguments.length, arguments.heads, arguments.width)
    inputs = [torch.randn(shape, device=run.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    names: dict[str, tuple[type, bool]] = {"apart": (Apart, False), "torch, fused": (SegmentAttention, False)}
    if on_gpu and specs.choose_backend("auto") == "transformer_engine":
        names["TransformerEngine"] = (specs.core_attention("transformer_engine"), False)
    names |= {"apart, media whole": (Apart, True), "torch, fused, media whole": (SegmentAttention, True)}
    results = {}
    for name, (kind, whole) in names.items():
        core = kind(config, 1, AttnMaskType.causal, "self")
        params = pack(arguments.length, whole, run.device)

        def step(core: torch.nn.Module = core, params: SegmentedParams = params) -> None:
            found = core(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
            torch.autograd.grad(found, inputs, torch.ones_like(found))

        milliseconds, peak = measured(step, arguments.repeats, on_gpu)
        results[name] = {"ms": milliseconds, "peak MiB": peak}
        print(f"{name:28} {milliseconds:8.2f} ms   {peak:8.1f} MiB", flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if on_gpu else "cpu"
        facts = {"command": sys.argv, "device": device, "torch": torch.__version__}
        arguments.output.write_text(json.dumps({**facts, "results": results}, indent=1))
    megatron_mimo.shutdown()


if __name__ == "__main__":
    main()
