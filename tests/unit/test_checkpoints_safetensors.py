"""Weights of a checkpoint in a file that any program reads."""

import pytest
import torch

from megatron_mimo.compat.megatron import writers_report_here
from megatron_mimo.training.checkpoints.safetensors import export_weights
from tests import evil, tiny
from tests.unit.test_training_trainer import one_batch, trainer


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_weights_of_a_checkpoint_are_read_without_this_library(precision, single_process, tmp_path):
    load_file = pytest.importorskip("safetensors.torch", reason="safetensors comes with transformers").load_file
    config = tiny.language_config(params_dtype=precision, bf16=precision == torch.bfloat16)
    ours = trainer(single_process, tiny.mimo_config(tiny.language_spec(config)), steps=2, directory=tmp_path)
    ours.train(one_batch)
    names = export_weights(tmp_path / "step_00000002", tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert sorted(found) == names and not any(name.startswith("optimizer") for name in names)
    layers = "language_model.decoder.layers."
    for name, weight in ours.models[0].named_parameters():
        if name.startswith(layers):
            number, _, rest = name.removeprefix(layers).partition(".")
            # A norm before a linear layer is named as TransformerEngine has it, which fuses the two.
            for ours_, theirs in (
                ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
                ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
            ):
                rest = rest.replace(ours_, theirs)
            assert found[layers + rest][int(number)].equal(weight), name
        else:
            assert found[name].equal(weight), name
    assert sum(value.numel() for value in found.values()) == sum(p.numel() for p in ours.models[0].parameters())


def test_an_evil_checkpoint_is_not_exported(single_process, tmp_path):
    trainer(single_process, steps=2, directory=tmp_path).train(one_batch)
    evil.KINDS["in_the_description"](tmp_path / "step_00000002", tmp_path / "marker")
    with pytest.raises(ValueError, match="is not the description of a checkpoint"):
        export_weights(tmp_path / "step_00000002", tmp_path / "model.safetensors")
    assert not (tmp_path / "marker").exists() and not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_that_has_changed_since_it_was_written_is_not_exported(single_process, tmp_path):
    trainer(single_process, steps=2, directory=tmp_path).train(one_batch)
    shard = tmp_path / "step_00000002" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="is not whole, .*__0_0.distcp: changed since it was written"):
        export_weights(tmp_path / "step_00000002", tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*model.safetensors"))


def test_a_dtype_that_the_format_lacks_is_refused(single_process, tmp_path):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    state = {"x": ShardedTensor.from_rank_offsets("x", torch.zeros(2, dtype=torch.complex64))}
    with writers_report_here():  # Megatron's process for reports may be gone by now
        dist_checkpointing.save(state, str(tmp_path))
    with pytest.raises(ValueError, match="x has dtype torch.complex64, which safetensors lacks"):
        export_weights(tmp_path, tmp_path / "model.safetensors")
