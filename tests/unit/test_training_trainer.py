"""The small training loop in one process."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny


def sgd(**changes) -> OptimizerConfig:
    return OptimizerConfig(**{**dict(optimizer="sgd", lr=0.1, clip_grad=0.0, weight_decay=0.0, sgd_momentum=0.0), **changes})


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
