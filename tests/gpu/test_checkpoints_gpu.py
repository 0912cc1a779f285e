"""Checkpoints of plain layers in TransformerEngine's, and back."""

from functools import partial

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def run():
    yield megatron_mimo.initialize(seed=3)
    megatron_mimo.shutdown()


def trainer(run, backend: str, directory=None) -> Trainer:
    torch.manual_seed(3)
    layers = partial(specs.language_layer_spec, backend=backend)
    language = tiny.language_spec(tiny.language_config(), transformer_layer_spec=layers)
    return Trainer(
        tiny.mimo_config(language),
        run,
        TrainerSettings(steps=30, decay="constant", progress=False, directory=directory),
        optimizer=OptimizerConfig(lr=1e-2, adam_eps=1e-3),
    )


def steps(ours: Trainer, count: int = 2) -> list[dict]:
    return [dict(ours.train_step(lambda *_: [tiny.batch(0)]).losses) for _ in range(count)]


@pytest.mark.parametrize(("saved", "loaded"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
def test_plain_layers_and_transformer_engine_s_go_on_from_each_other(run, tmp_path, saved, loaded):
    pytest.importorskip("transformer_engine")
    first, other = trainer(run, saved, tmp_path), trainer(run, loaded)
    begun = steps(first, 20)
    path = first.save()
    expected = steps(first)
    assert expected[0]["text"] < 0.8 * begun[0]["text"]
    assert other.load(path) == 20
    for found, theirs in zip(steps(other), expected):
        assert found == pytest.approx(theirs, rel=3e-2)  # TransformerEngine multiplies float32 in TF32
