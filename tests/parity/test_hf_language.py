"""Language models against `transformers`: hidden states, logits, a gradient step, and every field that matters."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import megatron_mimo
from megatron_mimo.language import HiddenStates
from tests import checkpoints, tiny
from tests.checkpoints import LANGUAGE_MODELS, TOLERANCE, difference


def ours(directory) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and last hidden states `[B, S, ...]` of the directory's model."""
    model = megatron_mimo.from_pretrained(directory)
    with torch.no_grad(), HiddenStates(model.language_model.decoder) as states:
        logits = model(checkpoints.ids())[0]
    return logits, states.last.transpose(0, 1)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_hidden_states_and_logits_are_those_of_transformers(single_process, tmp_path, name) -> None:
    theirs = checkpoints.language_model(name)
    with torch.no_grad():
        expected = theirs(checkpoints.ids(), output_hidden_states=True)
    logits, states = ours(checkpoints.written(theirs, tmp_path / "model"))
    assert difference(logits, expected.logits) < TOLERANCE
    assert difference(states, expected.hidden_states[-1]) < TOLERANCE


# Each changes the computation alone: the tensors that it needs stay the same.
MUTATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama-2", {"rms_norm_eps": 1e-1}),
    ("llama-2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama-3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama-3", {"rope_parameters": checkpoints.LLAMA3 | {"factor": 4.0}}),
    ("llama-interpolated-1-group", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    ("mistral", {"sliding_window": checkpoints.WINDOW + 1}),
    ("mistral", {"sliding_window": None}),
    ("qwen2-windows", {"sliding_window": checkpoints.WINDOW - 1}),
    ("qwen2-windows", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2-windows", {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
    ("qwen3", {"rms_norm_eps": 1e-1}),
]


@pytest.mark.parametrize(("name", "change"), MUTATIONS)
def test_a_field_that_is_read_wrongly_would_be_seen(single_process, tmp_path, name, change) -> None:
    theirs = checkpoints.language_model(name)
    with torch.no_grad():
        expected = theirs(checkpoints.ids()).logits
    directory = checkpoints.written(theirs, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    assert difference(ours(directory)[0], expected) > 10 * TOLERANCE


@pytest.mark.parametrize("change", [{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}])
def test_heads_that_share_tensors_of_the_same_shapes_are_told_apart(single_process, tmp_path, change) -> None:
    theirs = checkpoints.language_model("llama-2")
    with torch.no_grad():
        expected = theirs(checkpoints.ids()).logits
    directory = checkpoints.written(theirs, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    assert difference(ours(directory)[0], expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_comes_in_goes_out_byte_for_byte_and_transformers_loads_it(single_process, tmp_path, name) -> None:
    theirs = checkpoints.language_model(name)
    source = checkpoints.written(theirs, tmp_path / "model")
    megatron_mimo.save_pretrained(megatron_mimo.from_pretrained(source), tmp_path / "exported")
    expected, found = stored(source), stored(tmp_path / "exported")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not same_bytes(expected[name], found[name])] == []
    again, report = type(theirs).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values())
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, tmp_path / "exported")]
    assert configs[0] == configs[1]
    with torch.no_grad():
        assert torch.equal(again.eval()(checkpoints.ids()).logits, theirs(checkpoints.ids()).logits)


def stored(directory) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: one for file in sorted(directory.glob("*.safetensors")) for name, one in load_file(file).items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("name", ["llama-3", "mistral", "qwen2-tied", "qwen3"])
def test_a_gradient_step_here_is_one_there(single_process, tmp_path, name) -> None:
    theirs = checkpoints.language_model(name)
    model = megatron_mimo.from_pretrained(checkpoints.written(theirs, tmp_path / "model")).train()
    ids = checkpoints.ids()
    theirs.train()(input_ids=ids, labels=ids).loss.backward()
    counts = torch.ones(ids.shape)
    counts[:, -1] = 0  # which has no next token
    losses, mask = model(ids, labels=ids.roll(-1, 1), loss_mask=counts)
    ((losses * mask).sum() / mask.sum()).backward()
    for stepped in (theirs, model):
        torch.optim.SGD(stepped.parameters(), lr=0.1).step()
    megatron_mimo.save_pretrained(model, tmp_path / "stepped")
    expected, found = theirs.state_dict(), stored(tmp_path / "stepped")
    for name, tensor in found.items():
        # Gradients of deep sums in another order; the step itself changes weights by 1e-2.
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_an_index_of_three_files_and_bfloat16_come_in_and_go_out(single_process, tmp_path) -> None:
    theirs = checkpoints.language_model("qwen2-tied").to(torch.bfloat16)
    source = checkpoints.written(theirs, tmp_path / "model", max_shard_size="16KB")
    assert len(list(source.glob("*.safetensors"))) == 3
    model = megatron_mimo.from_pretrained(source)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    megatron_mimo.save_pretrained(model, tmp_path / "exported", max_shard_bytes=16_000)
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) == 3
    expected, found = stored(source), stored(tmp_path / "exported")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not same_bytes(expected[name], found[name])] == []
    whole = megatron_mimo.from_pretrained(source, dtype=torch.float32)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    again = type(theirs).from_pretrained(source, dtype=torch.float32).eval()  # which keeps its frequencies whole
    with torch.no_grad():
        assert difference(whole(checkpoints.ids())[0], again(checkpoints.ids()).logits) < TOLERANCE


def test_an_older_configuration_s_spelling_is_the_same_model(single_process, tmp_path) -> None:
    theirs = checkpoints.language_model("llama-2", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    directory = checkpoints.written(theirs, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 500.0, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    (directory / "config.json").write_text(json.dumps(config))
    again, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert difference(ours(directory)[0], again.eval()(checkpoints.ids()).logits) < TOLERANCE
        assert difference(ours(directory)[0], theirs(checkpoints.ids()).logits) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-2", "qwen3"])
def test_a_hybrid_model_is_filled_from_the_same_table_and_computes_the_same(single_process, tmp_path, name) -> None:
    theirs = checkpoints.language_model(name)
    directory = checkpoints.written(theirs, tmp_path / "model")
    params = megatron_mimo.pretrained_config(directory).language_model.params
    own = {key: params[key] for key in ("vocab_size", "rotary_base", "share_embeddings_and_output_weights")}
    config = replace(params["config"], num_layers=4)  # attention and MLP are a layer each
    spec = tiny.hybrid_spec(config, "*-*-", max_sequence_length=512, **own)
    model = megatron_mimo.MimoModel(megatron_mimo.MimoModelConfig(spec)).eval()
    megatron_mimo.load_pretrained(model, directory)
    with torch.no_grad():
        assert difference(model(checkpoints.ids())[0], theirs(checkpoints.ids()).logits) < TOLERANCE
