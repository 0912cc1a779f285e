"""What does not fit is refused with everything that is wrong with it, before anything is built or changed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from safetensors.torch import load_file, save_file

import megatron_mimo
from megatron_mimo import pretrained
from megatron_mimo.cli.errors import REFUSED, told
from megatron_mimo.decoders import RegressionDecoder
from megatron_mimo.hf.names import name_of, parameters_by_name
from megatron_mimo.launch import Layout, pretended
from megatron_mimo.training import Trainer, TrainerSettings
from tests import checkpoints, tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def source(single_process, tmp_path) -> Path:
    return checkpoints.written(checkpoints.language_model("llama-2"), tmp_path / "model")


@pytest.fixture
def nothing_is_built(monkeypatch) -> None:
    def build(*_):
        raise AssertionError("a model was built before its checkpoint was refused")

    monkeypatch.setattr(pretrained, "MimoModel", build)


def edit(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, directory / WEIGHTS)


def test_all_differences_are_told_at_once(source, nothing_is_built) -> None:
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.norm.weight"] = torch.ones(31)

    rewrite(source, change)
    edit(source, hidden_act="gelu", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="found 5 differences") as raised:
        megatron_mimo.from_pretrained(source)
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight [48, 32]",
        "surplus: model.layers.0.self_attn.q_proj.bias [32]",
        "shape: model.norm.weight is [31], expected [32]",
        "hidden_act = 'gelu': expected 'silu'",
        "expected rope_type 'default', 'llama3' or 'linear'",
    ):
        assert line in str(raised.value)


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def config_of_no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def config_of_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def without_weights(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def index_of_another_model(directory: Path) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.other.weight": WEIGHTS}}))


def index_without_map(directory: Path) -> None:
    (directory / INDEX).write_text("{}")


def index_of_a_file_that_is_not_there(directory: Path) -> None:
    (directory / INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )


def index_that_leaves_the_directory(directory: Path) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))


def cut(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def cut_in_the_header(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])


def header_of_no_json(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"abcd")


def quantised(directory: Path) -> None:
    edit(directory, quantization_config={"quant_method": "gptq"})


def quantised_tensors(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))


def of_gemma(directory: Path) -> None:
    edit(directory, model_type="gemma2")


def of_another_family(directory: Path) -> None:
    edit(directory, model_type="qwen3_moe")


def tied_to_another_table(directory: Path) -> None:
    edit(directory, tie_word_embeddings=True)


def biases_in_attention_alone(directory: Path) -> None:
    edit(directory, attention_bias=True)


def another_scaling_of_llama_3(directory: Path) -> None:
    edit(directory, rope_parameters=checkpoints.LLAMA3 | {"high_freq_factor": 2.0})


def part_of_a_head_turned(directory: Path) -> None:
    edit(directory, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_config, FileNotFoundError, "expected a file config.json, found .*model.safetensors"),
        (config_of_no_json, ValueError, "config.json: expected JSON"),
        (config_of_a_list, ValueError, "expected a JSON object, found a list"),
        (without_weights, FileNotFoundError, "found .*pytorch_model.bin.*can run code"),
        (index_of_another_model, ValueError, "Index and files are of different models"),
        (index_without_map, ValueError, "expected a weight_map"),
        (index_of_a_file_that_is_not_there, FileNotFoundError, "expected model-00001-of-00002.safetensors"),
        (index_that_leaves_the_directory, ValueError, "expected a file of the same directory"),
        (cut, ValueError, "expected [0-9]+ bytes, as its header says, found [0-9]+. The file was cut"),
        (cut_in_the_header, ValueError, "without a whole header"),
        (header_of_no_json, ValueError, "a header that does not parse"),
        (quantised, ValueError, "quantization_config"),
        (quantised_tensors, ValueError, r"floating point .*model.norm.weight \(I8\)"),
        (of_gemma, ValueError, "model_type 'gemma2'. Megatron-Core has neither soft-capped.*docs/weights.md"),
        (of_another_family, ValueError, "nearest is 'qwen2'.*docs/weights.md"),
        (tied_to_another_table, ValueError, "values: lm_head.weight differs from model.embed_tokens.weight"),
        (biases_in_attention_alone, ValueError, "biases in attention and MLP or in neither"),
        (another_scaling_of_llama_3, ValueError, "Megatron's own high_freq_factor is 4"),
        (part_of_a_head_turned, ValueError, "expected partial_rotary_factor 1"),
    ],
)
def test_a_bad_directory_is_one_clear_error(source, nothing_is_built, spoil, error, message) -> None:
    spoil(source)
    with pytest.raises(error, match=f"(?s){message}"):
        megatron_mimo.from_pretrained(source)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_what_is_no_directory_and_no_name_of_the_hub_is_told(single_process, name) -> None:
    with pytest.raises(FileNotFoundError, match="expected a directory, or a name on the hub"):
        megatron_mimo.from_pretrained(name)


def test_offline_without_a_snapshot_says_how_to_fetch_it_and_where_it_looked(
    single_process, tmp_path, monkeypatch, capsys
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="owner/model: the hub cannot be reached .* no such directory is in /"):
        megatron_mimo.from_pretrained("owner/model")
    # On the command line it is what was asked for, of which nothing was begun.
    with pytest.raises(SystemExit) as ended, told(False):
        megatron_mimo.from_pretrained("runs/caption")
    assert ended.value.code == REFUSED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"no such directory is in {Path.cwd()}" in said


def test_parts_and_a_source_exclude_each_other(source) -> None:
    with pytest.raises(ValueError, match="expected either a source or language_model"):
        megatron_mimo.from_pretrained()
    with pytest.raises(ValueError, match="go with language_model="):
        megatron_mimo.from_pretrained(source, special_tokens={"images": "<image>"})
    with pytest.raises(ValueError, match="expected a tokenizer to give"):
        megatron_mimo.from_pretrained(language_model=source, special_tokens={"images": "<image>"})


def test_a_part_that_the_model_lacks_or_that_is_of_another_size_changes_nothing(source) -> None:
    model = megatron_mimo.MimoModel(tiny.mimo_config())
    before = {name: one.clone() for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}
    with pytest.raises(ValueError, match="(?s)setting: normalization.*linear_fc1.*do not fill"):
        megatron_mimo.load_pretrained(model, source)
    after = model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    with pytest.raises(ValueError, match="expected one of the modalities"):
        megatron_mimo.load_pretrained(
            megatron_mimo.from_pretrained(source),
            checkpoints.written(checkpoints.llava(), source.parent / "llava"),
        )


def test_export_needs_an_empty_directory_and_knows_where_the_model_came_from(source, tmp_path) -> None:
    model = megatron_mimo.from_pretrained(source)
    with pytest.raises(FileExistsError, match="Choose another"):
        megatron_mimo.save_pretrained(model, source)
    with pytest.raises(ValueError, match="has no origin"):
        megatron_mimo.save_pretrained(megatron_mimo.MimoModel(tiny.mimo_config()), tmp_path / "out")
    with pytest.raises(ValueError, match="expected a model of from_pretrained"):
        megatron_mimo.load_processor(megatron_mimo.MimoModel(tiny.mimo_config()))


def test_tensors_that_are_carried_along_are_found_where_the_source_has_moved(single_process, tmp_path) -> None:
    source = checkpoints.written(checkpoints.llava(), tmp_path / "llava")
    model = megatron_mimo.from_pretrained(source)
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=re.escape("encoder.layers.2")):
        megatron_mimo.save_pretrained(model, tmp_path / "out")
    megatron_mimo.save_pretrained(model, tmp_path / "out", source=moved)
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(moved / WEIGHTS).keys()


# What follows a checkpoint into training, and what no class of transformers holds ------------------------------------


def drawing(directory: Path) -> dict:
    """A language model that reads with a tower of LLaVA's and writes with a decoder of ours."""
    from tests.parity.test_hf_llava import text_directory, tower_directory

    return dict(
        language_model=text_directory(directory / "text", "llama-2"),
        encoders={"images": {"tower": tower_directory(directory / "tower", "clip", False)}},
        special_tokens={"images": "<image>"},
        decoders={"images": {"features": ModuleSpec(RegressionDecoder, params={"width": checkpoints.HIDDEN})}},
        generation_tokens={"images": "<draw>"},
    )


