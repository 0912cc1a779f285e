"""What trainers expect of both loops: callbacks, further losses, validation, norms by part, averages of weights."""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from examples.recipes import any_to_any_small
from megatron_mimo.launch import Run, shutdown
from megatron_mimo.losses import LossTerm, language_term
from megatron_mimo.output import MimoOutput
from megatron_mimo.training import Callback, DataSource, FurtherLoss, Lines, Trainer
from megatron_mimo.training.checkpoints.safetensors import export_weights
from megatron_mimo.training.ema import Ema
from tests.distributed.cases import training
from tests.distributed.cases.pretrain import run_recipe
from tests.distributed.cases.training import INTERLEAVED, PIPELINE, TENSOR, four_samples
from tests.distributed.harness import case, relayout, shared_directory


class Doubled(FurtherLoss):
    """The language loss once more."""

    def __init__(self) -> None:
        super().__init__("doubled", 0.25)

    def count(self, batch) -> float:
        return float(batch["loss_mask"].sum())

    def term(self, outputs, loss_mask, batch, model) -> LossTerm:
        return language_term(outputs.language if isinstance(outputs, MimoOutput) else outputs, loss_mask)


def recipe(**hooks) -> SimpleNamespace:
    """The recipe `any_to_any_small` with hooks."""
    named = {name: getattr(any_to_any_small, name) for name in ("model_config", "datasets", "collate")}
    return SimpleNamespace(__name__="hooked", **named, **hooks)


