"""The small training loop in one process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.training import CheckpointSettings, Trainer, TrainerSettings, TrainingControl
from tests import tiny


def sgd(**changes) -> OptimizerConfig:
    return OptimizerConfig(
        **{**dict(optimizer="sgd", lr=0.1, clip_grad=0.0, weight_decay=0.0, sgd_momentum=0.0), **changes}
    )


def one_batch(step, rank, size):
    return [tiny.batch(0)]


def trainer(run, config=None, control=None, optimizer=None, **settings) -> Trainer:
    torch.manual_seed(3)
    settings = TrainerSettings(**{**dict(steps=4, decay="constant", progress=False), **settings})
    return Trainer(config or tiny.mimo_config(), run, settings, optimizer=optimizer or sgd(), control=control)


def test_one_step_moves_every_weight_by_the_gradient_of_the_whole_loss(single_process):
    ours = trainer(single_process)
    before = {name: p.detach().clone() for name, p in ours.models[0].named_parameters()}
    report = ours.train_step(one_batch)
    reference = tiny.megatron_mimo.MimoModel(tiny.mimo_config())
    reference.load_state_dict(before, strict=False)
    loss = tiny.total(reference, tiny.batch(0))
    loss.backward()
    assert report.losses["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in reference.named_parameters():
        moved = dict(ours.models[0].named_parameters())[name].detach()
        torch.testing.assert_close(moved, before[name] - 0.1 * parameter.grad, rtol=1e-5, atol=1e-7)


def test_loss_goes_down(single_process):
    history = trainer(single_process, steps=20, optimizer=OptimizerConfig(lr=1e-2)).train(one_batch)
    assert history.steps[-1].losses["loss"] < 0.5 * history.steps[0].losses["loss"]


def test_terms_that_a_step_counts_nothing_of_are_left_out(single_process):
    ids = torch.tensor([[1, 2, 3, 4]])
    report = trainer(single_process).train_step(lambda *_: [dict(input_ids=ids, labels=ids)])
    assert set(report.losses) == {"text", "loss"}


def test_training_evaluates_and_saves_as_often_as_asked(single_process, tmp_path):
    ours = trainer(single_process, steps=5, evaluate_every=2, save_every=2, directory=tmp_path)
    history = ours.train(one_batch, evaluation=one_batch)
    assert list(history.evaluations) == [2, 4, 5] and not history.stopped
    assert [report.step for report in history.steps] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004", "step_00000005"]
    # An evaluation after two steps is the loss that the third one starts from.
    assert history.evaluations[2]["loss"] == pytest.approx(history.steps[2].losses["loss"], rel=1e-6)


def test_without_save_every_the_end_is_saved_and_the_latest_checkpoint_is_loaded(single_process, tmp_path):
    ours = trainer(single_process, steps=2, directory=tmp_path)
    ours.train(one_batch)
    (tmp_path / "step_00000009").mkdir()  # cut short while it was written
    other = trainer(single_process, steps=3, directory=tmp_path)
    assert other.load() == 2
    for mine, theirs in zip(ours.models[0].parameters(), other.models[0].parameters()):
        assert mine.equal(theirs)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint at .*step_00000009"):
        other.load(tmp_path / "step_00000009")


def test_a_trainer_with_nothing_to_load_stands_at_its_first_step(single_process, tmp_path):
    assert trainer(single_process, directory=tmp_path).load() == 0
    assert trainer(single_process).load() == 0
    assert trainer(single_process).save() is None


@pytest.mark.parametrize("optimizer", [OptimizerConfig(lr=1e-2), sgd(sgd_momentum=0.9)], ids=["adam", "sgd"])
def test_an_interrupted_run_resumes_with_momentum_and_schedule(optimizer, single_process, tmp_path):
    settings = dict(steps=4, decay="linear", save_every=2, directory=tmp_path, optimizer=optimizer)
    unbroken = trainer(single_process, **settings)
    expected = unbroken.train(one_batch).steps
    resumed = trainer(single_process, **settings)
    resumed.load(tmp_path / "step_00000002")
    found = resumed.train(one_batch).steps
    assert [(r.step, r.losses, r.learning_rate) for r in found] == [
        (r.step, r.losses, r.learning_rate) for r in expected[2:]
    ]


@pytest.mark.parametrize("value", [2.5, 2.0, "2", True, float("nan"), [2]], ids=repr)
@pytest.mark.parametrize(
    "name",
    ["steps", "warmup_steps", "seed", "evaluate_every", "evaluation_steps", "save_every", "keep_last", "keep_every"],
)
def test_numbers_of_steps_that_are_not_whole_are_a_type_error(name, value):
    kind, needed = (
        (CheckpointSettings, {"keep_last": 1}) if name.startswith("keep") else (TrainerSettings, {"steps": 4})
    )
    with pytest.raises(TypeError, match=f"{kind.__name__}: {name} must be a whole number, got "):
        kind(**{**needed, name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(evaluation_steps=0), "evaluation_steps must be at least 1"),
        (dict(warmup_steps=4), r"warmup_steps must lie in \[0, steps = 4\), got 4"),
        (dict(save_every=2), "save_every 2 needs a directory"),
        (dict(decay="cos"), r"decay must be one of \['constant', 'linear', 'cosine'\], got 'cos'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainerSettings(**{"steps": 4, **settings})


def test_a_directory_may_be_a_string_and_the_evaluation_is_at_the_end_where_nothing_says_how_often(
    single_process, tmp_path
):
    ours = trainer(single_process, steps=2, directory=str(tmp_path))
    assert list(ours.train(one_batch, evaluation=one_batch).evaluations) == [2]
    assert trainer(single_process, steps=2).load(str(tmp_path / "step_00000002")) == 2


def test_evaluate_every_without_data_to_evaluate_on_is_refused(single_process):
    with pytest.raises(ValueError, match="evaluate_every is 2, but .* no evaluation data"):
        trainer(single_process, evaluate_every=2).train(one_batch)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (lambda: (tiny.batch(index) for index in range(2)), "gave a generator, expected a list of microbatches"),
        (lambda: tiny.batch(0), r"gave a dict, expected a list of microbatches.*Return \[batch\] for one"),
        (lambda: None, "gave a NoneType, expected"),
        (lambda: [tiny.batch(0), "input_ids"], "gave a list with a str at 1, expected"),
    ],
    ids=["generator", "one batch", "nothing", "another thing in the list"],
)
def test_data_that_is_no_list_of_microbatches_is_refused_with_what_is_expected(given, found, single_process):
    ours = trainer(single_process)
    with pytest.raises(TypeError, match=found):
        ours.train_step(lambda step, rank, size: given())
    assert ours.train_step(lambda step, rank, size: (tiny.batch(0), tiny.batch(1))).step == 0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_run_resumed_with_more_steps_follows_the_longer_schedule(decay, single_process, tmp_path):
    settings = dict(decay=decay, warmup_steps=1, directory=tmp_path, optimizer=OptimizerConfig(lr=1e-2))
    trainer(single_process, steps=2, **settings).train(one_batch)
    longer = trainer(single_process, steps=6, **settings)
    assert longer.load() == 2
    expected = trainer(single_process, steps=6, **settings | dict(directory=None)).train(one_batch).steps[2:]
    assert [r.learning_rate for r in longer.train(one_batch).steps] == [r.learning_rate for r in expected]
    assert expected[-1].learning_rate > 0


def test_a_second_stage_that_freezes_other_parts_begins_with_the_weights_of_the_first(single_process, tmp_path):
    aligned = trainer(single_process, control=TrainingControl(frozen=["language_model"]), directory=tmp_path)
    aligned.train(one_batch)
    second = trainer(single_process)
    with pytest.raises(ValueError, match=r"written with \['language_model.'\] frozen.*weights_only=True"):
        second.load(tmp_path / "step_00000004")
    assert second.load(tmp_path / "step_00000004", weights_only=True) == 0
    for mine, theirs in zip(aligned.models[0].parameters(), second.models[0].parameters()):
        assert mine.equal(theirs)
    assert len(second.train(one_batch).steps) == 4


@pytest.mark.parametrize("before", [(), (3, 5)])
def test_momentum_of_rows_that_shall_not_move_is_refused(before, single_process, tmp_path):
    adam = OptimizerConfig(lr=1e-2, weight_decay=0.0)
    control = TrainingControl(embedding_rows=before)
    trainer(single_process, steps=2, control=control, optimizer=adam, directory=tmp_path).train(one_batch)
    path = tmp_path / "step_00000002"
    ours = trainer(single_process, control=TrainingControl(embedding_rows=[3]), optimizer=adam)
    with pytest.raises(ValueError, match="momentum of embedding rows outside embedding_rows.*weights_only=True"):
        ours.load(path)
    ours.load(path, weights_only=True)
    table = ours.models[0].language_model.embedding.word_embeddings.weight
    start = table.detach().clone()
    ours.train(one_batch)
    assert set((table != start).any(1).nonzero().flatten().tolist()) <= {3}
    if before:
        more = trainer(single_process, control=TrainingControl(embedding_rows=[5, 3, 7]), optimizer=adam)
        assert more.load(path) == 2


def distributed(run, optimizer, is_distributed: bool, **settings) -> Trainer:
    torch.manual_seed(3)
    return Trainer(
        tiny.mimo_config(),
        run,
        TrainerSettings(steps=2, decay="constant", progress=False, **settings),
        optimizer=replace(optimizer, use_distributed_optimizer=is_distributed),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=is_distributed),
    )


@pytest.mark.parametrize("before", [False, True])
def test_the_state_of_an_optimizer_distributed_otherwise_is_refused_before_anything_changes(
    before, single_process, tmp_path
):
    adam = OptimizerConfig(lr=1e-2)
    first = distributed(single_process, adam, before, directory=tmp_path)
    start = first.save()
    first.train(one_batch)
    path = tmp_path / "step_00000002"
    ours = distributed(single_process, adam, not before)
    kept = {name: p.detach().clone() for name, p in ours.models[0].named_parameters()}
    message = f"written with use_distributed_optimizer={before}, this run has {not before}.*weights_only=True"
    with pytest.raises(ValueError, match=message):
        ours.load(path)
    assert all(p.equal(kept[name]) for name, p in ours.models[0].named_parameters())
    assert ours.steps_done == ours.schedule.num_steps == 0
    assert ours.load(path, weights_only=True) == 0
    for mine, theirs in zip(ours.models[0].parameters(), first.models[0].parameters()):
        assert mine.equal(theirs)
    assert ours.load(start) == 0, "step 0 has no optimizer state"
    assert len(ours.train(one_batch).steps) == 2
    assert distributed(single_process, adam, before).load(path) == 2


def test_a_checkpoint_that_does_not_say_how_its_optimizer_was_distributed_is_loaded(single_process, tmp_path):
    ours = trainer(single_process, steps=2, directory=tmp_path)
    ours._trained = replace(ours._trained, distributed_optimizer=None)
    ours.train(one_batch)
    assert trainer(single_process, steps=3, directory=tmp_path).load() == 2


def test_a_checkpoint_that_is_cut_short_leaves_the_one_before_it(single_process, tmp_path, monkeypatch):
    ours = trainer(single_process, directory=tmp_path)
    path = ours.save()
    with monkeypatch.context() as cut:
        cut.setattr("megatron_mimo.training.checkpoints.saving.dist_checkpointing.save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.save()
    assert trainer(single_process, directory=tmp_path).load(path) == 0
    assert ours.save() == path and [each.name for each in tmp_path.iterdir()] == ["step_00000000"]


def test_the_learning_rate_is_reported_also_where_every_part_has_a_factor(single_process):
    control = TrainingControl(learning_rate={"language_model": 2.0, "images": 2.0, "audio": 3.0})
    assert trainer(single_process, control=control).train_step(one_batch).learning_rate == 0.1


@pytest.mark.parametrize(
    ("factors", "message"), [({}, "OptimizerConfig.lr is None"), ({"decoders": 2.0}, "lr is None")]
)
def test_an_optimizer_without_a_learning_rate_is_refused(factors, message, single_process):
    with pytest.raises(ValueError, match=message):
        trainer(single_process, control=TrainingControl(learning_rate=factors), optimizer=OptimizerConfig())


def test_an_optimizer_distributed_unlike_ddp_is_refused(single_process):
    with pytest.raises(ValueError, match="use_distributed_optimizer: the optimizer has True, DDP False"):
        trainer(single_process, optimizer=sgd(use_distributed_optimizer=True))


def test_progress_bar_shows_where_the_run_stands_and_its_losses(single_process, capsys):
    trainer(single_process, steps=2, progress=True).train(one_batch)
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("[########################] 2/2  0 s left") and "images/pixels" in shown[-1]


SCRIPT = """
import warnings

warnings.simplefilter("ignore")
import megatron_mimo
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny

settings = TrainerSettings(steps=1, directory={directory!r}, progress=False)
trainer = Trainer(tiny.mimo_config(), megatron_mimo.initialize(), settings)
trainer.train(lambda step, rank, size: [tiny.batch(step)])
"""


@pytest.mark.process
def test_a_script_without_a_main_guard_keeps_its_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(directory=str(tmp_path / "run")))
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    job = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert job.returncode == 0, job.stderr[-4000:]
    assert (tmp_path / "run" / "step_00000001" / "complete").exists()