def test_a_model_with_decoders_is_what_it_was_after_saving_and_loading(single_process, tmp_path) -> None:
    model = megatron_mimo.from_pretrained(**drawing(tmp_path))
    megatron_mimo.save_pretrained(model, tmp_path / "saved")
    again = megatron_mimo.from_pretrained(tmp_path / "saved")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items() if isinstance(one, torch.Tensor))
    assert again.mimo_config.special_token_ids == model.mimo_config.special_token_ids
    assert again.mimo_config.generation_token_ids == model.mimo_config.generation_token_ids


def test_a_class_that_no_file_can_name_is_loaded_by_a_configuration_and_names(single_process, tmp_path, caplog) -> None:
    parts = drawing(tmp_path) | {"decoders": {"images": {"pixels": ModuleSpec(tiny.LinearDecoder)}}}
    model = megatron_mimo.from_pretrained(**parts)
    megatron_mimo.save_pretrained(model, tmp_path / "saved")
    assert "LinearDecoder" in caplog.text and "config=..." in caplog.text
    with pytest.raises(ValueError, match="parts of classes that no file can name"):
        megatron_mimo.from_pretrained(tmp_path / "saved")
    torch.manual_seed(99)
    again = megatron_mimo.from_pretrained(tmp_path / "saved", config=model.mimo_config)
    assert not again.training
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and any("decoders.pixels" in name for name in before)
    assert all(torch.equal(one, after[name]) for name, one in before.items() if isinstance(one, torch.Tensor))


