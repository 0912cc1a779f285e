"""Parts of a model load alone, with a report; both loops read each other's checkpoints."""

import logging
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_mimo import specs
from megatron_mimo.compat.checkpoints import directory_to_load
from megatron_mimo.compat.megatron import writers_report_here
from megatron_mimo.training import TrainingControl
from megatron_mimo.training.checkpoints.loop import functions
from megatron_mimo.training.checkpoints.manifest import Damaged
from megatron_mimo.training.checkpoints.writing import Saver
from megatron_mimo.training.pretraining.checks import check_resumed
from tests import evil, tiny
from tests.unit.test_checkpoints_identity import ADAM, as_release_0_1, vocabulary_of
from tests.unit.test_checkpoints_whole import Unchanged, flip
from tests.unit.test_training_pretraining import loading
from tests.unit.test_training_trainer import one_batch, trainer


def text_alone():
    return tiny.mimo_config(
        modality_submodules={}, special_token_ids={}, generation_token_ids={}, modality_loss_weights={}
    )


def images_alone():
    return tiny.mimo_config(modality_submodules={"images": tiny.image_spec()}, special_token_ids={"images": tiny.READ})


def text_batch(step, rank, size):
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(step))
    return [dict(input_ids=ids, labels=ids.roll(-1, 1))]


def weights(ours) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in ours.models[0].named_parameters()}


def test_a_language_model_loads_into_a_model_of_several_modalities_with_a_report(single_process, tmp_path):
    first = trainer(single_process, text_alone(), steps=2, directory=tmp_path)
    first.train(text_batch)
    ours = trainer(single_process)
    before = weights(ours)
    report = ours.load_parts(tmp_path / "step_00000002")
    assert {name.partition(".")[0] for name in report.loaded} == {"language_model"} and not report.left_out
    assert {name.partition(".")[0] for name in report.initialised} == {"modality_submodules"}
    for name, value in weights(ours).items():
        assert value.equal(weights(first)[name] if name.startswith("language_model") else before[name]), name
    assert "kept as initialised: modality_submodules.audio" in str(report)
    # A step goes on from the weights that were loaded, in the optimizer's copies too.
    assert ours.train_step(one_batch).step == 0


def test_a_language_model_that_was_trained_by_itself_loads_by_its_own_names(single_process, tmp_path):
    torch.manual_seed(7)
    config = tiny.language_config()
    alone = GPTModel(
        config=config,
        transformer_layer_spec=specs.language_layer_spec(config),
        vocab_size=tiny.VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="rope",
    )
    with writers_report_here():  # Megatron's process for reports may be gone by now
        dist_checkpointing.save(alone.sharded_state_dict(), str(tmp_path))
    ours = trainer(single_process)
    report = ours.load_parts(tmp_path)
    assert not report.left_out and report.loaded
    for name, value in alone.named_parameters():
        assert dict(ours.models[0].language_model.named_parameters())[name].equal(value), name


def test_a_model_with_one_modality_less_loads_and_its_new_modality_keeps_its_initialisation(
    single_process, tmp_path, caplog
):
    first = trainer(single_process, images_alone(), steps=2, directory=tmp_path)
    first.train(text_batch)
    ours = trainer(single_process)
    with caplog.at_level(logging.WARNING, "megatron_mimo"):
        report = ours.load_parts(tmp_path / "step_00000002")
    assert "modality 'audio': not there, here" in caplog.text
    assert {name.split(".")[1] for name in report.initialised} == {"audio"} and not report.left_out
    back = trainer(single_process, images_alone())
    ours.settings = trainer(single_process, directory=tmp_path / "more").settings
    report = back.load_parts(ours.save())
    assert {name.split(".")[1] for name in report.left_out} == {"audio"} and not report.initialised
    assert all(value.equal(weights(ours)[name]) for name, value in weights(back).items())


def test_the_parts_that_are_named_load_and_others_stay(single_process, tmp_path):
    first = trainer(single_process, steps=2, directory=tmp_path)
    first.train(one_batch)
    ours = trainer(single_process)
    before = weights(ours)
    report = ours.load_parts(tmp_path / "step_00000002", ["images/encoders"])
    assert report.loaded == (
        "modality_submodules.images.encoders.patches.linear.bias",
        "modality_submodules.images.encoders.patches.linear.weight",
    )
    for name, value in weights(ours).items():
        assert value.equal(weights(first)[name] if name in report.loaded else before[name])


