"""The best evaluation: its checkpoint is kept, and a run that gets no better ends."""

import math
from argparse import ArgumentParser, Namespace

import pytest
import torch

from megatron_mimo.compat.megatron import writers_report_here
from megatron_mimo.training import CheckpointSettings, EarlyStopping, Trainer, TrainerSettings
from megatron_mimo.training.checkpoints import manifest
from megatron_mimo.training.checkpoints.directories import keep_linked
from megatron_mimo.training.pretraining.arguments import add_mimo_args
from megatron_mimo.training.pretraining.checks import check_comparing
from tests import tiny
from tests.unit.test_training_trainer import one_batch, sgd


class Scripted(Trainer):
    """Evaluates as it is told."""

    script: dict[int, float]

    def evaluate(self, data) -> dict[str, float]:
        return {"loss": self.script[self.steps_done], "text": -self.script[self.steps_done]}


def scripted(run, script: dict[int, float], *, keep_best: str | None = None, **settings) -> Scripted:
    torch.manual_seed(3)
    given = TrainerSettings(**{"steps": 6, "decay": "constant", "progress": False, "evaluate_every": 1, **settings})
    kept = CheckpointSettings(keep_last=1, keep_best=keep_best) if keep_best else None
    trainer = Scripted(tiny.mimo_config(), run, given, optimizer=sgd(), checkpoints=kept)
    trainer.script = script
    return trainer


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_best_checkpoint_is_kept_though_no_save_is_due_there(single_process, tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: math.nan, 4: 2.0, 5: 1.5, 6: 4.0}
    with writers_report_here():
        scripted(single_process, losses, keep_best="loss", directory=tmp_path, save_every=3).train(one_batch, one_batch)
    assert names(tmp_path) == ["step_00000002", "step_00000006"]
    assert manifest.read(tmp_path / "step_00000002").losses["loss"] == 1.0


def test_the_best_of_a_run_that_goes_on_is_the_best_of_all_of_it(single_process, tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 0.5, 6: 4.0}
    with writers_report_here():
        scripted(single_process, losses, keep_best="loss", directory=tmp_path, steps=3).train(one_batch, one_batch)
        goes_on = scripted(single_process, losses, keep_best="loss", directory=tmp_path, steps=6)
        assert goes_on.load() == 3
        saved = []
        goes_on.save = lambda **given: saved.append(goes_on.steps_done)
        goes_on.train(one_batch, one_batch)
    assert saved == [5, 6], "4 is no new best"


@pytest.mark.parametrize(
    ("stopping", "end"),
    [
        (EarlyStopping(patience=2), 4),
        (EarlyStopping(patience=3), 6),
        (EarlyStopping(patience=2, least=0.6), 3),
        (EarlyStopping(patience=1, term="text"), 2),
    ],
    ids=str,
)
def test_a_run_ends_once_it_has_got_no_better_for_its_patience(stopping, end, single_process, tmp_path):
    losses = {1: 3.0, 2: 2.5, 3: 2.6, 4: math.nan, 5: 1.0, 6: 1.0}
    ours = scripted(single_process, losses, early_stopping=stopping, directory=tmp_path)
    with writers_report_here():
        history = ours.train(one_batch, one_batch)
        assert (ours.steps_done, history.ended_early) == (end, end < 6)
        assert names(tmp_path) == [f"step_{end:08d}"], "the last step is saved"
        again = scripted(single_process, losses, early_stopping=stopping, directory=tmp_path)
        assert again.load() == end
        history = again.train(one_batch, one_batch)
    assert history.steps == [] and history.ended_early == (end < 6)


def test_a_run_that_ended_early_goes_on_with_more_patience(single_process, tmp_path):
    losses = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 6.0}
    with writers_report_here():
        scripted(single_process, losses, early_stopping=EarlyStopping(1), directory=tmp_path).train(
            one_batch, one_batch
        )
        more = scripted(single_process, losses, early_stopping=EarlyStopping(3), directory=tmp_path)
        assert more.load() == 2
        assert len(more.train(one_batch, one_batch).steps) == 2, "one of three evaluations was waited for before"


def test_what_cannot_be_compared_is_refused_before_the_model_is_built(single_process, monkeypatch):
    monkeypatch.setattr("megatron_mimo.training.trainer.build_chunks", lambda *_: pytest.fail("built"))
    known = r"expected one of \['loss', 'text', 'images/pixels'\]"
    with pytest.raises(ValueError, match=f"early_stopping: the model has no loss 'images', {known}"):
        scripted(single_process, {}, early_stopping=EarlyStopping(1, term="images"))
    with pytest.raises(ValueError, match=f"keep_best: the model has no loss 'eval', {known}"):
        scripted(single_process, {}, keep_best="eval")
    with pytest.raises(ValueError, match="early_stopping compares evaluations and needs evaluate_every"):
        TrainerSettings(steps=1, early_stopping=EarlyStopping(1))
    with pytest.raises(ValueError, match="least must be finite and at least 0, got -1"):
        EarlyStopping(1, least=-1.0)
    with pytest.raises(TypeError, match="patience must be a whole number, got 1.5"):
        EarlyStopping(1.5)  # type: ignore[arg-type]


def loop_arguments(**given) -> Namespace:
    """What `pretrain` compares and averages by, nothing of it asked for."""
    parser = add_mimo_args(ArgumentParser())
    others = dict(eval_iters=2, eval_interval=10, save="run", overlap_param_gather=False)
    return Namespace(**{**vars(parser.parse_args([])), **others, **given})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(ema_decay=1.0), r"--ema-decay must lie in \[0, 1\), such as 0.999, got 1.0"),
        (dict(ema_decay=0.9, overlap_param_gather=True), "--ema-decay with --overlap-param-gather"),
        (dict(early_stopping_patience=0), "--early-stopping-patience must be at least 1, got 0"),
        (dict(early_stopping_patience=1, eval_iters=0), "compare evaluations, expected --eval-iters and"),
        (dict(keep_best=True, save=None), "--keep-best keeps a checkpoint, expected --save DIRECTORY, found none"),
        (dict(keep_best=True, best_of="pixels"), "--best-of: the model has no loss 'pixels', expected one of"),
    ],
    ids=str,
)
def test_arguments_of_pretrain_that_average_or_compare_nothing_are_refused(given, told):
    check_comparing(loop_arguments(), tiny.mimo_config())
    with pytest.raises(ValueError, match=told):
        check_comparing(loop_arguments(**given), tiny.mimo_config())


def test_a_checkpoint_that_is_kept_stays_when_its_own_goes_and_takes_the_place_of_the_one_before(tmp_path):
    for step in (1, 20):
        path = tmp_path / f"iter_{step:07d}"
        path.mkdir()
        (path / "data").write_text(str(step))
        keep_linked(path, tmp_path / "best")
        (path / "data").unlink()
        assert names(tmp_path / "best") == [path.name, "latest_checkpointed_iteration.txt"]
        assert (tmp_path / "best" / path.name / "data").read_text() == str(step)
        assert (tmp_path / "best" / "latest_checkpointed_iteration.txt").read_text() == str(step)
