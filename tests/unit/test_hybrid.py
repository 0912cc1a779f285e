"""Megatron's HybridModel on plain torch, as the language model of a MimoModel and alone."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_mimo import MimoModel, specs
from megatron_mimo.segments import SegmentAttention
from tests import tiny

EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall", add_bias_linear=False)


def mimo(pattern: str, **changes) -> MimoModel:
    torch.manual_seed(3)
    config = tiny.language_config(num_layers=len(pattern), **changes)
    return MimoModel(tiny.mimo_config(tiny.hybrid_spec(config, pattern)))


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [("*-*-", {}), ("*-*-", {"normalization": "RMSNorm", "qk_layernorm": True}), ("*E*-", EXPERTS)],
    ids=["dense", "rms-norm-and-qk-norm", "experts"],
)
def test_it_reads_and_writes_and_every_parameter_gets_a_gradient(single_process, pattern, changes) -> None:
    model = mimo(pattern, **changes)
    tiny.total(model, tiny.batch()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # Reading: the loss reaches the encoder through the stack. Writing: the decoder's loss reaches the first layer.
    assert model.modality_submodules["images"].encoders["patches"].linear.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)
    outputs, _ = model(**tiny.batch())
    outputs.modalities["images"].losses["pixels"].sum.backward()
    assert model.language_model.decoder.layers[0].self_attention.linear_qkv.weight.grad.abs().sum() > 0


def test_the_rows_that_decoders_read_are_the_stack_s_states_after_its_final_norm(single_process) -> None:
    model = mimo("*-*-").eval()
    ids = torch.tensor([[1, 2, tiny.WRITE, tiny.WRITE, 3, 4, 5, 6]])
    kept = []
    handle = model.language_model.decoder.final_norm.register_forward_hook(lambda *args: kept.append(args[-1]))
    with torch.no_grad():
        logits = model.language_model(ids, torch.arange(8)[None], None)
        output = model(ids)[0]
    handle.remove()
    torch.testing.assert_close(output.language, logits)
    torch.testing.assert_close(output.modalities["images"].hidden, kept[0].transpose(0, 1)[ids == tiny.WRITE])


def test_it_computes_what_gpt_model_of_the_same_weights_computes(single_process) -> None:
    """Attention and MLP in turn are GPTModel's layers: the GPT of half as many layers is the oracle."""
    hybrid = mimo("*-*-").language_model
    config = tiny.language_config(num_layers=2)
    gpt = MimoModel(tiny.mimo_config(tiny.language_spec(config))).language_model
    halves = {"input_layernorm": 0, "self_attention": 0, "pre_mlp_layernorm": 1, "mlp": 1}
    weights = {}
    for name, parameter in gpt.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, layer, part, rest = name.split(".", 4)
            name = f"decoder.layers.{2 * int(layer) + halves[part]}.{part}.{rest}"
        weights[name.replace("final_layernorm", "final_norm")] = parameter
    theirs = dict(hybrid.named_parameters())
    assert theirs.keys() == weights.keys()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(weights[name])
        # Equal in every operation and its order, so equal in every bit but those of fused kernels: none on the CPU.
        torch.testing.assert_close(hybrid(ids, ids, None), gpt(ids, ids, None), rtol=0, atol=0)


def test_a_layer_that_the_spec_lacks_is_refused(single_process) -> None:
    with pytest.raises(ValueError, match=r"expected \['\*', '-'\], found 'E'"):
        mimo("*E")
    with pytest.raises(ValueError, match="found 'M'"):
        mimo("M-")


def test_multi_latent_attention_is_refused() -> None:
    config = tiny.language_config()
    config.multi_latent_attention = True
    with pytest.raises(ValueError, match="expected multi_latent_attention=False"):
        specs.hybrid_stack_spec(config, "torch")


def test_the_core_attention_of_every_language_layer_is_that_of_core_attention(single_process, monkeypatch) -> None:
    class Own(DotProductAttention):
        pass

    monkeypatch.setattr(specs, "core_attention", lambda backend, config: Own)
    config = tiny.language_config(num_layers=2)
    gpt = MimoModel(tiny.mimo_config(tiny.language_spec(config)))
    for model in (gpt, mimo("*-*-")):
        found = [module for module in model.modules() if isinstance(module, DotProductAttention)]
        assert [type(module) for module in found] == [Own, Own]


def test_float32_takes_plain_torchs_attention_on_transformer_engine(monkeypatch) -> None:
    monkeypatch.setattr(specs, "choose_backend", lambda backend: backend)
    for dtype, context in itertools.product((torch.float32, torch.bfloat16), (1, 2)):
        config = tiny.language_config(params_dtype=dtype)
        config.context_parallel_size = context
        plain = specs.core_attention("transformer_engine", config) is SegmentAttention
        assert plain == (dtype is torch.float32 and context == 1), (dtype, context)


def test_a_stack_without_a_final_norm_has_none(single_process) -> None:
    config = tiny.language_config(num_layers=2)
    spec = specs.hybrid_stack_spec(config, "torch")
    spec.params["post_layer_norm"] = False
    model = HybridModel(config, spec, tiny.VOCABULARY, 64, hybrid_layer_pattern="*-")
    assert "final_norm" not in dict(model.decoder.named_children())


def test_the_page_s_snippet_builds_a_model_of_four_layers(single_process) -> None:
    page = Path(__file__).parents[2].joinpath("docs/language_models.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    model = MimoModel(tiny.mimo_config(names["language_model"]))
    assert [type(layer).__name__ for layer in model.language_model.decoder.layers] == [
        "TransformerLayer",
        "MLPLayer",
    ] * 2
