"""A model that computes something else than its checkpoint is refused by name, at import and at export."""

import dataclasses
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file

import megatron_mimo
from megatron_mimo import MimoModel, MimoModelConfig
from megatron_mimo.hf.blueprint import Building, encoder_spec, read_tower
from megatron_mimo.hf.comparing import OF_THE_RUN, OF_THE_RUN_BY_PREFIX, compared
from megatron_mimo.hf.filling import EMBEDDING, OUTPUT
from megatron_mimo.training import Trainer, TrainerSettings
from tests import checkpoints


@pytest.fixture
def source(single_process, tmp_path) -> Path:
    return checkpoints.written(checkpoints.language_model("llama-2"), tmp_path / "model")


@pytest.fixture
def llava(single_process, tmp_path) -> Path:
    return checkpoints.written(checkpoints.llava(), tmp_path / "llava")


# Settings -----------------------------------------------------------------------------------------------------------


def test_every_field_that_is_not_the_run_s_is_compared_and_no_list_is_out_of_date():
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert names >= OF_THE_RUN
    for prefix in OF_THE_RUN_BY_PREFIX:
        assert any(name.startswith(prefix) for name in names), prefix
    of_layers = {
        "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit", "activation_func",
        "num_attention_heads", "num_query_groups", "kv_channels", "qk_layernorm", "qk_l2_norm", "window_size",
        "window_attn_skip_freq", "mrope_section", "softmax_scale", "softmax_type", "rotary_interleaved", "no_rope_freq",
        "multi_latent_attention", "attention_output_gate", "apply_residual_connection_post_layernorm",
        "glu_linear_offset", "activation_func_clamp_value", "num_moe_experts", "experimental_attention_variant",
        "use_mup", "heterogeneous_block_specs", "add_bias_linear", "add_qkv_bias", "hidden_size", "ffn_hidden_size",
    }  # fmt: skip
    assert {name for name in names if compared(name)} == of_layers


CHANGES = [
    {"layernorm_epsilon": 1e-3},
    {"softmax_scale": 0.5},
    {"rotary_interleaved": True},
    {"window_size": (7, 0)},
    {"num_layers": 1},
    {"qk_layernorm": True},
    {"activation_func": torch.nn.functional.gelu},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_change_that_computes_something_else_is_refused_before_anything_is_built(source, change, monkeypatch):
    monkeypatch.setattr("megatron_mimo.pretrained.MimoModel", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=f"setting: {next(iter(change))} is .* in the model, expected"):
        megatron_mimo.from_pretrained(source, transformer=change)


def test_a_change_of_the_run_s_own_is_taken(source):
    model = megatron_mimo.from_pretrained(
        source, transformer={"recompute_granularity": "selective", "hidden_dropout": 0.1}
    )
    assert model.config.hidden_dropout == 0.1


@pytest.mark.parametrize("change", CHANGES[:4], ids=lambda change: next(iter(change)))
def test_a_model_that_computes_something_else_is_not_exported(source, tmp_path, change):
    config = megatron_mimo.pretrained_config(source)
    params = dict(config.language_model.params)
    params["config"] = replace(params["config"], **change)
    model = MimoModel(replace(config, language_model=replace(config.language_model, params=params)))
    with pytest.raises(ValueError, match=f"save_pretrained: .*\n.*setting: {next(iter(change))} is"):
        megatron_mimo.save_pretrained(model, tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))


def with_images(config: MimoModelConfig, kind: str, name: str | int, **params: object) -> MimoModelConfig:
    """`config` with other parameters of one part of its images."""
    spec = config.modality_submodules["images"]
    parts = dict(spec.submodules)
    held = dict(parts[kind]) if isinstance(name, str) else list(parts[kind])
    held[name] = ModuleSpec(module=held[name].module, params={**held[name].params, **params})
    return replace(config, modality_submodules={"images": replace(spec, submodules={**parts, kind: held})}, origin=None)


@pytest.mark.parametrize(
    ("kind", "name", "change", "told"),
    [
        (
            "input_projections",
            0,
            {"activation": "relu"},
            "projector_hidden_act is 'relu' in the model, expected 'gelu'",
        ),
        ("encoders", "tower", {"select": "all"}, "select is 'all' in the model, expected 'patch'"),
        ("encoders", "tower", {"img_h": 28}, "image_size is 28 in the model, expected 56"),
    ],
)
def test_settings_of_llava_s_own_are_compared(llava, kind, name, change, told):
    config = megatron_mimo.pretrained_config(llava)
    megatron_mimo.load_pretrained(MimoModel(replace(config, origin=None)), llava)  # which fits
    model = MimoModel(with_images(config, kind, name, **change))
    before = model.language_model.decoder.final_layernorm.weight.clone()
    with pytest.raises(ValueError, match=f"setting: {told}"):
        megatron_mimo.load_pretrained(model, llava)
    assert torch.equal(model.language_model.decoder.final_layernorm.weight, before)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_alone_fills_a_model_that_takes_other_states_than_llava(single_process, tmp_path, kind):
    from tests.parity.test_hf_llava import tower_directory

    whole = megatron_mimo.pretrained_config(checkpoints.written(checkpoints.llava(kind), tmp_path / "whole"))
    tower = tower_directory(tmp_path / "tower", kind, whole=False)
    part = read_tower(tower, "images/encoders/tower", None, "all")
    spec = encoder_spec(part, Building({"tensor_model_parallel_size": 1}), torch.float32)
    config = with_images(whole, "encoders", "tower", **spec.params)
    model = MimoModel(config)
    megatron_mimo.load_pretrained(model, {"images/encoders/tower": tower})
    held = model.modality_submodules["images"].encoders["tower"]
    found = dict(held.named_parameters())["decoder.layers.2.mlp.linear_fc2.bias"]
    theirs = load_file(tower / "model.safetensors")  # LLaVA leaves the last of three layers out
    assert torch.equal(found, next(theirs[name] for name in theirs if name.endswith("layers.2.mlp.fc2.bias")))


