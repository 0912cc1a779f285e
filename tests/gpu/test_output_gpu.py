"""The output half on a GPU: no host sync in a step, the CPU's numbers, and what a bad code does."""

import pytest
import torch
from torch import nn

import megatron_mimo
from megatron_mimo.decoders import DiscreteDecoder
from tests import tiny
from tests.distributed.cases import decoders as cases

pytestmark = pytest.mark.gpu

KINDS = ["regression", "discrete", "flow", "flow_transformer", "flow_transformer_own", "diffusers"]
SAMPLES = ("two", "edge", "none", "last")


@pytest.fixture(scope="module")
def run():
    """Megatron-Core with one rank on the GPU."""
    yield megatron_mimo.initialize(seed=1)
    megatron_mimo.shutdown()


def kind_or_skip(name: str) -> cases.Kind:
    if name == "diffusers":
        pytest.importorskip("diffusers", exc_type=ImportError)
    return cases.kinds()[name]


def on_gpu(values: dict) -> dict:
    return {name: value.cuda() for name, value in values.items()}


def model_and_batch(name: str, dtype: torch.dtype):
    kind = kind_or_skip(name)
    # Megatron's fused softmax is an extension of Apex, which is not asked for here.
    config = tiny.language_config(params_dtype=dtype, bf16=dtype is torch.bfloat16, masked_softmax_fusion=False)
    torch.manual_seed(0)
    model = cases.build(kind, tiny.language_spec(config)).to("cuda", dtype)
    cases.spread(model)
    tokens, targets = on_gpu(cases.batch(SAMPLES)), on_gpu(kind.targets(4))
    decoder = model.modality_submodules["images"].decoders["out"]
    counts = {
        "text": tokens["loss_mask"].sum(),
        "images/out": torch.tensor(decoder.count(targets), device="cuda"),
    }
    return model, tokens, targets, counts


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drawn", [True, False], ids=["draws made", "draws given"])
def test_a_training_step_never_waits_for_the_device(run, name, dtype, drawn):
    model, tokens, targets, counts = model_and_batch(name, dtype)
    if drawn:
        targets = {key: value for key, value in targets.items() if key in ("target", "codes", "weight")}
    cases.step(model, tokens, targets, counts)  # the first step compiles and loads kernels
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = cases.step(model, tokens, targets, counts)
        without = cases.step(model, {k: v[2:3] for k, v in tokens.items()}, None, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite() and without.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_equal_the_cpus(run, name):
    kind = kind_or_skip(name)
    if kind.sharded:  # Megatron's layers live on the GPU here; the same decoder with torch's
        kind = cases.Kind(kind.decoder, kind.params, kind.feed, kind.targets, sharded=False)
    torch.manual_seed(0)
    decoder = cases.build(kind, tiny.language_spec()).modality_submodules["images"].decoders["out"].cpu()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    targets = kind.targets(4)
    rows = torch.randn(decoder.num_rows(targets), cases.WIDTH)
    results = []
    for device in ("cpu", "cuda"):
        decoder.to(device).zero_grad()
        there = {key: value.to(device) for key, value in targets.items()}
        inputs = rows.detach().to(device).requires_grad_()
        term = decoder.loss(inputs, there)
        term.mean().backward()
        gradients = {key: p.grad.cpu().clone() for key, p in decoder.named_parameters()}
        results.append((term.mean().detach().cpu(), inputs.grad.cpu(), gradients))
    (loss, of_rows, gradients), (their_loss, their_rows, theirs) = results
    # Float32 without TF32 on both sides; sums in other orders.
    torch.testing.assert_close(their_loss, loss, rtol=1e-4, atol=1e-5)
    for name, gradient in {**gradients, "rows": of_rows}.items():
        found = {**theirs, "rows": their_rows}[name]
        allowed = 1e-3 * gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(found, gradient, atol=allowed, rtol=0, msg=lambda m: f"{name}: {m}")


def test_a_code_outside_its_codebook_makes_the_loss_nan_and_nothing_else():
    decoder = DiscreteDecoder(width=6, codebook_sizes=4).cuda()
    rows = torch.zeros(2, 6, device="cuda")
    assert decoder.loss(rows, {"codes": torch.tensor([1, 4], device="cuda")}).sum.isnan()
    assert decoder.loss(rows, {"codes": torch.tensor([1, 3], device="cuda")}).sum.isfinite()


@pytest.mark.parametrize("name", KINDS)
def test_samples_are_finite_and_repeat_with_the_generator(run, name):
    model, _, _, _ = model_and_batch(name, torch.bfloat16)
    decoder = model.modality_submodules["images"].decoders["out"].eval()
    rows = torch.randn(2 * cases.SPAN, cases.WIDTH, device="cuda", dtype=torch.bfloat16)
    options = {"regression": {}, "discrete": dict(top_k=3, guidance=2.0)}.get(name, dict(steps=3, guidance=2.0))

    def drawn():
        if name == "regression":
            return decoder.sample(rows)
        return decoder.sample(rows, generator=torch.Generator("cuda").manual_seed(3), **options)

    first = drawn()
    assert torch.equal(drawn(), first)
    assert first.float().isfinite().all()
