"""Specs build working models on plain torch, and say what is wrong when they cannot."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo import specs
from megatron_mimo.launch import initialize


def config(**changes) -> TransformerConfig:
    return TransformerConfig(**{"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization": "RMSNorm", "gated_linear_unit": True, "num_query_groups": 2},
        {"qk_layernorm": True},
        {"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False},
        {"num_moe_experts": 4, "moe_layer_freq": [0, 1], "add_bias_linear": False},
    ],
    ids=["dense", "llama-like", "qk-norm", "experts", "experts-every-other-layer"],
)
def test_language_models_on_torch_compute_a_loss_and_a_gradient_for_every_parameter(single_process, changes) -> None:
    language = config(hidden_dropout=0.0, attention_dropout=0.0, **changes)
    model = GPTModel(language, specs.language_layer_spec(language, "torch"), vocab_size=32, max_sequence_length=8)
    ids = torch.arange(8)[None]
    model(ids, ids, None, labels=ids).sum().backward()
    norms = [module for module in model.modules() if isinstance(module, specs.TorchNorm)]
    assert len(norms) == (9 if "qk_layernorm" in changes else 5)
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("subtype", ["clip", "siglip", "internvit"])
def test_clip_vit_runs_without_transformer_engine(single_process, subtype) -> None:
    tokens = {"add_class_token": False, "class_token_len": 0} if subtype == "siglip" else {}
    spec = specs.clip_vit_spec(config(), "torch", patch_dim=4, img_h=8, img_w=12, model_subtype=subtype, **tokens)
    patches = build_module(spec)(torch.rand(2, 3, 8, 12))
    assert patches.shape == (2, 6 if subtype == "siglip" else 7, 16)


@pytest.mark.parametrize("projector_type", ["mlp", "affine"])
def test_projections_map_to_the_width_of_the_language_model(single_process, projector_type) -> None:
    submodules = specs.projection_spec(config(), "torch").submodules
    projector = MultimodalProjector(config(), submodules, projector_type, input_size=12)
    assert projector(torch.rand(3, 12)).shape == (3, 16)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_torch_norm_equals_torch_s_modules(normalization: str, zero_centered: bool) -> None:
    settings = config(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)
    mine = specs.TorchNorm(settings, 16, eps=1e-6)
    theirs = getattr(torch.nn, normalization)(16, eps=1e-6)
    with torch.no_grad():
        theirs.weight.copy_(torch.rand(16))
        mine.weight.copy_(theirs.weight - (1 if zero_centered else 0))
    x = torch.randn(3, 2, 16)
    # Zero-centred weights are rounded once more, near 1.
    torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=1e-6)


def test_torch_norm_marks_its_parameters_for_sequence_parallelism() -> None:
    for sequence_parallel in (False, True):
        settings = config(sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
        norm = specs.TorchNorm(settings, 16)
        assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * 2


def test_torch_norm_keeps_bfloat16() -> None:
    norm = specs.TorchNorm(config(params_dtype=torch.bfloat16), 16)
    assert norm(torch.rand(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_no_norm_of_megatron_s_choice_is_left_in_a_torch_spec() -> None:
    for spec in (
        specs.language_layer_spec(config(qk_layernorm=True), "torch"),
        specs.vision_layer_spec(config(), "torch"),
    ):
        assert WrappedTorchNorm.__name__ not in repr(spec)
        assert spec.submodules.layer_norm is specs.TorchNorm


def test_auto_chooses_torch_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(specs, "HAVE_TE", True)
    assert specs.choose_backend() == "torch"


def test_auto_prefers_transformer_engine_then_apex_then_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for engine, apex, chosen in ((True, True, "transformer_engine"), (False, True, "apex"), (False, False, "torch")):
        monkeypatch.setattr(specs, "HAVE_TE", engine)
        monkeypatch.setattr(specs, "HAVE_FUSED_LAYER_NORM", apex)
        assert specs.choose_backend() == chosen


def test_apex_lends_its_layer_norm_and_torch_the_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "HAVE_FUSED_LAYER_NORM", True)
    assert specs.norm("apex") is specs.FusedLayerNorm
    assert specs.norm("apex", "RMSNorm") is specs.TorchNorm


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: specs.choose_backend("tensorflow"), "expected 'auto'"),
        (lambda: specs.choose_backend("apex"), "cannot be imported"),
        (lambda: specs.TorchNorm(config(normalization="L2Norm"), 16), "found 'L2Norm'"),
        (lambda: specs.TorchNorm(config(persist_layer_norm=True), 16), "persist_layer_norm"),
        (lambda: specs.TorchNorm(config(memory_efficient_layer_norm=True), 16), "memory_efficient_layer_norm"),
        (lambda: specs.projection_spec(config(use_te_activation_func=True), "torch"), "use_te_activation_func"),
        (
            lambda: specs.clip_vit_spec(config(sequence_parallel=True, tensor_model_parallel_size=2), "torch"),
            "sequence_parallel",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_to_do(build, message, monkeypatch) -> None:
    monkeypatch.setattr(specs, "HAVE_FUSED_LAYER_NORM", False)
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.gpu
def test_transformer_engine_specs_run_where_it_is_installed(no_run) -> None:
    pytest.importorskip("transformer_engine")
    run = initialize(backend="nccl")
    # TransformerEngine's attention wants heads of a multiple of 8.
    language = config(hidden_size=64, params_dtype=torch.bfloat16, bf16=True)
    spec = specs.language_layer_spec(language, "transformer_engine")
    model = GPTModel(language, spec, vocab_size=32, max_sequence_length=8).cuda()
    ids = torch.arange(8, device=run.device)[None]
    assert model(ids, ids, None, labels=ids).isfinite().all()
