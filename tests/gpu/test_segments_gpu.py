"""Fused kernels of packed attention on a GPU: the outputs and gradients of a call for each sample, without a wait."""

from functools import partial

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

import megatron_mimo
from megatron_mimo import MimoModel, segment_kernels, specs
from megatron_mimo.data.transfer import from_bytes, to_bytes
from megatron_mimo.segments import SegmentAttention, SegmentedParams, segmented
from megatron_mimo.training.sources import batch_of
from tests import data_samples as made
from tests import tiny

pytestmark = pytest.mark.gpu

BOUNDS = [0, 700, 1000, 1001, 2048]
PADDED = [0, 704, 1004, 1008, 2048]


@pytest.fixture(scope="module")
def run():
    """Megatron-Core with one rank on the GPU."""
    yield megatron_mimo.initialize(seed=1)
    megatron_mimo.shutdown()


def params_of(spans: bool, padded: bool) -> SegmentedParams:
    """As the collator makes them, moved to the GPU."""
    bounds = torch.tensor(BOUNDS if not padded else [0, 700, 996, 997, 2030], dtype=torch.int32)
    whole = torch.full((2048,), -1, dtype=torch.int32)
    whole[100:400], whole[720:990], whole[1500:1501] = 0, 1, 2
    told = segmented(bounds, torch.tensor(PADDED, dtype=torch.int32) if padded else None, whole if spans else None)
    for name, value in vars(told).items():
        if isinstance(value, Tensor):
            setattr(told, name, value.cuda())
    return told


def attention(dtype: torch.dtype, queries: int, groups: int) -> SegmentAttention:
    config = tiny.language_config(
        num_attention_heads=queries, num_query_groups=groups, kv_channels=64, params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )  # fmt: skip
    core = SegmentAttention(config, 1, AttnMaskType.causal, "self")
    return core


def drawn(dtype: torch.dtype, queries: int, groups: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    heads = (queries, groups, groups)
    return [torch.randn(2048, n, 64, generator=draw).to("cuda", dtype).requires_grad_() for n in heads]


def output_and_gradients(core, inputs: list[Tensor], params: SegmentedParams) -> list[Tensor]:
    found = core(*inputs, None, packed_seq_params=params)
    weight = torch.linspace(0, 1, found.numel(), device="cuda").view_as(found).to(found.dtype)
    return [found.detach(), *torch.autograd.grad(found, inputs, weight)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(
    ("kernel", "dtype"), [("varlen", torch.bfloat16), ("flexible", torch.bfloat16), ("flexible", torch.float32)]
)
def test_one_kernel_gives_what_a_call_for_each_sample_gives(run, monkeypatch, kernel, dtype, groups, padded):
    core, inputs, params = attention(dtype, 4, groups), drawn(dtype, 4, groups), params_of(kernel == "flexible", padded)
    used = []
    real = getattr(segment_kernels, kernel)
    monkeypatch.setattr(segment_kernels, kernel, lambda *given, **named: used.append(1) or real(*given, **named))
    found = output_and_gradients(core, inputs, params)
    assert used == [1]
    exact = [one.detach().double().requires_grad_() for one in inputs]
    monkeypatch.setattr(SegmentAttention, "_fused", lambda *given: None)
    expected = output_and_gradients(core, exact, params)
    # In float32 TensorFloat-32 may be used within the compiled kernel.
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_a_microbatch_makes_one_mask_and_nothing_waits_or_grows_with_the_square(run):
    core, inputs = attention(torch.bfloat16, 4, 4), drawn(torch.bfloat16, 4, 4)
    output_and_gradients(core, inputs, params_of(True, False))  # compiles
    params = params_of(True, False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        core(*inputs, None, packed_seq_params=params)
        mask = params.block_mask()
        output_and_gradients(core, inputs, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert params.block_mask() is mask
    scores = 4 * 2048 * 2048 * 2
    assert torch.cuda.max_memory_allocated() - before < scores


def test_transformer_engine_takes_samples_that_are_padded_apart_and_does_not_wait_to_see_it(run):
    pytest.importorskip("transformer_engine")
    config = tiny.language_config(num_attention_heads=4, kv_channels=64, params_dtype=torch.bfloat16, bf16=True)
    core = specs.core_attention("transformer_engine", config)(config, 1, AttnMaskType.causal, "self")
    assert not isinstance(core, SegmentAttention)
    inputs, params = drawn(torch.bfloat16, 4, 4), params_of(False, True)
    real = torch.cat([torch.arange(a, a + n) for a, n in zip(PADDED, params.cu_seqlens_q.diff().tolist())]).cuda()

    def step(core, inputs: list[Tensor]) -> list[Tensor]:
        found = core(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
        weight = torch.linspace(0, 1, found.numel(), device="cuda").view_as(found).to(found.dtype)
        kept = torch.zeros_like(weight).index_copy(0, real, weight[real])
        return [one[real] for one in (found.detach(), *torch.autograd.grad(found, inputs, kept))]

    step(core, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(core, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [one.detach().double().requires_grad_() for one in inputs]
    plain = SegmentAttention(config, 1, AttnMaskType.causal, "self")
    for ours, theirs in zip(found, step(plain, exact), strict=True):
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_on_packs_of_files_gives_the_cpus_loss(no_run, tmp_path, whole):
    manifest, buffer = to_bytes(batch_of(next(made.tiny_data(made.tiny_records(tmp_path), whole=whole))))
    losses, state = {}, None
    for backend, device in (("gloo", "cpu"), ("nccl", "cuda")):
        megatron_mimo.initialize(seed=1, backend=backend)
        layers = partial(specs.language_layer_spec, backend="torch")
        model = MimoModel(
            tiny.mimo_config(
                tiny.language_spec(tiny.language_config(kv_channels=16), transformer_layer_spec=layers),
                modality_submodules={"images": tiny.image_spec()},
                special_token_ids={"images": tiny.READ},
            )
        )
        state = state or {name: value for name, value in model.state_dict().items() if value is not None}
        model.load_state_dict(state, strict=False)
        model.to(device)
        losses[device] = tiny.total(model, from_bytes(manifest, buffer.to(device))).item()
        megatron_mimo.shutdown()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