def test_no_class_outside_the_list_is_taken_from_a_file(single_process, tmp_path) -> None:
    megatron_mimo.save_pretrained(megatron_mimo.from_pretrained(**drawing(tmp_path)), tmp_path / "saved")
    path = tmp_path / "saved" / "megatron_mimo.json"
    path.write_text(path.read_text().replace('"RegressionDecoder"', '"os.system"'))
    with pytest.raises(ValueError, match="expected one of the classes .*found 'os.system'"):
        megatron_mimo.from_pretrained(tmp_path / "saved")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="expected format 1, found 99"):
        megatron_mimo.from_pretrained(tmp_path / "saved")


def test_a_trainer_begins_from_a_checkpoint_and_its_masters_too(single_process, tmp_path) -> None:
    parts = drawing(tmp_path)
    config = megatron_mimo.pretrained_config(**parts, dtype=torch.bfloat16)
    trainer = Trainer(
        config,
        single_process,
        TrainerSettings(steps=1, progress=False),
        optimizer=OptimizerConfig(lr=1e-3),
        pretrained={"language_model": parts["language_model"]},
    )
    expected = load_file(parts["language_model"] / WEIGHTS)["model.norm.weight"].bfloat16()
    norm = trainer.models[0].language_model.decoder.final_layernorm.weight
    assert torch.equal(norm, expected)
    masters = [one for group in trainer.optimizer.param_groups for one in group["params"]]
    assert {one.dtype for one in masters} == {torch.float32}
    assert any(one.shape == norm.shape and torch.equal(one.detach().float(), expected.float()) for one in masters)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.4.input_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_bias", "decoder.layers.4.pre_mlp_layernorm.bias"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.4.self_attention.linear_qkv.weight"),
        ("decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
         "decoder.layers.4.mlp.experts.local_experts.3.linear_fc1.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc2.weight1",
         "decoder.layers.4.mlp.experts.local_experts.3.linear_fc2.weight"),
        ("decoder.final_norm.weight", "decoder.final_layernorm.weight"),
    ],
)  # fmt: skip
def test_spellings_of_a_name_are_one_name(theirs, ours) -> None:
    assert name_of(theirs, {0: 4}, first_expert=2) == ours


def test_hybrid_model_s_parameters_have_gpt_model_s_names(single_process) -> None:
    hybrid = megatron_mimo.MimoModel(
        tiny.mimo_config(tiny.hybrid_spec(tiny.language_config(num_layers=4), "*-*-"))
    ).language_model
    gpt = megatron_mimo.MimoModel(
        tiny.mimo_config(tiny.language_spec(tiny.language_config(num_layers=2)))
    ).language_model
    found = parameters_by_name(hybrid, layer_kinds="*-*-")
    expected = parameters_by_name(gpt)
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in expected.items()}


def own_config(source: Path, **changes) -> megatron_mimo.MimoModelConfig:
    """The configuration that a checkpoint has, with `changes` to its layers or its model."""
    config = megatron_mimo.pretrained_config(source)
    params = dict(config.language_model.params)
    of_model = {name: changes.pop(name) for name in list(changes) if name in params or name.startswith(("rope", "seq"))}
    params |= of_model | {"config": replace(params["config"], **changes)}
    return replace(config, language_model=replace(config.language_model, params=params), origin=None)


@pytest.mark.parametrize(
    "change",
    [
        {"layernorm_epsilon": 1e-3},
        {"window_size": (7, 0)},
        {"activation_func": torch.nn.functional.gelu},
        {"num_attention_heads": 8, "kv_channels": 4, "num_query_groups": 4},
        {"rotary_base": 500.0},
        {"rope_scaling": True},
        {"seq_len_interpolation_factor": 2.0},
        {"num_layers": 1},
    ],
)
def test_a_model_that_computes_something_else_than_the_checkpoint_is_refused(source, change) -> None:
    model = megatron_mimo.MimoModel(own_config(source))
    megatron_mimo.load_pretrained(model, source)  # which fits
    other = megatron_mimo.MimoModel(own_config(source, **change))
    before = other.language_model.decoder.final_layernorm.weight.clone()
    with pytest.raises(ValueError, match=f"setting: {next(iter(change))} is .* in the model, expected"):
        megatron_mimo.load_pretrained(other, source)
    assert torch.equal(other.language_model.decoder.final_layernorm.weight, before)


