"""Callbacks and further losses of a training loop."""

import pytest
import torch

from megatron_mimo.losses import LossTerm, language_term
from megatron_mimo.output import MimoOutput
from megatron_mimo.training import Began, Callback, FurtherLoss, Trainer, TrainerSettings
from tests import tiny
from tests.unit.test_training_trainer import one_batch, sgd


class Noted(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list = []

    def began(self, run) -> None:
        self.told.append(run)

    def trained(self, report) -> None:
        self.told.append(report)

    def evaluated(self, step, losses) -> None:
        self.told.append((step, losses))

    def ended(self) -> None:
        self.told.append("ended")


class Squares(FurtherLoss):
    """The square of each position's language loss, over the positions that count."""

    def __init__(self, weight: float = 0.5, off: float = 0.0) -> None:
        super().__init__("squares", weight)
        self._off = off

    def count(self, batch) -> float:
        return float(batch["loss_mask"].sum()) + self._off

    def term(self, outputs, loss_mask, batch, model) -> LossTerm:
        assert batch["labels"].device == loss_mask.device and model.post_process
        language = outputs.language if isinstance(outputs, MimoOutput) else outputs
        return language_term(language.square(), loss_mask)


def trainer(run, steps: int = 3, **options) -> Trainer:
    torch.manual_seed(3)
    settings = {name: options.pop(name) for name in ("directory", "save_every", "evaluate_every") if name in options}
    settings = TrainerSettings(steps=steps, decay="constant", progress=False, **settings)
    return Trainer(tiny.mimo_config(), run, settings, optimizer=sgd(), **options)


def test_callbacks_are_told_of_the_beginning_each_step_each_evaluation_and_the_end(single_process, tmp_path):
    first, second = Noted(), Noted()
    history = trainer(single_process, callbacks=[first, second], directory=tmp_path, evaluate_every=2).train(
        one_batch, one_batch
    )
    one, two, three = history.steps
    evaluations = list(history.evaluations.items())
    assert first.told == [Began(0, 3, True), one, two, evaluations[0], three, evaluations[1], "ended"]
    assert second.told == first.told

    goes_on = Noted()
    resumed = trainer(single_process, 4, callbacks=[goes_on], directory=tmp_path)
    resumed.load()
    history = resumed.train(one_batch)
    assert goes_on.told == [Began(3, 4, True), *history.steps, "ended"]


def test_the_end_is_told_where_an_exception_ends_the_run(single_process):
    noted = Noted()
    with pytest.raises(TypeError, match="expected a list of microbatches"):
        trainer(single_process, callbacks=[noted]).train(lambda *_: None)
    assert noted.told == [Began(0, 3, True), "ended"]


def two_unequal(step, rank, size):
    """Two microbatches that count unequal numbers of positions."""
    batches = [tiny.batch(0), tiny.batch(1)]
    batches[1]["loss_mask"] = torch.zeros_like(batches[1]["labels"], dtype=torch.float32)
    batches[1]["loss_mask"][:, :2] = 1.0
    return batches


def test_a_further_loss_is_weighed_over_the_whole_step_trained_on_and_reported(single_process):
    ours = trainer(single_process, further_losses=[Squares(0.5)])
    before = {name: value.clone() for name, value in ours.models[0].state_dict().items() if value is not None}
    evaluation = ours.evaluate(lambda *given: [two_unequal(*given)[0]])
    report = ours.train_step(two_unequal)

    plain = trainer(single_process)
    plain.models[0].load_state_dict(before, strict=False)
    without = plain.train_step(two_unequal)
    gradients = {name: p.main_grad.clone() for name, p in plain.models[0].named_parameters()}

    reference = tiny.megatron_mimo.MimoModel(tiny.mimo_config())
    reference.load_state_dict(before, strict=False)
    terms = []
    for batch in two_unequal(0, 0, 1):
        outputs, mask = reference(**batch)
        terms.append(Squares().term(outputs, mask, batch, reference))
    further = (terms[0] + terms[1]).mean()
    further.backward()

    assert report.losses["squares"] == pytest.approx(further.item(), rel=1e-5)
    assert report.losses["loss"] == pytest.approx(without.losses["loss"] + 0.5 * further.item(), rel=1e-5)
    assert terms[0].mean().item() == pytest.approx(evaluation["squares"], rel=1e-5)
    assert evaluation["loss"] > evaluation["text"] + 0.5 * evaluation["squares"] - 1e-6
    for name, parameter in ours.models[0].named_parameters():
        added = dict(reference.named_parameters())[name].grad
        expected = gradients[name] + (0 if added is None else 0.5 * added)
        # The same sums, added up in another order.
        torch.testing.assert_close(parameter.main_grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_further_loss_that_counts_something_else_than_it_said_is_refused(single_process):
    with pytest.raises(ValueError, match="loss term 'squares' counted .* were told ahead.*further loss's count"):
        trainer(single_process, further_losses=[Squares(off=1.0)]).train_step(two_unequal)


@pytest.mark.parametrize("name", ["text", "loss", "images/pixels", "two words", ""])
def test_a_further_loss_has_a_name_of_its_own(name):
    class Named(Squares):
        def __init__(self) -> None:
            FurtherLoss.__init__(self, name)

    with pytest.raises(ValueError, match="expected a name of one word"):
        Named()


def test_hooks_that_are_none_or_clash_are_refused_before_the_model_is_built(single_process, monkeypatch):
    monkeypatch.setattr("megatron_mimo.training.trainer.build_chunks", lambda *_: pytest.fail("built"))
    with pytest.raises(TypeError, match="callbacks: expected objects of megatron_mimo.training.Callback, found 7"):
        trainer(single_process, callbacks=[7])
    with pytest.raises(TypeError, match="further_losses: expected objects of .*FurtherLoss, found"):
        trainer(single_process, further_losses=[Noted()])
    twice = [Squares(), Squares()]
    with pytest.raises(ValueError, match="further_losses: 'squares' names a modality of the model or another loss"):
        trainer(single_process, further_losses=twice)
    of_modality = Squares()
    of_modality.name = "images"
    with pytest.raises(ValueError, match="further_losses: 'images' names"):
        trainer(single_process, further_losses=[of_modality])
