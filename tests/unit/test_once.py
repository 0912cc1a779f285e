"""Of one training microbatch each fact is looked up once: rows of a table, rows of a target, tokens of the ids."""

from collections import Counter

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mimo.check import BatchCheck
from megatron_mimo.decoders import RegressionDecoder
from megatron_mimo.placement import Placement
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny

READS, WRITES, HEARS = tiny.READ, tiny.WRITE, tiny.HEAR


class Comparisons(TorchDispatchMode):
    """Counts comparisons of integer tensors of the shape of the ids with each token."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.found = shape, Counter()

    def __torch_dispatch__(self, function, types, given=(), keywords=None):
        if function in (torch.ops.aten.eq.Scalar, torch.ops.aten.ne.Scalar):
            tensor, value = given[:2]
            if tensor.shape == self.shape and tensor.dtype == torch.int64:
                self.found[value] += 1
        return function(*given, **(keywords or {}))


@pytest.fixture
def trainer(single_process) -> Trainer:
    settings = TrainerSettings(steps=2, decay="constant", progress=False)
    ours = Trainer(tiny.mimo_config(), single_process, settings, optimizer=OptimizerConfig(lr=1e-3))
    ours.train_step(lambda *_: [tiny.batch()])  # the first step holds the counts told ahead against the losses
    return ours


def counted(monkeypatch, owner: type, name: str, key=lambda *given: None) -> Counter:
    """Calls of a method, by what `key` makes of its arguments."""
    real, calls = getattr(owner, name), Counter()

    def count(*given, **keywords):
        calls[key(*given)] += 1
        return real(*given, **keywords)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_rows_are_held_against_tokens_once_a_table(trainer, monkeypatch):
    reading = counted(monkeypatch, Placement, "check_rows", lambda self, name, *_: name)
    writing = counted(monkeypatch, Placement, "check_generation", lambda self, name, *_: name)
    trainer.train_step(lambda *_: [tiny.batch()])
    assert reading == {"images": 1, "audio": 1} and writing == {"images": 1}


def test_each_check_of_a_batch_runs_once(trainer, monkeypatch):
    names = ["tokens", "media", "positions", "placement", "unfed", "labels"]
    calls = {name: counted(monkeypatch, BatchCheck, name) for name in names}
    trainer.train_step(lambda *_: [tiny.batch()])
    assert {name: sum(found.values()) for name, found in calls.items()} == dict.fromkeys(names, 1)


def test_the_rows_of_a_target_are_counted_once(single_process, monkeypatch):
    decoder = ModuleSpec(RegressionDecoder, {"width": tiny.HIDDEN, "target_width": tiny.PIXELS})
    images = tiny.image_spec(decoders={"pixels": decoder})
    config = tiny.mimo_config(modality_submodules={"images": images, "audio": tiny.audio_spec()})
    settings = TrainerSettings(steps=2, decay="constant", progress=False)
    ours = Trainer(config, single_process, settings, optimizer=OptimizerConfig(lr=1e-3))
    batch = tiny.batch()
    pixels = batch["modality_targets"]["images"]["pixels"]["pixels"]
    batch["modality_targets"] = {"images": {"pixels": {"target": pixels}}}
    kind = type(ours.models[0].modality_submodules["images"].decoders["pixels"].targets)
    calls = counted(monkeypatch, kind, "num_rows")
    ours.models[0](**batch)
    assert sum(calls.values()) == 1, "forward, from the check of the targets to their loss"
    ours.train_step(lambda *_: [batch])
    assert sum(calls.values()) == 2, "and once in a whole training step"


def test_ids_are_compared_with_each_token_once(trainer):
    batch = tiny.batch()
    with Comparisons(batch["input_ids"].shape) as compared:
        trainer.train_step(lambda *_: [batch])
    assert {token: compared.found[token] for token in (READS, WRITES, HEARS)} == {READS: 1, WRITES: 1, HEARS: 1}