@pytest.mark.parametrize(
    "surplus",
    ["modality_submodules.images.decoders.features.more", "modality_submodules.sounds.decoders.x.y", "other"],
)
def test_a_tensor_of_our_own_file_that_no_part_of_the_model_has_is_told(single_process, tmp_path, surplus) -> None:
    megatron_mimo.save_pretrained(megatron_mimo.from_pretrained(**drawing(tmp_path)), tmp_path / "saved")
    file = tmp_path / "saved" / "megatron_mimo.safetensors"
    save_file(load_file(file) | {surplus: torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=f"surplus: {surplus}"):
        megatron_mimo.from_pretrained(tmp_path / "saved")


def test_pretrain_begins_from_the_directory_that_its_command_line_names(source, monkeypatch) -> None:
    from argparse import ArgumentParser

    from megatron_mimo.training.pretraining import provider
    from megatron_mimo.training.pretraining.arguments import add_mimo_args
    from megatron_mimo.training.pretraining.session import end_session

    sizes = dict.fromkeys(["tensor_model", "pipeline_model", "context", "expert_model"], 1)
    given = {f"{axis}_parallel_size": size for axis, size in sizes.items()}
    given |= dict(virtual_pipeline_model_parallel_size=None, expert_tensor_parallel_size=None, world_size=1)
    given |= dict(
        mtp_num_layers=None,
        seq_length=16,
        load=None,
        pretrained_checkpoint=None,
        finetune=False,
        seed=1,
        optimizer="adam",
        cuda_graph_impl="none",
    )
    expected = load_file(source / WEIGHTS)["model.norm.weight"]
    for options in ([], ["--pretrained", str(source)]):
        args = add_mimo_args(ArgumentParser()).parse_args(options)
        vars(args).update(given)
        monkeypatch.setattr("megatron.training.get_args", lambda args=args: args)
        try:
            model = provider.model_provider(lambda args: own_config(source))
        finally:
            end_session()
        assert torch.equal(model.language_model.decoder.final_layernorm.weight, expected) == bool(options)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": "four"},
        {"num_attention_heads": 3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    ],
    ids=["a word for a number", "heads that do not divide", "scaling without its factor"],
)
def test_a_configuration_that_transformers_refuses_is_one_error_with_the_file(
    source, nothing_is_built, changes
) -> None:
    edit(source, **changes)
    with pytest.raises(ValueError, match=r"model/config\.json: transformers does not read it"):
        megatron_mimo.from_pretrained(source)


def test_a_tensor_in_two_spellings_is_refused(single_process, nothing_is_built, tmp_path) -> None:
    source = checkpoints.written(checkpoints.llava("clip"), tmp_path / "llava")

    def change(tensors):
        tensors["lm_head.weight"] = torch.zeros_like(tensors["language_model.lm_head.weight"])

    rewrite(source, change)
    with pytest.raises(ValueError, match="two spellings of language_model.lm_head.weight"):
        megatron_mimo.from_pretrained(source)


def test_a_header_whose_spans_are_wrong_is_refused_before_anything_is_built(source, nothing_is_built) -> None:
    content = (source / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][0] += 4
    written = json.dumps(header, separators=(",", ":")).encode()
    (source / WEIGHTS).write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    with pytest.raises(
        ValueError, match=r"model\.safetensors: expected a safetensors file, found a header that is wrong"
    ):
        megatron_mimo.from_pretrained(source)


def test_a_directory_of_somebody_else_s_is_not_thrown_away(source, tmp_path) -> None:
    model = megatron_mimo.from_pretrained(source)
    mine = tmp_path / "out.partial" / "mine"
    mine.parent.mkdir()
    mine.write_text("kept")
    with pytest.raises(FileExistsError, match="found one of somebody else"):
        megatron_mimo.save_pretrained(model, tmp_path / "out")
    assert mine.read_text() == "kept"
    mine.unlink()
    (mine.parent / ".being_written").touch()  # as a save that was killed leaves it
    megatron_mimo.save_pretrained(model, tmp_path / "out")
    assert not mine.parent.exists() and not (tmp_path / "out" / ".being_written").exists()


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        ("tensor", r"size 3: expected one of \[1, 2, 4\], which share out the language model: 4 heads, 2 groups"),
        ("pipeline", "size 3 .* do not share out the language model's 2 layers"),
    ],
)
def test_a_layout_that_does_not_share_a_model_out_is_refused(axis, told, tmp_path, no_run, nothing_is_built) -> None:
    checkpoints.written(checkpoints.language_model("llama-2"), tmp_path)
    with pretended(Layout(3, **{f"{axis}_model_parallel_size": 3})), pytest.raises(ValueError, match=told):
        megatron_mimo.from_pretrained(tmp_path)
