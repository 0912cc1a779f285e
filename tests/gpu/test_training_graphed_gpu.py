"""An encoder replayed as CUDA graphs gives what it gives without, output and gradients."""

import pytest
import torch
from torch import nn

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.training.parts.graphed import GraphedForward
from tests import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def run():
    yield megatron_mimo.initialize(seed=1)
    megatron_mimo.shutdown()


def vision_transformer(backend: str = "torch", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    config = tiny.language_config(bf16=dtype is torch.bfloat16, params_dtype=dtype)
    spec = specs.clip_vit_spec(config, backend, patch_dim=4, img_h=8, img_w=8)
    return spec.module(**spec.params).cuda().to(dtype)


def images(number: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).cuda().to(dtype)


def gradients(encoder: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in encoder.parameters()]


def loss(output: torch.Tensor) -> torch.Tensor:
    """Of a random direction: the sum of squares behind a norm hardly depends on the weights."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).cuda()
    return (output.float() * direction).sum()


def passes(encoder: nn.Module, batches: list[torch.Tensor], together: bool) -> tuple[list, list]:
    """Outputs and accumulated gradients; `together`: all forward passes before the first backward pass."""
    encoder.zero_grad(set_to_none=True)
    outputs, kept = [], []
    for batch in batches:
        output = encoder(x=batch)
        kept.append(output.detach().clone())
        outputs.append(output)
        if not together:
            loss(outputs.pop()).backward()
    for output in outputs:
        loss(output).backward()
    return kept, gradients(encoder)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_replays_equal_eager_passes_also_accumulated_and_ahead_of_their_backward(backend, together):
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine")
    encoder = vision_transformer(backend)
    batches = [images(3, seed) for seed in range(4)] + [images(5, 9)]
    eager = passes(encoder, batches, together)
    encoder.forward = GraphedForward(encoder, captures=2)
    for _ in range(2):
        outputs, grads = passes(encoder, batches, together)
        torch.testing.assert_close(outputs, eager[0], rtol=0, atol=0)
        torch.testing.assert_close(grads, eager[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("together", [False, True])
def test_replays_of_compiled_kernels_equal_eager_passes(together):
    encoder = vision_transformer(dtype=torch.float32)  # in half precision fused kernels round less often
    batches = [images(3, seed, torch.float32) for seed in range(3)] + [images(5, 9, torch.float32)]
    eager = passes(encoder, batches, together)
    encoder.forward = GraphedForward(encoder, captures=1, compiled=True)
    for _ in range(2):
        replayed = passes(encoder, batches, together)
        torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-4)


def test_an_encoder_without_gradient_keeps_its_outputs_apart():
    encoder = vision_transformer().requires_grad_(False)
    eager = [encoder(x=images(2, seed)) for seed in range(3)]
    encoder.forward = GraphedForward(encoder)
    replayed = [encoder(x=images(2, seed)) for seed in range(3)]
    torch.testing.assert_close(replayed, eager, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_of_all_its_parts_are_gathered_before_each_replay(compiled):
    encoder = vision_transformer()
    gathered = []

    def gather(module, *inputs) -> None:
        gathered.append(module)

    gather.__module__ = "megatron.core.distributed.distributed_data_parallel"  # as DDP's own hooks are known
    parts = list(encoder.modules())
    for part in parts:
        part.register_forward_pre_hook(gather)
    encoder.forward = GraphedForward(encoder, compiled=compiled)
    encoder(x=images(2, 0)).sum().backward()
    gathered.clear()
    encoder(x=images(2, 1)).sum().backward()
    assert set(parts) <= set(gathered)


def test_an_encoder_with_dropout_is_refused():
    with pytest.raises(ValueError, match="has dropout"):
        GraphedForward(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).cuda())
