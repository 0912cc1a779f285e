"""Models from checkpoints ask for the kernels that the machine has."""

import pytest
import torch
from torch.nn import functional as F

from megatron_mimo import specs
from megatron_mimo.attention import FusedAttention
from megatron_mimo.hf import language
from megatron_mimo.hf.vision import tower_spec

SIZES = dict(hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
SILU = dict(SIZES, num_layers=1, num_query_groups=2, gated_linear_unit=True, activation_func=F.silu)
GELU = SILU | {"activation_func": F.gelu}
BOTH = {"apply_rope_fusion": True, "bias_activation_fusion": True}


@pytest.mark.parametrize(
    ("settings", "backend", "changes", "expected"),
    [
        (SILU, "transformer_engine", {}, BOTH),
        (GELU, "transformer_engine", {}, {"apply_rope_fusion": True}),
        (SILU, "torch", {}, {}),
        (SILU, "transformer_engine", {"use_te_activation_func": True}, {"apply_rope_fusion": True}),
        (SILU, "transformer_engine", {"bias_activation_fusion": False}, BOTH | {"bias_activation_fusion": False}),
    ],
)
@pytest.mark.parametrize("gpu", [True, False])
def test_a_language_model_asks_for_them_where_they_are(monkeypatch, gpu, settings, backend, changes, expected):
    """Megatron itself refuses them where TransformerEngine is not installed, so that its configuration stands in."""
    asked = {}

    class Asked(language.TransformerConfig):
        def __init__(self, **given) -> None:
            asked.update(given)
            kernels = ("apply_rope_fusion", "bias_activation_fusion", "use_te_activation_func")
            super().__init__(**{name: value for name, value in given.items() if name not in kernels})

    monkeypatch.setattr(language, "TransformerConfig", Asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(specs, "choose_backend", lambda backend="auto": backend)
    given = {**settings, "vocab_size": 16, "bias_activation_fusion": False}  # as the families' constants have it
    language.language_spec(given, dtype=torch.float32, sizes={}, backend=backend, changes=changes)
    found = {name: asked[name] for name in ("apply_rope_fusion", "bias_activation_fusion") if asked.get(name)}
    assert found == ({name: value for name, value in expected.items() if value} if gpu else {})


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_tower_of_plain_torch_has_torchs_attention_which_has_no_dropout(dropout):
    settings = dict(SIZES, image_size=8, patch_size=4, attention_dropout=dropout)
    spec = tower_spec(
        settings, "clip", layers=1, final_norm=True, select="patch", dtype=torch.float32, tensor_parallel=1,
        backend="torch",
    )  # fmt: skip
    (layer,) = spec.params["transformer_layer_spec"].submodules.layer_specs
    core = layer.submodules.self_attention.submodules.core_attention
    assert (core is FusedAttention) is (dropout == 0.0)