def test_parts_that_cannot_load_are_refused_and_nothing_changes(single_process, tmp_path):
    first = trainer(single_process, text_alone(), steps=2, directory=tmp_path)
    first.train(text_batch)
    path = tmp_path / "step_00000002"
    ours = trainer(single_process)
    with Unchanged(ours):
        with pytest.raises(ValueError, match="has none of the weights asked for: it has language_model"):
            ours.load_parts(path, ["audio"])
        with pytest.raises(ValueError, match="the model has no part 'sound'"):
            ours.load_parts(path, ["sound"])
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            ours.load_parts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"word_embeddings.weight: 64 rows there, 62 here"):
        trainer(single_process, vocabulary_of(62)).load_parts(path)
    wide = tiny.mimo_config(tiny.language_spec(tiny.language_config(ffn_hidden_size=96)))
    other = trainer(single_process, wide)
    with Unchanged(other), pytest.raises(ValueError, match=r"linear_fc1.weight: \[2, 64, 32\] there, \[2, 96, 32\]"):
        other.load_parts(path)
    flip(path / "__0_0.distcp", 9000)
    with Unchanged(ours), pytest.raises(Damaged):
        ours.load_parts(path)
    evil.in_an_object(path, tmp_path / "marker")
    evil.seal(path)
    with Unchanged(ours), pytest.raises(ValueError, match="is not data alone"):
        ours.load_parts(path)
    assert not (tmp_path / "marker").exists()


def megatrons(path: Path, ours) -> Path:
    """A checkpoint as Megatron's loop writes it, without what this library adds."""
    path = path / "iter_0000003"
    path.mkdir(parents=True)
    state = {"iteration": 3, "checkpoint_version": 3.0, "model": ours.models[0].sharded_state_dict()}
    with writers_report_here():  # Megatron's process for reports may be gone by now
        dist_checkpointing.save(state, str(path), content_metadata={})
    return path


def test_a_trainer_reads_the_weights_of_megatrons_loop(single_process, tmp_path):
    torch.manual_seed(11)
    first = trainer(single_process)
    first.train_step(one_batch)
    path = megatrons(tmp_path, first)
    ours = trainer(single_process)
    assert not ours.load_parts(path).initialised
    assert all(value.equal(weights(first)[name]) for name, value in weights(ours).items())
    (path / "complete").touch()  # as this library's pretrain has it
    assert trainer(single_process).load(path, weights_only=True) == 0
    with pytest.raises(ValueError, match="is not a Trainer's: .*weights_only=True"):
        trainer(single_process).load(path)


def test_megatrons_loop_finds_the_weights_of_a_trainer(single_process, tmp_path):
    trainer(single_process, steps=2, save_every=1, directory=tmp_path, optimizer=ADAM).train(one_batch)
    for given, found in ((tmp_path, "step_00000002"), (tmp_path / "step_00000001", "step_00000001")):
        args = loading(given, save=None)
        check_resumed(args, TrainingControl(), tiny.mimo_config())
        release = Path(args.load) / "release"
        assert release.resolve().name == found
        assert (Path(args.load) / "latest_checkpointed_iteration.txt").read_text() == "release"
    evil.in_an_object(tmp_path / "step_00000002", tmp_path / "marker")
    evil.seal(tmp_path / "step_00000002")
    with pytest.raises(ValueError, match="is not data alone"):
        check_resumed(loading(tmp_path, save=None), TrainingControl(), tiny.mimo_config())


@pytest.mark.parametrize("harmed", ["__0_0.distcp", "mimo.json", "complete"])
def test_megatrons_loop_takes_the_newest_whole_checkpoint_of_a_trainer(harmed, single_process, tmp_path, caplog):
    trainer(single_process, steps=3, save_every=1, directory=tmp_path, optimizer=ADAM).train(one_batch)
    (tmp_path / "step_00000004").mkdir()
    flip(tmp_path / "step_00000003" / harmed, 200)
    (tmp_path / "step_00000002" / "metadata.json").unlink()
    args = loading(tmp_path, save=None)
    with caplog.at_level(logging.WARNING, "megatron_mimo"):
        check_resumed(args, TrainingControl(), tiny.mimo_config())
    assert (Path(args.load) / "release").resolve().name == "step_00000001"
    assert "step_00000004 was cut short" in caplog.text and "step_00000003 is not whole" in caplog.text
    assert "step_00000002 is not whole, and the one before it is taken: metadata.json: missing" in caplog.text


def iterations(root: Path, single_process) -> None:
    """Checkpoints of three steps, as pretrain has them: a Trainer's under other names."""
    trainer(single_process, steps=3, save_every=1, directory=root, optimizer=ADAM).train(one_batch)
    for step in (1, 2, 3):
        (root / f"step_{step:08d}").rename(root / f"iter_{step:07d}")
    (root / "latest_checkpointed_iteration.txt").write_text("3")


