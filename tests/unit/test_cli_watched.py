"""What a recipe says of validation, early stopping, the best checkpoint, averages and loggers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.models import find
from megatron_mimo.cli.reading import checked
from megatron_mimo.cli.recipe import Recipe
from megatron_mimo.cli.training import parts_of
from megatron_mimo.training.checkpoints.directories import newest_first
from tests.commands import caption, command, pictures


def recipe(**changes) -> Recipe:
    given = {"directory": "run", "model": {"source": "x"}, "data": "y", "stages": [
        {"name": "one", "steps": 4, "trains": {"language_model": 1e-3}}]}  # fmt: skip
    return checked({**given, **changes}, "here")


@pytest.mark.process
def test_a_stage_ends_early_on_records_held_out_and_what_follows_begins_from_its_best(tmp_path: Path) -> None:
    changes = ["held_out=0.2", "evaluation.every=1",
               "evaluation.patience=1", "evaluation.steps=1", "evaluation.samples=0",
               "checkpoints.keep_best=true", "checkpoints.keep_last=1", "ema_decay=0.9", "loggers.part_norms=true",
               "loggers.wandb=captions", "stages.1.decay=constant", "stages.1.warmup=0",
               # So low that no float32 weight changes: the second evaluation is as good as the first.
               "stages.1.trains={images/input_projections: 1e-30, language_model: 1e-30}"]  # fmt: skip
    done = command(*caption(tmp_path, *changes, steps=50))
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [(one["stage"], one["kind"], one["step"]) for one in log]
    assert told[-4:] == [("whole", kind, step) for step in (1, 2) for kind in ("train", "evaluation")], told
    norms = [name for name in log[-2] if name.startswith("gradient_norm/")]
    assert norms == ["gradient_norm/language_model", "gradient_norm/images/input_projections"]
    assert [path.name for path in newest_first(tmp_path / "stages" / "whole")] == ["step_00000002", "step_00000001"]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    model, averaged = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "model-ema"))
    assert model.keys() == averaged.keys() and (tmp_path / "model-ema" / "recipe.yaml").is_file()
    for name in model:  # of weights that stand still
        torch.testing.assert_close(averaged[name], model[name], rtol=1e-5, atol=1e-7)


@pytest.mark.process
def test_averages_of_a_checkpoint_or_run_answer_are_scored_and_are_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command(*caption(run, "ema_decay=0.9", "stages.1.decay=constant", "stages.1.warmup=0", steps=4))
    assert done.returncode == 0, done.stderr
    checkpoint = run / "stages/whole/step_00000004"
    plain, averaged = (load_file(run / name / "model.safetensors") for name in ("model", "model-ema"))
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)
    for source, target in ((checkpoint, "from_checkpoint"), (run, "from_run")):
        done = command("convert", source, tmp_path / target, "--ema")
        assert done.returncode == 0, done.stderr
        found = load_file(tmp_path / target / "model.safetensors")
        assert found.keys() == averaged.keys() and all(torch.equal(found[name], averaged[name]) for name in found)
    done = command("convert", checkpoint, tmp_path / "file", "--to", "safetensors", "--ema")
    assert done.returncode == 0, done.stderr
    found, name = load_file(tmp_path / "file"), "language_model.embedding.word_embeddings.weight"
    assert torch.equal(found[name], next(one for key, one in averaged.items() if "embed_tokens" in key))

    asking = ["generate", checkpoint, pictures(3), "--output", tmp_path / "out", "--max-new-tokens", 8]
    done = command(*asking, "--ema")
    assert done.returncode == 0, done.stderr
    other = command(*asking)  # whose answers are other weights'
    assert other.returncode == 2 and "ema: True then, False now" in other.stderr
    asking[1], asking[4] = run, tmp_path / "again"
    done = command(*asking, "--ema")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/answers.jsonl").read_text() == (tmp_path / "out/answers.jsonl").read_text()
    done = command("evaluate", run, pictures(3), "--output", tmp_path / "scores", "--max-new-tokens", 8, "--ema")
    assert done.returncode == 0, done.stderr
    (asked,) = (tmp_path / "scores").glob("*/asked.json")
    assert json.loads(asked.read_text())["model"] == str(run / "model-ema")

    done = command("convert", run, tmp_path / "weights", "--to", "megatron")
    assert done.returncode == 0, done.stderr
    done = command("generate", tmp_path / "weights", pictures(3), "--output", tmp_path / "none", "--ema")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
    for place in (tmp_path / "weights", run / "model", tmp_path / "nowhere"):
        with pytest.raises(Refused, match="--ema: expected a checkpoint with averages .* train with ema_decay"):
            find(str(place), ema=True)


def test_records_held_out_are_the_same_each_time_and_none_is_trained_on() -> None:
    of_folder = recipe(data=str(pictures(10)), held_out=0.3)
    (train, held), (again, held_again) = (parts_of(of_folder, of_folder.data[0]) for _ in range(2))
    files = [[part.where(index) for index in range(len(part))] for part in (train, held, again, held_again)]
    assert files[:2] == files[2:] and len(files[1]) == 3
    assert sorted(files[0] + files[1]) == sorted(files[0] + files[1], key=str) and not set(files[0]) & set(files[1])
    assert len(set(files[0] + files[1])) == 10
    assert train.record(0) != held.record(0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(held_out=0.1, evaluation={"data": "z"}), "held_out: expected it or evaluation.data, found both"),
        (dict(evaluation={"patience": 2, "every": 1}), "evaluation.patience: needs evaluation.every, and"),
        (dict(held_out=0.1, evaluation={"patience": 2}), "evaluation.patience: needs evaluation.every"),
        (dict(checkpoints={"keep_best": True}), "checkpoints.keep_best: needs checkpoints.keep_last, and"),
        (dict(held_out=1.5), "held_out: expected less than 1, found 1.5"),
        (dict(ema_decay=1.0), "ema_decay: expected less than 1, found 1.0"),
        (dict(loggers={"wandb": {"mode": "offline"}}), "loggers.wandb.project: expected a value, found none"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_does_not_go_together_is_refused(changes, told) -> None:
    with pytest.raises(Refused) as refused:
        recipe(**changes)
    assert told in str(refused.value)
