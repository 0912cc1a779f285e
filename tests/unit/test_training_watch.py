"""A rank that holds a run up is named; ranks that are slow are shown."""

import logging
import re
import time

import pytest

from megatron_mimo.training import TrainerSettings
from megatron_mimo.training.stop import Pace
from megatron_mimo.training.watch import COMPUTING, READING, Stages, Watch, Watched, slow_ranks
from tests.unit.test_training_trainer import one_batch, trainer

IN_COLLECTIVE = "the collective all_reduce, called by step (loop.py, line 7)"


def told(beat: int, stage: str, seconds: float, place: str, step: int = 4, own=(0.0, 0.0)) -> dict:
    spent = dict(zip((READING, COMPUTING), own))
    return {"beat": beat, "step": step, "stage": stage, "for": seconds, "place": place, "seconds": spent}


def test_a_rank_that_does_not_answer_is_named_before_those_that_wait_for_it(monkeypatch):
    watch = Watch(Watched(0, 5), Stages(), Pace(), 10.0)
    now = time.monotonic()
    monkeypatch.setattr(watch._pace, "last", now - 30.0)
    for rank, (what, silent) in enumerate([
        (told(9, COMPUTING, 12.0, IN_COLLECTIVE), 0.0),
        (told(3, READING, 1.0, "read (data.py, line 3: file.read())"), 25.0),
        (told(9, COMPUTING, 14.0, IN_COLLECTIVE), 0.0),
        (told(9, READING, 20.0, "sleep (data.py, line 5: time.sleep(60))"), 0.0),
    ]):  # fmt: skip
        watch._hear(rank, what)
        watch._heard[rank].at = now - silent
    said = watch._held_up(now, [0, 2, 3])
    assert said == (
        "no step has ended for 30 s. rank 1 has not answered for 25 s; it was in step 4, reading data for 26 s, in "
        "read (data.py, line 3: file.read()); rank 4 has told nothing since the run began; rank 3 is in step 4, "
        "reading data for 20 s, in sleep (data.py, line 5: time.sleep(60)); waiting for 14 s: rank 0, 2 (step 4, "
        f"forward and backward passes, {IN_COLLECTIVE})"
    )


def test_the_one_rank_that_does_something_else_is_named_first_of_many_and_the_many_once(monkeypatch):
    watch = Watch(Watched(0, 40), Stages(), Pace(), 10.0)
    now = time.monotonic()
    monkeypatch.setattr(watch._pace, "last", now - 30.0)
    for rank in range(40):
        what = (READING, "sleep") if rank == 33 else ("optimizer", "look (finite.py, line 5: sums.tolist())")
        watch._hear(rank, told(9, what[0], 12.0, what[1]))
        watch._heard[rank].at = now
    assert watch._held_up(now, range(40)) == (
        "no step has ended for 30 s. rank 33 is in step 4, reading data for 12 s, in sleep; rank 0, 1, 2, 3, 4, 5, 6, "
        "7 and 31 more are in step 4, optimizer for 12 s, in look (finite.py, line 5: sums.tolist())"
    )


def test_a_rank_that_tells_the_same_again_is_silent_and_one_that_tells_something_new_is_not():
    watch = Watch(Watched(0, 2), Stages(), Pace(), 10.0)
    watch._hear(1, told(1, READING, 1.0, "x"))
    first = watch._heard[1].at
    time.sleep(0.01)
    watch._hear(1, told(1, READING, 1.0, "x"))
    assert watch._heard[1].at == first
    watch._hear(1, told(2, READING, 2.0, "x"))
    assert watch._heard[1].at > first and watch._heard[1].told["beat"] == 2


def test_a_run_on_one_rank_says_where_it_is(single_process, caplog):
    def slow(step, rank, size):
        time.sleep(3.0 if step == 2 else 0.0)
        return one_batch(step, rank, size)

    ours = trainer(single_process, stall_s=1.0)
    ours.train_step(one_batch)
    with caplog.at_level(logging.WARNING, "megatron_mimo.training.watch"):
        ours.train(slow)
    lines = [record.getMessage() for record in caplog.records if "no step has ended" in record.getMessage()]
    named = r"no step has ended for \d+ s\. rank 0 is in step 2, reading data for \d+ s, in slow .*time\.sleep\(3\.0 if"
    assert any(re.match(named, line) for line in lines), lines


def test_slow_ranks_are_shown_where_they_are_slow_beyond_a_measure():
    before = told(1, READING, 0.0, "", step=10)

    def after(*own: tuple[float, float], step: int = 20):
        return {rank: (before, told(2, READING, 0.0, "", step, each)) for rank, each in enumerate(own)}

    assert slow_ranks(after((1.0, 3.0), (1.1, 3.0), (9.0, 8.0))) == [
        "slow in reading data, steps 10 to 20: rank 2 takes 0.900 s a step (median of all ranks 0.110 s)",
        "slow in forward and backward passes, steps 10 to 20: rank 2 takes 0.800 s a step (median of all ranks "
        "0.300 s)",
    ]
    assert slow_ranks(after((1.0, 3.0), (1.4, 3.0), (1.2, 3.3))) == []
    assert slow_ranks(after((0.01, 0.0), (0.3, 0.0), (0.01, 0.0))) == [], "20 times as slow, of a moment"
    assert slow_ranks(after((1.0, 3.0), (9.0, 3.0), step=12)) == [], "two steps say little"


def test_stages_keep_the_seconds_of_each_and_reading_ends_in_the_stage_it_began_in():
    stages = Stages()
    stages.enter(COMPUTING)

    def items():
        time.sleep(0.05)
        yield 1

    read = stages.reading(items())
    assert next(read) == 1 and stages.now()[0] == COMPUTING
    assert stages.seconds[READING] >= 0.05
    with pytest.raises(StopIteration):
        next(read)
    assert stages.now()[0] == COMPUTING


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_seconds_that_are_none_are_refused(seconds):
    with pytest.raises(ValueError, match="stall_s must be finite and above 0"):
        TrainerSettings(steps=1, stall_s=seconds)
