"""Packed sequences on a GPU: no host sync in a step, and TransformerEngine's attention keeps them apart."""

from functools import partial

import pytest
import torch

import megatron_mimo
from megatron_mimo import MimoModel, specs
from tests import packed, tiny
from tests.distributed.cases import decoders as cases
from tests.distributed.setting import token_local_layers

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def run():
    """Megatron-Core with one rank on the GPU."""
    yield megatron_mimo.initialize(seed=1)
    megatron_mimo.shutdown()


def on_gpu(node):
    if isinstance(node, dict):
        return {name: on_gpu(value) for name, value in node.items()}
    if isinstance(node, packed.PackedSeqParams):
        fields = {name: on_gpu(value) for name, value in vars(node).items()}
        return packed.PackedSeqParams(**fields)
    return node.cuda() if isinstance(node, torch.Tensor) else node


def model_of(name: str, dtype: torch.dtype, **language) -> MimoModel:
    config = tiny.language_config(
        num_attention_heads=2,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        masked_softmax_fusion=False,
    )
    torch.manual_seed(0)
    model = cases.build(cases.kinds()[name], tiny.language_spec(config, **language), reads=True)
    model.to("cuda", dtype)
    cases.spread(model)
    return model


@pytest.mark.parametrize("name", ["discrete", "flow", "flow_transformer"])
def test_a_packed_training_step_never_waits_for_the_device(run, name):
    """Without attention, whose rotary embedding reads the boundaries on the host in Megatron itself."""
    layers = {"transformer_layer_spec": token_local_layers(2), "position_embedding_type": "learned_absolute"}
    model = model_of(name, torch.float32, **layers)
    alone = packed.alone()
    targets = on_gpu(cases.kinds()[name].targets(sum(packed.spans())))
    batch, counts = on_gpu(packed.packed(alone)), on_gpu(packed.step_counts(model, alone, targets))
    packed.step(model, [(batch, targets)], counts)  # the first step compiles and loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms, gradients = packed.step(model, [(batch, targets)], counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(term.sum.isfinite() for term in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["discrete", "flow"])
def test_a_packed_batch_gives_the_losses_and_gradients_of_its_sequences_apart(run, name, padded):
    pytest.importorskip("transformer_engine", reason="packed attention is TransformerEngine's")
    layers = partial(specs.language_layer_spec, backend="transformer_engine")
    model = model_of(name, torch.bfloat16, transformer_layer_spec=layers)
    alone = packed.alone(opens=name == "flow")
    targets = on_gpu(cases.kinds()[name].targets(sum(packed.spans())))
    apart = list(zip(map(on_gpu, alone), packed.shares(model, targets)))
    counts = on_gpu(packed.step_counts(model, alone, targets))
    expected, gradients = packed.step(model, apart, counts)
    found, theirs = packed.step(model, [(on_gpu(packed.packed(alone, padded)), targets)], counts)
    for term in expected:
        # bfloat16 keeps 3 digits, and packed rows meet other kernels.
        torch.testing.assert_close(found[term].sum, expected[term].sum, rtol=2e-2, atol=0)
        torch.testing.assert_close(found[term].count, expected[term].count)
    for key, gradient in gradients.items():
        allowed = 5e-2 * gradient.float().norm().item() + 1e-6
        assert (theirs[key].float() - gradient.float()).norm().item() <= allowed, key


def test_what_is_written_in_padding_is_reported(run):
    layers = {"transformer_layer_spec": token_local_layers(2), "position_embedding_type": "none"}
    model = model_of("discrete", torch.float32, **layers)
    batch = packed.packed(packed.alone())
    targets = on_gpu(cases.kinds()["discrete"].targets(sum(packed.spans())))
    written = (batch["input_ids"][0] == tiny.WRITE).nonzero()
    batch["input_ids"][0, written[-1]] = 1
    batch["input_ids"][0, 31] = tiny.WRITE
    batch = on_gpu(batch)
    with pytest.raises(ValueError, match="images: its generation token at position 31 of sample 0 stands in padding"):
        model(**batch, modality_targets={"images": {"out": targets}})
        torch.cuda.synchronize()
        model.finish_checks()


@pytest.mark.parametrize("fused", [False, True])
def test_packed_mrope_gives_the_logits_of_its_sequences_apart_or_is_refused(run, fused):
    pytest.importorskip("transformer_engine", reason="packed attention is TransformerEngine's")
    config = tiny.language_config(
        num_attention_heads=2,
        params_dtype=torch.bfloat16,
        bf16=True,
        apply_rope_fusion=fused,
        mrope_section=[2, 3, 3],
    )
    layers = partial(specs.language_layer_spec, backend="transformer_engine")
    spec = tiny.language_spec(config, position_embedding_type="mrope", transformer_layer_spec=layers)
    model = MimoModel(megatron_mimo.MimoModelConfig(spec)).cuda().bfloat16().eval()
    ids = torch.randint(1, 60, (1, 24), device="cuda")
    sections = torch.stack([torch.arange(24) % 12, torch.arange(24) % 12 // 3, torch.arange(24) % 12 % 5])[
        :, None
    ].cuda()
    bounds = torch.tensor([0, 12, 24], dtype=torch.int32, device="cuda")
    params = packed.PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=12, max_seqlen_kv=12
    )
    if fused:
        with pytest.raises(ValueError, match="packed_seq_params with mrope and apply_rope_fusion=True"):
            model(ids, position_ids=sections, packed_seq_params=params)
        return
    with torch.no_grad():
        together = model(ids, position_ids=sections, packed_seq_params=params)[0]
        apart = [model(ids[:, i : i + 12], position_ids=sections[..., i : i + 12])[0] for i in (0, 12)]
    # bfloat16 keeps 3 digits, and packed rows meet other kernels.
    torch.testing.assert_close(together.float(), torch.cat(apart, dim=1).float(), rtol=3e-2, atol=3e-2)