class Noted(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list = []

    def began(self, run) -> None:
        self.told.append(("began", run.step, run.steps, run.writes))

    def trained(self, report) -> None:
        self.told.append(("trained", report.step, set(report.losses)))

    def evaluated(self, step, losses) -> None:
        self.told.append(("evaluated", step, set(losses)))

    def ended(self) -> None:
        self.told.append(("ended",))


@case(ranks=2, timeout_s=120)
def pretrain_tells_callbacks_on_every_rank_and_adds_further_losses(run: Run) -> None:
    shutdown()
    where = shared_directory() / "hooks"
    noted = Noted()
    hooked = recipe(callbacks=lambda args: [noted, Lines(where / "log.jsonl")], further_losses=lambda args: [Doubled()])
    pipeline = ["--pipeline-model-parallel-size", "2"]
    evaluating = ["--eval-iters", "1", "--eval-interval", "2"]
    saving = ["--save", str(where / "saved"), "--save-interval", "2"]
    curves = run_recipe(where, *pipeline, *evaluating, *saving, "--log-part-norms", recipe=hooked)
    last = run.rank == 1
    terms = {"text", "images/pixels", "tones/waves", "doubled", "loss"} if last else set()
    step = [("trained", number, terms) for number in range(4)]
    everywhere = {"text", "images/pixels", "tones/waves", "doubled", "loss"}
    evaluations = [("evaluated", 2, everywhere), ("evaluated", 4, everywhere)]
    assert noted.told == [
        ("began", 0, 4, last), *step[:2], evaluations[0], *step[2:], evaluations[1], ("ended",)
    ], noted.told  # fmt: skip
    if last:
        found = [json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()]
        steps = [one for one in found if one["kind"] == "train"]
        assert {one["step"]: one["loss"] for one in steps} == pytest.approx(curves["loss"])
        assert {one["step"]: one["learning_rate"] for one in steps}.keys() == curves["learning-rate"].keys()
        assert {one["step"]: one["gradient_norm"] for one in steps} == pytest.approx(curves["grad-norm"])
        for one in steps + [each for each in found if each["kind"] == "evaluation"]:
            whole = one["text"] + one["images/pixels"] + one["tones/waves"] + 0.25 * one["doubled"]
            assert one["doubled"] == pytest.approx(one["text"]) and one["loss"] == pytest.approx(whole)
        parts = {tag: curves[tag] for tag in curves if tag.startswith("grad-norm/")}
        assert {"grad-norm/language_model", "grad-norm/images/encoders", "grad-norm/tones/decoders"} <= parts.keys()
        for step, norm in curves["grad-norm"].items():
            assert sum(values[step] ** 2 for values in parts.values()) == pytest.approx(norm**2, rel=1e-4)
    shutdown()
    resumed = Noted()
    run_recipe(
        where / "resumed", *pipeline, "--load", str(where / "saved"), "--ckpt-step", "2",
        recipe=recipe(callbacks=lambda args: [resumed], further_losses=lambda args: [Doubled()]),
    )  # fmt: skip
    assert resumed.told[0] == ("began", 2, 4, last) and [each[1] for each in resumed.told[1:-1]] == [2, 3]


def parts_trainer(run: Run, distributed: bool = False, **changes) -> Trainer:
    ours = training.trainer(run, None, distributed=distributed, **changes)
    ours.settings = replace(ours.settings, part_norms=True)
    return ours


class Blend(DataSource):
    """The four samples of each step, whose first half is of one source and whose second half of another."""

    source_names = ("even", "odd")

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size, self._step = rank, size, 0

    def next_step(self):
        batches = four_samples(self._step, self._rank, self._size)
        self._step += 1
        for index, batch in enumerate(batches):
            number = self._rank * len(batches) + index
            batch["sources"] = torch.full_like(batch["input_ids"], number % 2)
            batch["sources"][:, : 4 + number] = 1 - number % 2
        return batches

    def state_dict(self):
        return {"size": self._size, "ranks": {str(self._rank): {}}, "order": {}}

    def load_state_dict(self, state) -> None:
        raise NotImplementedError


@case(ranks=2, timeout_s=180)
def norms_of_parts_and_losses_of_sources_are_those_of_one_rank_on_every_layout(run: Run) -> None:
    where = shared_directory() / "parts"
    expected = None
    # Of each axis the way that sums most: shards of a distributed optimizer, and chunks of a stage.
    for layout, options in (({}, {}), (TENSOR, {"distributed": True}), (INTERLEAVED, {"distributed": True})):
        run = relayout(**layout)
        ours = parts_trainer(run, **options)
        if expected is None:
            ours.settings = replace(ours.settings, directory=where)
            start = ours.save()
        ours.load(start)
        found = [
            {**report.losses, **report.part_norms, "norm": report.gradient_norm}
            for report in ours.train(Blend(run.data_rank, run.layout.data_parallel_size)).steps
        ]
        everywhere: list = [None, None]
        dist.all_gather_object(everywhere, found)
        assert everywhere[0] == everywhere[1], "told alike on every rank"
        for step in found:
            parts = [step[name] ** 2 for name in step if name == "language_model" or name.startswith("images/")]
            parts += [step[name] ** 2 for name in step if name.startswith("audio/")]
            whole = sum(parts) - step["images/pixels"] ** 2
            assert whole == pytest.approx(step["norm"] ** 2, rel=1e-4), step
        if expected is None:
            expected = found
            assert {"text of even", "text of odd", "images/encoders", "images/decoders"} <= found[0].keys()
        for ours_step, theirs in zip(found, expected, strict=True):
            assert ours_step == pytest.approx(theirs, rel=1e-4), (layout, options)


@case(ranks=2, timeout_s=240)
def averages_of_weights_are_those_of_one_rank_and_a_resumed_run_s_are_exact_on_every_layout(run: Run) -> None:
    where = shared_directory() / "ema"
    expected = start = None
    layouts = (({}, {"distributed": True}), (TENSOR, {}), (INTERLEAVED, {"distributed": True}))
    for number, (layout, options) in enumerate(layouts):
        run = relayout(**layout)
        directory = where / str(number)

        def averaging(save_every: int | None = None, directory=directory, options=options, run=run) -> Trainer:
            ours = training.trainer(
                run, directory, save_every=save_every, gated_linear_unit=True, activation_func=F.silu, **options
            )
            ours.ema = Ema(ours.models, 0.5)
            return ours

        unbroken = averaging(save_every=2)
        start = start or unbroken.save()
        unbroken.load_parts(start)
        unbroken.train(four_samples)
        resumed = averaging()
        assert resumed.load(directory / "step_00000002") == 2
        resumed.train(four_samples)
        for ours, theirs in zip(resumed.ema.averages, unbroken.ema.averages, strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        if run.rank == 0:
            export_weights(directory / "step_00000004", directory / "ema.safetensors", ema=True)
            found = load_file(directory / "ema.safetensors")
            expected = expected or found
            assert found.keys() == expected.keys()
            for name, average in found.items():
                torch.testing.assert_close(average, expected[name], rtol=1e-4, atol=1e-5, msg=f"{layout} {name}")
        dist.barrier()
        if options:  # also in another layout than the one that wrote them
            other = averaging()
            assert other.load(where / "0" / "step_00000004") == 4 and other.ema.updates == 4


@case(ranks=2, timeout_s=240)
def pretrain_keeps_the_best_checkpoint_ends_early_and_goes_on_with_the_averages_exactly(run: Run) -> None:
    shutdown()
    where = shared_directory() / "best"
    saved, best = where / "saved", where / "saved" / "best"
    layout = ["--pipeline-model-parallel-size", "2", "--ema-decay", "0.5", "--eval-iters", "1", "--eval-interval", "1"]
    comparing = ["--keep-best", "--early-stopping-patience", "2"]
    told, values = Noted(), iter([3.0, 1.0, 2.0, 2.5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mimo.training.pretraining.telling.gathered", lambda means: [{"loss": next(values)}])
        run_recipe(
            where, *layout, *comparing, "--save", str(saved), "--save-interval", "3", steps=8,
            recipe=recipe(callbacks=lambda args: [told]),
        )  # fmt: skip
    assert [each[1] for each in told.told if each[0] == "trained"] == [0, 1, 2, 3], told.told
    if run.rank == 0:
        names = sorted(path.name for path in saved.glob("iter_*"))
        assert names == [f"iter_{number:07d}" for number in (1, 2, 3, 4)], names  # 1 was the best at its time
        assert [path.name for path in best.glob("iter_*")] == ["iter_0000002"]
        for path in (saved / "iter_0000002").iterdir():
            assert path.samefile(best / "iter_0000002" / path.name)
    shutdown()
    again = Noted()
    with pytest.raises(SystemExit) as ended:
        run_recipe(
            where / "again", *layout, *comparing, "--load", str(saved), "--save", str(saved), "--save-interval", "3",
            steps=8,
            recipe=recipe(callbacks=lambda args: [again]),
        )  # fmt: skip
    assert ended.value.code == 0 and [each[0] for each in again.told] == ["began", "ended"]
    shutdown()
    resumed = where / "resumed"
    saving = ["--save", str(resumed / "saved"), "--save-interval", "4", "--exit-interval", "4"]
    with pytest.raises(SystemExit):
        run_recipe(resumed, *layout, "--load", str(best), *saving, steps=8)
    if run.rank == 0:
        files = []
        for directory in (saved, resumed / "saved"):
            export_weights(directory / "iter_0000004", where / "ema.safetensors", ema=True)
            files.append(load_file(where / "ema.safetensors"))
        export_weights(saved / "iter_0000004", where / "weights.safetensors")
        weights = load_file(where / "weights.safetensors")
        assert files[0].keys() == files[1].keys() == weights.keys()
        assert all(torch.equal(files[0][name], files[1][name]) for name in weights)
        assert any(not torch.equal(files[0][name], weights[name]) for name in weights)


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """What a logger says within it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(name).removeHandler(handler)


def sleepy(run: Run, at: int, seconds: float):
    """What every rank reads; rank 1 sleeps before a step."""

    def data(step: int, rank: int, size: int) -> list[dict]:
        if step == at and run.rank == 1:
            time.sleep(seconds)
        return four_samples(step, rank, size)

    return data


@case(ranks=2, timeout_s=120)
@case(ranks=2, timeout_s=120, **PIPELINE)
def a_rank_that_sleeps_is_named_with_its_stage_and_seconds_and_so_is_the_collective_the_other_waits_in(
    run: Run,
) -> None:
    ours = training.trainer(run, None)
    ours.train_step(four_samples)  # the first takes longest
    ours.settings = replace(ours.settings, stall_s=1.0)
    with logged("megatron_mimo.training.watch") as lines:
        ours.train(sleepy(run, 2, 4.0))
    assert ours.steps_done == 4
    if run.rank == 1:
        assert not lines, "one rank tells"
        return
    said = [re.search(r"no step has ended for (\d+) s\. rank 1 is in step 2, reading data for (\d+) s, in data \(.*"
                      r"time\.sleep\(seconds\)\); waiting for \d+ s: rank 0 \(step 2, between steps, the collective "
                      r"all_gather_into_tensor, called by all_gathered", line) for line in lines]  # fmt: skip
    assert any(said), lines
    last = [each for each in said if each][-1]
    assert 1 <= int(last[1]) <= 5 and 1 <= int(last[2]) <= 5


@case(ranks=2, timeout_s=120)
def pretrain_names_a_rank_that_sleeps(run: Run) -> None:
    shutdown()
    collate, rank = any_to_any_small.collate, run.rank
    taken = []

    def sleeping(samples):
        taken.append(1)
        if rank == 1 and len(taken) == 5:
            time.sleep(4.0)
        return collate(samples)

    slow = recipe()
    slow.collate = sleeping
    with logged("megatron_mimo.training.watch") as lines:
        run_recipe(shared_directory() / "sleeps", "--stall-seconds", "1", recipe=slow)
    if rank == 0:
        assert any(re.search(r"rank 1 is in step \d, reading data for \d+ s, in sleeping", line) for line in lines), (
            lines
        )
        assert any("rank 0 (step" in line and "the collective" in line for line in lines), lines
