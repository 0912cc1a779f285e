"""A compiled encoder of Megatron's layers is one graph that computes what the encoder computes."""

from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from examples.recipes.parts import with_fused_attention
from megatron_mimo import specs
from megatron_mimo.training.compiled import compile_encoder, compiled_forward
from tests import tiny


def results(encoder: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    encoder.zero_grad(set_to_none=True)
    output = encoder(x=images)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in encoder.parameters())]


@pytest.mark.parametrize("way", ["module", "forward"])
def test_it_is_compiled_in_one_piece(way, single_process, monkeypatch):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    spec = specs.clip_vit_spec(tiny.language_config(), "torch", patch_dim=4, img_h=8, img_w=8)
    spec.params["transformer_layer_spec"] = with_fused_attention(spec.params["transformer_layer_spec"])
    encoder = spec.module(**spec.params)
    images = torch.randn(3, 3, 8, 8)
    plain = results(encoder, images)
    # The CPU backend has torch.compile run eagerly, for want of a compiler; this one needs none.
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    if way == "forward":
        encoder.forward = compiled_forward(encoder)
    else:
        monkeypatch.setattr(encoder, "compile", partial(encoder.compile, backend=backend))
        compile_encoder(encoder)
    with torch.compiler.set_stance("default"):
        compiled = results(encoder, images)
    assert len(graphs) == 2, "one forward, one backward"
    torch.testing.assert_close(compiled, plain)
