"""Attention of an image encoder, forward and backward, by each backend there is: CLIP-L/336 on eight images.

    python -m benchmarks.encoder_attention

Every patch sees every other: 577 rows an image, 16 heads of 64, bfloat16. Torch's own backends run as the library's
`FusedAttention` calls them, TransformerEngine's by its `DotProductAttention`. Times are of a call of 24, as many as the
encoder has layers, and the largest differences of output and gradients are from the first backend's.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.output import busy_work

LAYERS = 24
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_torch(backend: SDPBackend) -> Attention:
    """`[S, B, heads, D]` each -> the same."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3)

    return attend


def of_transformer_engine(heads: int, channels: int) -> Attention:
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(heads, channels, attention_dropout=0.0, attn_mask_type="no_mask")
    return lambda query, key, value: module(query, key, value).view_as(query)


def measure(attend: Attention, inputs: list[Tensor], gradient: Tensor, rounds: int) -> tuple[float, list[Tensor]]:
    """Median milliseconds of `LAYERS` calls forward and backward, and output and gradients."""
    found: list[Tensor] = []
    times, ahead = [], busy_work(gradient.device)
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        ahead()  # the host queues behind it: launches cost nothing
        start.record()
        for _ in range(LAYERS):
            output = attend(*inputs)
            found = [output, *torch.autograd.grad(output, inputs, gradient)]
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]), found


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=577)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(1)
    shape = (options.rows, options.images, options.heads, options.channels)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    backends = {
        "torch, flash": of_torch(SDPBackend.FLASH_ATTENTION),
        "torch, memory-efficient": of_torch(SDPBackend.EFFICIENT_ATTENTION),
        "torch, cuDNN": of_torch(SDPBackend.CUDNN_ATTENTION),
    }
    if find_spec("transformer_engine") is not None:
        backends["TransformerEngine"] = of_transformer_engine(options.heads, options.channels)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape} [S, B, heads, D], {LAYERS} layers")
    print("| attention | ms | largest difference of output | of gradients |\n|---|---:|---:|---:|")
    expected: list[Tensor] = []
    for name, attend in backends.items():
        milliseconds, found = measure(attend, inputs, gradient, options.rounds)
        expected = expected or found
        apart = [float((one.float() - other.float()).abs().max()) for one, other in zip(found, expected)]
        print(f"| {name} | {milliseconds:.2f} | {apart[0]:.4f} | {max(apart[1:]):.4f} |", flush=True)


if __name__ == "__main__":
    main()
