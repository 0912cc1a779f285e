"""What a rank refuses of its microbatches by itself, and what ranks of one model make of each other's outcomes."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mimo.axes import Layout
from megatron_mimo.training import agreement
from megatron_mimo.training.agreement import agree_on_microbatches, shared
from megatron_mimo.training.speed.counts import term
from tests import tiny


class Group:
    def __init__(self, size: int = 1) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def run(model_parallel: int = 1, **layout: int) -> SimpleNamespace:
    """One rank that stands for all; only what agreement asks of a `Run`."""
    groups = SimpleNamespace(tp=Group(), pp=Group(), mp=Group(model_parallel))
    hosts = SimpleNamespace(model=groups.mp)
    return SimpleNamespace(world_size=1, data_rank=0, groups=groups, hosts=hosts, layout=Layout(2, **layout))


def microbatches(*lengths: int) -> list[dict]:
    return [{"input_ids": torch.ones(1, length, dtype=torch.long)} for length in lengths]


def test_pipeline_stages_refuse_microbatches_of_several_shapes_unless_they_vary() -> None:
    stages, config = run(pipeline_model_parallel_size=2), tiny.language_config()
    with pytest.raises(ValueError, match=r"microbatches of shapes \[\(1, 8\), \(1, 12\)\]: pipeline stages exchange"):
        agree_on_microbatches(microbatches(12, 8), None, stages, config)
    assert agree_on_microbatches(microbatches(8, 8), None, stages, config) == (2, (1, 8))
    assert agree_on_microbatches(microbatches(12, 8), None, run(), config) == (2, (1, 12))
    config.variable_seq_lengths = True
    assert agree_on_microbatches(microbatches(12, 8), None, stages, config) == (2, (1, 12))


def test_every_microbatch_must_be_of_a_length_that_can_be_shared_out() -> None:
    context, config = run(context_parallel_size=2), tiny.language_config()
    for lengths in ((8, 10), (10, 8), (8, 8, 10)):
        with pytest.raises(ValueError, match="multiple of 4 .*, found 10"):
            agree_on_microbatches(microbatches(*lengths), None, context, config)


def test_a_step_without_microbatches_is_refused_and_an_error_before_it_comes_first() -> None:
    with pytest.raises(ValueError, match="a step has no microbatch"):
        agree_on_microbatches([], None, run(), tiny.language_config())
    with pytest.raises(KeyError, match="earlier"):
        agree_on_microbatches([], KeyError("earlier"), run(), tiny.language_config())


def test_terms_that_counted_nothing_are_no_losses() -> None:
    losses, norm, succeeded = shared({"text": 1.0, "images": 2.0}, 3.0, True, {term("images"): 0.0}, run())
    assert (losses, norm, succeeded) == ({"text": 1.0}, 3.0, True)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([(None, True), (2.0, False)], (2.0, False)),
        ([(None, True), (None, True)], (None, True)),
        ([(3.0, True), (2.0, True)], (3.0, True)),
    ],
    ids=["one overflows", "all frozen", "all step"],
)
def test_a_step_succeeds_where_every_stage_stepped_and_frozen_ones_have_no_norm(stages, expected, monkeypatch) -> None:
    def gather(found: list, own: object, group: object) -> None:
        assert own == ({}, *stages[0])
        found[:] = [({}, *stage) for stage in stages]

    monkeypatch.setattr(agreement.dist, "all_gather_object", gather)
    norm, succeeded = stages[0]
    assert shared({}, norm, succeeded, {}, run(model_parallel=2)) == ({}, *expected)
