"""What the model is, is kept in a checkpoint and compared before anything is loaded."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

import megatron_mimo
from megatron_mimo.decoders.regression import RegressionDecoder
from megatron_mimo.training import Trainer, TrainerSettings, TrainingControl
from megatron_mimo.training.checkpoints import identity
from megatron_mimo.training.checkpoints.loop import adapted
from megatron_mimo.training.pretraining.checks import check_resumed
from tests import evil, tiny
from tests.unit.test_training_pretraining import loading
from tests.unit.test_training_trainer import one_batch, trainer

ADAM = OptimizerConfig(lr=1e-2)


@pytest.fixture
def checkpoint(single_process, tmp_path) -> Path:
    trainer(single_process, steps=2, directory=tmp_path, optimizer=ADAM).train(one_batch)
    return tmp_path / "step_00000002"


def vocabulary_of(rows: int, **changes) -> megatron_mimo.MimoModelConfig:
    return tiny.mimo_config(tiny.language_spec(vocab_size=rows), **changes)


REGRESSION = ModuleSpec(module=RegressionDecoder, params=dict(width=tiny.HIDDEN, target_width=tiny.PIXELS))
OTHERS = {
    "smaller vocabulary": (
        lambda: vocabulary_of(62),
        "vocabulary: 64 tokens there, 62 here; a smaller vocabulary cannot hold its rows",
    ),
    "special id": (
        lambda: tiny.mimo_config(special_token_ids={"images": -201, "audio": tiny.HEAR}),
        "special_token_ids['images']: -200 there, -201 here",
    ),
    "swapped ids": (
        lambda: tiny.mimo_config(special_token_ids={"images": tiny.HEAR, "audio": tiny.READ}),
        "special_token_ids['audio']: 9000000 there, -200 here",
    ),
    "generation id": (
        lambda: tiny.mimo_config(generation_token_ids={"images": 60}),
        "generation_token_ids['images']: 61 there, 60 here",
    ),
    "begin token": (
        lambda: tiny.mimo_config(begin_token_ids={"images": 59}),
        "begin_token_ids['images']: none there, 59 here",
    ),
    "end token": (
        lambda: tiny.mimo_config(end_token_ids={"images": 58}),
        "end_token_ids['images']: none there, 58 here",
    ),
    "modality removed": (
        lambda: tiny.mimo_config(
            modality_submodules={"images": tiny.image_spec()}, special_token_ids={"images": tiny.READ}
        ),
        "modality 'audio': there, not here",
    ),
    "modality added": (
        lambda: tiny.mimo_config(
            modality_submodules={"images": tiny.image_spec(), "audio": tiny.audio_spec(), "sound": tiny.audio_spec()},
            special_token_ids={"images": tiny.READ, "audio": tiny.HEAR, "sound": -5},
        ),
        "modality 'sound': not there, here",
    ),
    "decoder kind": (
        lambda: tiny.mimo_config(
            modality_submodules={"images": tiny.image_spec(decoders={"pixels": REGRESSION}), "audio": tiny.audio_spec()}
        ),
        "decoder 'pixels' of 'images': LinearDecoder there, RegressionDecoder here",
    ),
    "decoder name": (
        lambda: tiny.mimo_config(
            modality_submodules={
                "images": tiny.image_spec(decoders={"dots": ModuleSpec(module=tiny.LinearDecoder)}),
                "audio": tiny.audio_spec(),
            }
        ),
        "decoder 'dots' of 'images': none there, LinearDecoder here",
    ),
    "spans that see the whole of themselves": (
        lambda: tiny.mimo_config(whole_spans={"images"}),
        "whole_spans: none there, images here",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_by_both_loops_and_nothing_changes(
    other, checkpoint, single_process, tmp_path
):
    build, message = OTHERS[other]
    config = build()
    ours = trainer(single_process, config, optimizer=ADAM)
    before = {name: p.detach().clone() for name, p in ours.models[0].named_parameters()}
    for options in (dict(), dict(weights_only=True)):
        with pytest.raises(ValueError, match="is of another model, or of other options:") as refused:
            ours.load(checkpoint, **options)
        assert message in str(refused.value)
    assert all(p.equal(before[name]) for name, p in ours.models[0].named_parameters())
    checkpoint.rename(tmp_path / "iter_0000002")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    with pytest.raises(ValueError, match="is of another model, or of other options:"):
        check_resumed(loading(tmp_path), TrainingControl(), config)
    with adapted(lambda: config), pytest.raises(ValueError, match="is of another model, or of other options:"):
        dist_checkpointing.load(ours.models[0].sharded_state_dict(), str(tmp_path / "iter_0000002"))
    assert all(p.equal(before[name]) for name, p in ours.models[0].named_parameters())


def test_all_differences_are_told_at_once(checkpoint, single_process):
    config = vocabulary_of(62, special_token_ids={"images": -1, "audio": -2}, generation_token_ids={"images": 60})
    with pytest.raises(ValueError) as refused:
        trainer(single_process, config).load(checkpoint, weights_only=True)
    told = str(refused.value)
    assert all(part in told for part in ("64 tokens there, 62 here", "-200 there, -1 here", "61 there, 60 here"))


def test_what_the_model_is_is_json_that_a_reader_understands(checkpoint):
    assert json.loads((checkpoint / "mimo.json").read_text())["model"] == {
        "vocabulary": 64,
        "special_token_ids": {"audio": 9_000_000, "images": -200},
        "generation_token_ids": {"images": 61},
        "begin_token_ids": {},
        "end_token_ids": {},
        "decoders": {"audio": {}, "images": {"pixels": "LinearDecoder"}},
        "whole_spans": [],
    }


def test_a_checkpoint_from_before_whole_spans_does_not_speak_of_them():
    ours = identity.identity_of(tiny.mimo_config(whole_spans={"images"}))
    assert not identity.differences({name: value for name, value in ours.items() if name != "whole_spans"}, ours)


SPANS = '{"format": 1, "model": {"vocabulary": 64, "decoders": {}, "whole_spans": 3}, "files": {}, "losses": {}}'
MODELLESS = ["", "{", "[]", '{"format": 1}', '{"format": 1, "model": {}}', '{"model": {}}']


@pytest.mark.parametrize("content", [*MODELLESS, SPANS])
def test_a_file_of_another_content_is_refused(content, checkpoint, single_process):
    (checkpoint / "mimo.json").write_text(content)
    with pytest.raises(ValueError, match="is not the file that was written with this checkpoint"):
        trainer(single_process).load(checkpoint)
    (checkpoint / "complete").write_text(hashlib.sha256(content.encode()).hexdigest())
    with pytest.raises(ValueError, match="does not say what the checkpoint is"):
        trainer(single_process).load(checkpoint)


def test_a_file_of_a_later_format_is_refused_and_none_is_of_release_0_1(checkpoint, single_process):
    evil.seal(checkpoint, format=99, model={"shape": 3})
    with pytest.raises(ValueError, match="has format 99, expected at most 1: a later release"):
        trainer(single_process).load(checkpoint)
    as_release_0_1(checkpoint)
    assert trainer(single_process, optimizer=ADAM).load(checkpoint) == 2


def as_release_0_1(checkpoint: Path) -> None:
    """It knew no hashes."""
    (checkpoint / "mimo.json").unlink()
    (checkpoint / "complete").write_text("")


def test_without_the_file_the_rows_of_a_smaller_vocabulary_are_still_too_many(checkpoint, single_process):
    as_release_0_1(checkpoint)
    with pytest.raises(ValueError, match="word_embeddings.weight: 64 rows there, 62 here"):
        trainer(single_process, vocabulary_of(62)).load(checkpoint, weights_only=True)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["state", "weights"])
def test_new_rows_of_a_larger_vocabulary_keep_their_initialisation_also_after_a_step(
    distributed, precision, weights_only, single_process, tmp_path, caplog
):
    changes = dict(bf16=True, params_dtype=torch.bfloat16) if precision == "bf16" else {}

    def ours(rows: int) -> Trainer:
        torch.manual_seed(3)
        language = tiny.language_spec(tiny.language_config(**changes), vocab_size=rows)
        return Trainer(
            tiny.mimo_config(language),
            single_process,
            TrainerSettings(steps=2, decay="constant", progress=False, directory=tmp_path),
            optimizer=replace(ADAM, weight_decay=0.0, use_distributed_optimizer=distributed),
            ddp=DistributedDataParallelConfig(use_distributed_optimizer=distributed),
        )

    first = ours(64)
    first.train(one_batch)
    grown = ours(72)
    tables = [grown.models[0].language_model.embedding.word_embeddings.weight]
    tables.append(grown.models[0].language_model.output_layer.weight)
    before = [table.detach().clone() for table in tables]
    with caplog.at_level(logging.INFO, "megatron_mimo"):
        assert grown.load(tmp_path / "step_00000002", weights_only=weights_only) == (0 if weights_only else 2)
    theirs = dict(first.models[0].named_parameters())
    assert tables[0][:64].equal(theirs["language_model.embedding.word_embeddings.weight"])
    assert tables[1][:64].equal(theirs["language_model.output_layer.weight"])
    for table, old in zip(tables, before):
        assert table[64:].equal(old[64:]) and table[64:].abs().max() > 0
    said = "word_embeddings.weight: the checkpoint has rows 0 to 63, rows 64 to 71 keep their initialisation"
    assert said in caplog.text
    # A step reaches the embedding's new rows with no gradient: they stay, also in the optimizer's own copies.
    grown.train_step(one_batch)
    assert tables[0][64:].equal(before[0][64:])


def test_a_decoder_is_known_by_its_class_or_by_the_function_that_builds_it():
    def drawing() -> tiny.LinearDecoder:
        return tiny.LinearDecoder()

    images = tiny.image_spec(decoders={"class": ModuleSpec(module=tiny.LinearDecoder), "made": drawing})
    config = tiny.mimo_config(modality_submodules={"images": images, "audio": tiny.audio_spec()})
    assert identity.identity_of(config)["decoders"]["images"] == {"class": "LinearDecoder", "made": "drawing"}