HARM = {
    "missing": lambda path: shutil.rmtree(path),
    "without a file": lambda path: (path / "__0_0.distcp").unlink(),
    "cut": lambda path: os.truncate(path / "__0_0.distcp", 1000),
    "without its end": lambda path: (path / "complete").write_bytes(b""),
}


@pytest.mark.parametrize("harm", HARM)
def test_megatrons_loop_takes_the_newest_iteration_that_is_whole_for_one_that_was_cut_short(
    harm, single_process, tmp_path, caplog
):
    iterations(tmp_path, single_process)
    check_resumed(whole := loading(tmp_path), TrainingControl(), tiny.mimo_config())
    assert whole.ckpt_step is None
    HARM[harm](tmp_path / "iter_0000003")
    (tmp_path / "iter_0000002" / "metadata.json").unlink()
    args = loading(tmp_path)
    with caplog.at_level(logging.WARNING, "megatron_mimo"):
        check_resumed(args, TrainingControl(), tiny.mimo_config())
    assert args.ckpt_step == 1 and args.load == str(tmp_path)
    assert "iter_0000003 is not whole, and iter_0000001 is taken" in caplog.text
    # A step that somebody names is loaded or refused, and so are weights to begin with.
    expected = "names iter_0000003, which is not there" if harm == "missing" else "iter_0000003"
    for named in (loading(tmp_path, ckpt_step=3), loading(None, pretrained_checkpoint=str(tmp_path))):
        with pytest.raises(ValueError, match=expected):
            check_resumed(named, TrainingControl(), tiny.mimo_config())
            reads(named)
    for step in (1, 2):
        HARM[harm](tmp_path / f"iter_{step:07d}")
    with pytest.raises(ValueError, match=expected):
        check_resumed(again := loading(tmp_path), TrainingControl(), tiny.mimo_config())
        reads(again)


def reads(args: Namespace) -> None:
    """Loads as Megatron's loop does what `args` name."""
    path = directory_to_load(args, args.load or args.pretrained_checkpoint)
    functions(tiny.mimo_config, Saver())["load"]({}, str(path))


def test_an_iteration_that_changed_is_refused_with_the_option_that_loads_the_one_before(single_process, tmp_path):
    iterations(tmp_path, single_process)
    flip(tmp_path / "iter_0000003" / "__0_0.distcp", 5000)
    check_resumed(args := loading(tmp_path), TrainingControl(), tiny.mimo_config())
    with pytest.raises(Damaged, match=r"changed since it was written\n--ckpt-step 2 loads iter_0000002\."):
        reads(args)


@pytest.mark.parametrize("there", [(), ("notes.txt",), ("iter_0000002/part",), ("model.safetensors",)])
def test_megatrons_loop_does_not_begin_with_random_weights_where_a_checkpoint_was_asked_for(there, tmp_path):
    for name in there:
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).touch()
    given = tmp_path / "given"
    for save in (None, str(tmp_path / "other")):
        with pytest.raises(ValueError, match="--load .*given: no checkpoint to load there, and training would begin"):
            check_resumed(loading(given, save=save), TrainingControl(), tiny.mimo_config())
    if "iter_0000002/part" in there:
        with pytest.raises(ValueError, match="found \\['iter_0000002'\\]"):
            check_resumed(loading(given), TrainingControl(), tiny.mimo_config())
    else:
        check_resumed(loading(given), TrainingControl(), tiny.mimo_config())  # it will save there
    with pytest.raises(ValueError, match="--pretrained-checkpoint .*nowhere: no checkpoint"):
        arguments = loading(None, pretrained_checkpoint=str(tmp_path / "nowhere"))
        check_resumed(arguments, TrainingControl(), tiny.mimo_config())


def test_a_step_that_is_named_and_not_there_is_refused_and_one_that_made_room_is_put_back(single_process, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ValueError, match="names iter_0000003, which is not there"):
        check_resumed(loading(tmp_path), TrainingControl(), tiny.mimo_config())
    path = megatrons(tmp_path, trainer(single_process))
    (path / "complete").touch()
    path.rename(tmp_path / "old_iter_0000003")
    check_resumed(loading(tmp_path), TrainingControl(), tiny.mimo_config())
    assert path.is_dir() and not (tmp_path / "old_iter_0000003").exists()


def test_checkpoints_of_release_0_1_load_also_in_part(single_process, tmp_path):
    first = trainer(single_process, steps=2, directory=tmp_path, optimizer=ADAM)
    first.train(one_batch)
    as_release_0_1(tmp_path / "step_00000002")
    ours = trainer(single_process, steps=3, optimizer=ADAM)
    assert not ours.load_parts(tmp_path / "step_00000002").initialised
    assert ours.load(tmp_path / "step_00000002") == 2
