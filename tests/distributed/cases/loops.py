"""What trainers expect of both loops: callbacks, further losses, validation, norms by part, averages of weights."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from examples.recipes import any_to_any_small
from megatron_mimo.launch import Run, shutdown
from megatron_mimo.losses import LossTerm, language_term
from megatron_mimo.output import MimoOutput
from megatron_mimo.training import Callback, DataSource, FurtherLoss, Lines, Trainer
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
    evaluations = [("evaluated", 2, terms), ("evaluated", 4, terms)]
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
    for layout, options in (
        ({}, {}),
        ({}, {"distributed": True}),
        (TENSOR, {}),
        (TENSOR, {"distributed": True}),
        (PIPELINE, {}),
        (INTERLEAVED, {"distributed": True}),
    ):
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
