"""Compiled encoders on the CPU, where torch.compile would want a C++ compiler and therefore runs eagerly."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from megatron_mimo import specs


@contextmanager
def compiling() -> Iterator[list]:
    """Within it torch.compile traces and needs no compiler; gives the list of the graphs that it made."""
    graphs: list = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()  # of one function it keeps eight compilations, those of tests before counted
    real = torch.compile
    torch.compile = partial(real, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    try:
        with torch.compiler.set_stance("default"):
            yield graphs
    finally:
        torch.compile = real


def vision_transformer(config: TransformerConfig) -> nn.Module:
    """Megatron's, of plain torch layers with torch's fused attention; images are `[n, 3, 8, 8]`."""
    spec = specs.clip_vit_spec(config, "torch", patch_dim=4, img_h=8, img_w=8)
    spec.params["transformer_layer_spec"] = specs.with_fused_attention(spec.params["transformer_layer_spec"])
    return spec.module(**spec.params)


def results(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Output and gradients; of a direction, since a sum of squares behind a norm hardly depends on the weights."""
    encoder.zero_grad(set_to_none=True)
    output = encoder(x=images)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in encoder.parameters())]
