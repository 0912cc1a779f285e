"""A compiled encoder of Megatron's layers is one graph that computes what the encoder computes."""

from functools import partial

import torch
from torch._dynamo.backends.common import aot_autograd

from examples.recipes.parts import with_fused_attention
from megatron_mimo import specs
from megatron_mimo.training.compiled import CompiledForward
from tests import tiny


def results(encoder: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients; of a direction, since a sum of squares behind a norm hardly depends on the weights."""
    encoder.zero_grad(set_to_none=True)
    output = encoder(x=images)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in encoder.parameters())]


def test_it_is_compiled_in_one_piece_whatever_ddp_hangs_on_its_parts(single_process, monkeypatch):
    graphs, gathered = [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def gather(module, *inputs) -> None:
        gathered.append(module)

    gather.__module__ = "megatron.core.distributed.distributed_data_parallel"  # as DDP's own hooks are known
    spec = specs.clip_vit_spec(tiny.language_config(), "torch", patch_dim=4, img_h=8, img_w=8)
    spec.params["transformer_layer_spec"] = with_fused_attention(spec.params["transformer_layer_spec"])
    encoder = spec.module(**spec.params)
    images = torch.randn(3, 3, 8, 8)
    plain = results(encoder, images)
    parts = list(encoder.modules())
    for part in parts:
        part.register_forward_pre_hook(gather)

    # The CPU backend has torch.compile run eagerly, for want of a compiler; this one needs none.
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    encoder.forward = CompiledForward(encoder)
    with torch.compiler.set_stance("default"):
        for _ in range(2):
            gathered.clear()
            torch.testing.assert_close(results(encoder, images), plain)
            assert gathered == [encoder, *parts], "the encoder itself runs its hook too"
    assert len(graphs) == 2, "one forward, one backward"
    assert all(len(part._forward_pre_hooks) == 1 for part in parts)