# The vocabulary -----------------------------------------------------------------------------------------------------


def with_vocabulary(config: MimoModelConfig, rows: int) -> MimoModelConfig:
    params = {**config.language_model.params, "vocab_size": rows}
    return replace(config, language_model=replace(config.language_model, params=params), origin=None)


@pytest.mark.parametrize("by_parts", [False, True])
def test_rows_that_the_source_lacks_become_the_mean_of_the_others(source, caplog, by_parts):
    config, more = megatron_mimo.pretrained_config(source), 7
    model = MimoModel(with_vocabulary(config, checkpoints.VOCABULARY + more))
    with caplog.at_level(logging.INFO, logger="megatron_mimo"):
        megatron_mimo.load_pretrained(model, {"language_model": source} if by_parts else source)
    assert f"has {checkpoints.VOCABULARY} rows of the vocabulary" in caplog.text
    for name in (EMBEDDING, OUTPUT):
        table = model.language_model.get_parameter(name)
        old, new = table[: checkpoints.VOCABULARY], table[checkpoints.VOCABULARY :]
        torch.testing.assert_close(new, old.double().mean(0).float().expand(more, -1))


def test_a_smaller_vocabulary_is_refused(source):
    model = MimoModel(with_vocabulary(megatron_mimo.pretrained_config(source), checkpoints.VOCABULARY - 1))
    with pytest.raises(ValueError, match="setting: vocab_size is 100 in the model, expected at least 101"):
        megatron_mimo.load_pretrained(model, source)


def test_new_tokens_begin_as_the_mean_however_the_weights_come(single_process, tmp_path):
    """Of `from_pretrained`, and of a Trainer that is given the parts again."""
    from tests.parity.test_hf_llava import text_directory, tower_directory

    parts = dict(
        language_model=text_directory(tmp_path / "text"),
        encoders={"images": {"tower": tower_directory(tmp_path / "tower", "clip", whole=False)}},
        special_tokens={"images": "<picture>"},
    )
    whole = megatron_mimo.from_pretrained(**parts)
    row = whole.mimo_config.special_token_ids["images"]
    expected = whole.language_model.get_parameter(EMBEDDING)[row]
    assert expected.abs().max() > 0
    run = megatron_mimo.initialize(seed=1234)
    settings = TrainerSettings(steps=1, progress=False)
    for source in (parts["language_model"], {"language_model": parts["language_model"]}):
        config = megatron_mimo.pretrained_config(**parts)
        trainer = Trainer(config, run, settings, pretrained=source)
        assert torch.equal(trainer.models[0].language_model.get_parameter(EMBEDDING)[row], expected)


# Numbers ------------------------------------------------------------------------------------------------------------


def test_files_of_two_dtypes_are_told_and_what_is_carried_along_keeps_its_own(single_process, tmp_path, caplog):
    source = checkpoints.written(checkpoints.llava().bfloat16(), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    wide, unused = "language_model.model.norm.weight", "vision_tower.vision_model.post_layernorm.weight"
    unused = next(name for name in tensors if name.endswith("post_layernorm.weight"))
    for name in (wide, unused):
        tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = megatron_mimo.from_pretrained(source)
    assert (
        "1 of " in caplog.text
        and "are torch.float32 in the files and are rounded to the model's torch.bfloat16" in caplog.text
    )
    megatron_mimo.save_pretrained(model, tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(found[unused], tensors[unused]) and found[wide].dtype == torch.bfloat16
    caplog.clear()
    megatron_mimo.from_pretrained(source, dtype=torch.float32)
    assert "rounded" not in caplog.text


def test_images_of_another_size_are_refused(llava):
    model = megatron_mimo.from_pretrained(llava)
    with pytest.raises(ValueError, match=r"pixel_values: expected \[n, 3, 56, 56\], found \[1, 3, 28, 28\]"):
        model.modality_submodules["images"].encoders["tower"](torch.zeros(1, 3, 28, 28))
