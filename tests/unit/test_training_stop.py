"""A SIGTERM ends the run at a step boundary, or the process where none comes; a save in progress is never cut."""

import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.training import CheckpointSettings, Trainer, TrainerSettings, stop
from megatron_mimo.training.checkpoints import writing
from megatron_mimo.training.stop import Pace, StopRequest, place_of
from tests import tiny, warm

CPU = torch.device("cpu")


@pytest.fixture
def ends(monkeypatch):
    """What the watching thread would have printed as it ends the process."""
    said: list[str] = []
    monkeypatch.setattr(stop, "exit_now", said.append)
    return said


def terminate(after: float) -> None:
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)).start()


def wait_for(happened, seconds: float = 10.0) -> float:
    """Seconds until it happened."""
    began = time.monotonic()
    while not happened() and time.monotonic() - began < seconds:
        time.sleep(0.02)
    return time.monotonic() - began


def trainer(run, directory=None, checkpoints=None, **settings) -> Trainer:
    torch.manual_seed(3)
    settings = TrainerSettings(**{**dict(steps=3, progress=False, directory=directory), **settings})
    return Trainer(tiny.mimo_config(), run, settings, optimizer=OptimizerConfig(lr=1e-3), checkpoints=checkpoints)


def test_a_step_that_does_not_end_within_the_grace_ends_the_process_and_names_where_it_was(single_process, ends):
    def stuck(step, rank, size):
        if step == 1:
            terminate(0.1)
            wait_for(lambda: ends)
        return [tiny.batch(step)]

    history = trainer(single_process, stop_grace_s=0.5).train(stuck)
    assert "rank 0: SIGTERM came, and no step ended within 0.5 s. " in ends[0]
    assert "This rank was in wait_for (" in ends[0] and "in stuck" in ends[0]
    assert history.stopped and len(history.steps) == 2, "here the process went on, and its step ended"


def test_the_grace_is_ten_times_the_slowest_step_and_at_least_ten_seconds(ends, monkeypatch):
    monkeypatch.setattr(stop, "LEAST_GRACE_S", 0.2)
    for slowest, least in ((0.01, 0.2), (0.08, 0.8)):
        ends.clear()
        pace = Pace()
        pace.ended(slowest)
        pace.ended(slowest / 2)
        with StopRequest(CPU, pace=pace):
            os.kill(os.getpid(), signal.SIGTERM)
            assert least <= wait_for(lambda: ends), "and not much later, where the machine is not busy"
            assert f"no step ended within {least} s" in ends[0]
    assert stop.GRACE_STEPS == 10.0


def test_a_second_signal_ends_the_process_before_the_grace_and_two_that_come_together_do_not(ends):
    with StopRequest(CPU, grace_s=100.0) as request:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(lambda: ends, 0.5) >= 0.5, ends
        terminate(1.0)
        assert wait_for(lambda: ends) < 5.0
        assert "a second signal came" in ends[0]
        assert request.received()


def test_steps_that_end_in_time_and_evaluations_of_many_steps_are_left_alone(single_process, ends):
    def slow(step, rank, size):
        if len(seen) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(step)
        time.sleep(0.6)
        return [tiny.batch(step)]

    seen: list[int] = []
    ours = trainer(single_process, stop_grace_s=4.0, evaluate_every=1, evaluation_steps=8)
    ours.train_step(lambda *_: [tiny.batch(0)])
    history = ours.train(lambda *_: [tiny.batch(0)], evaluation=slow)
    assert len(seen) == 8 and history.stopped and list(history.evaluations) == [2]
    assert not ends


def slow_writing(monkeypatch, seconds: float) -> list[str]:
    """Makes every checkpoint take as long to write; gives which of them were written to the end."""
    written, whole = [], writing.write

    def write(plan):
        time.sleep(seconds)
        outcome = whole(plan)
        written.append(plan.directory.name)
        return outcome

    monkeypatch.setattr(writing, "write", write)
    return written


@pytest.mark.parametrize("signals", [1, 2])
def test_a_save_in_progress_is_never_cut(signals, single_process, tmp_path, monkeypatch, ends):
    written = slow_writing(monkeypatch, 4.0)

    def data(step, rank, size):
        if step == 1:  # its save follows
            for index in range(signals):
                terminate(1.0 + 1.2 * index)
        if step == 2:  # longer than the watching thread takes to look again
            time.sleep(0.5)
        return [tiny.batch(step)]

    ours = trainer(single_process, tmp_path, save_every=2, stop_grace_s=2.0, steps=5)
    history = ours.train(data)
    assert written and (tmp_path / "step_00000002" / "complete").exists()
    if signals == 1:
        assert not ends, "the step after the save ended in time"
        assert history.stopped and (tmp_path / "step_00000003" / "complete").exists()
    else:
        assert "a second signal came" in ends[0]


def test_what_a_thread_writes_in_the_background_is_written_to_the_end_before_a_stuck_rank_ends(
    single_process, tmp_path, monkeypatch
):
    written = slow_writing(monkeypatch, 3.0)
    at_the_end: list[list[str]] = []
    monkeypatch.setattr(stop, "exit_now", lambda message: at_the_end.append(list(written)))

    def data(step, rank, size):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: at_the_end)
        return [tiny.batch(step)]

    background = CheckpointSettings(background=True)
    trainer(single_process, tmp_path, background, save_every=1, stop_grace_s=0.2).train(data)
    assert len(at_the_end[0]) == 1


def test_handler_descriptor_and_thread_are_as_before_afterwards():
    threads, handler = threading.active_count(), signal.getsignal(signal.SIGTERM)
    with StopRequest(CPU) as request:
        assert threading.active_count() == threads + 1 and not request.received()
    assert threading.active_count() == threads and signal.getsignal(signal.SIGTERM) == handler
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_reach_whoever_watched_before():
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    before = signal.set_wakeup_fd(ours)
    handled = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopRequest(CPU, grace_s=100.0):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert os.read(theirs, 1) == bytes([signal.SIGUSR1])
        assert signal.set_wakeup_fd(-1) == ours
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, handled)
        os.close(theirs)
        os.close(ours)


def frame(name: str, path: str) -> traceback.FrameSummary:
    return traceback.FrameSummary(path, 7, name, lookup_line=False, line="...")


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (
            [
                frame("train", "/x/trainer.py"),
                frame("recv_forward", "/x/p2p.py"),
                frame("wrapper", "/y/torch/distributed/c10d_logger.py"),
                frame("all_reduce", "/y/torch/distributed/distributed_c10d.py"),
                frame("_wait", "/y/torch/distributed/distributed_c10d.py"),
            ],
            r"the collective all_reduce, called by recv_forward \(/x/p2p\.py, line 7\)",
        ),
        ([frame("train", "/x/trainer.py"), frame("read", "/x/data.py")], r"read \(/x/data\.py, line 7: \.\.\.\)"),
    ],
    ids=["a collective", "none"],
)
def test_a_stack_is_told_by_its_collective_and_who_called_it(frames, said):
    assert re.fullmatch(said, place_of(traceback.StackSummary.from_list(frames)))


def test_a_grace_that_is_no_number_is_a_type_error():
    with pytest.raises(TypeError, match="TrainerSettings: stop_grace_s must be a number of seconds, got '5'"):
        TrainerSettings(steps=1, stop_grace_s="5")


@pytest.mark.parametrize("grace", [0.0, -1.0, float("nan"), float("inf")])
def test_a_grace_that_is_no_time_is_refused(grace):
    with pytest.raises(ValueError, match="stop_grace_s must be finite and above 0"):
        TrainerSettings(steps=1, stop_grace_s=grace)


STUCK = """
import os, signal, threading, time
import megatron_mimo
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny

run = megatron_mimo.initialize(backend="gloo", timeout_s=300)

def data(step, rank, size):
    if step == 1 and run.rank == 0:
        for after in {signals}:
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if step == 1 and run.rank == 1:
        time.sleep(120)
    return [tiny.batch(step)]

Trainer(tiny.mimo_config(), run, TrainerSettings(steps=3, progress=False, stop_grace_s={grace})).train(data)
print("trained to the end")
"""


@pytest.mark.process
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("signals", "grace", "why"),
    [((0.5,), 2.0, "no step ended within 2 s"), ((0.5, 2.0), 100.0, "a second signal came")],
    ids=["grace", "second"],
)
def test_a_rank_that_waits_for_another_hears_sigterm_and_names_the_collective(signals, grace, why, tmp_path: Path):
    path = tmp_path / "rank.py"
    path.write_text(STUCK.format(signals=signals, grace=grace))
    began = time.monotonic()
    job = warm.ranks(2, path, env=os.environ | {"PYTHONPATH": str(warm.ROOT)})
    assert job.returncode == 1, job.stderr[-3000:]
    said = rf"rank 0: SIGTERM came, and {why}\. This rank was in the collective all_gather_into_tensor, called by "
    assert re.search(said + r"all_gathered \(\S*agreement\.py", job.stderr), job.stderr[-3000:]
    assert "trained to the end" not in job.stdout
    assert time.monotonic() - began < 90


def test_it_ends_while_a_forked_worker_lives_on() -> None:
    began = time.monotonic()
    with StopRequest(CPU):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True)
        worker.start()
    waited = time.monotonic() - began
    worker.kill()
    worker.join()
    assert waited < 10


FORKING = """
import multiprocessing, signal, sys, threading, time
import torch
from megatron_mimo.training import stop

said = []
stop.exit_now, stop._TOGETHER_S = said.append, 0.0
forked = multiprocessing.get_context("fork")
with stop.StopRequest(torch.device("cpu"), grace_s=0.2) as request:
    workers = [forked.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]

    def start():
        for worker in workers:
            worker.start()

    if sys.argv[1] == "another thread":
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    else:
        start()
    for worker in workers:  # as a reader of batches does with workers that do not end by themselves
        worker.terminate()
        worker.join(20)
        time.sleep(0.2)  # apart from the last, so that two would be a second signal
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [-signal.SIGTERM] * 2, codes
    assert not request.received()
assert said == [], said
print("neither heard it")
"""


@pytest.mark.process
@pytest.mark.parametrize("forks", ["this thread", "another thread"])
def test_a_signal_to_a_forked_worker_ends_the_worker_and_nothing_else(forks):
    """In a process of its own: what other tests have imported has hooks around forks too."""
    done = warm.python("-c", FORKING, forks)
    assert done.returncode == 0 and "neither heard it" in done.stdout, done.stderr[-3000:]


def test_a_fork_that_goes_on_with_the_program_leaves_its_parents_watch_alone(ends):
    with StopRequest(CPU, grace_s=100.0) as request:
        if (child := os.fork()) == 0:
            try:
                request.__exit__(None, None, None)
                os._exit(int(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL))
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert request._watcher.is_alive()
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(request.received) < 5


def test_a_handler_that_python_did_not_set_is_no_error_afterwards(monkeypatch):
    handlers = []

    def as_of_a_library(number, handler):
        handlers.append(handler)
        return None

    monkeypatch.setattr(stop.signal, "signal", as_of_a_library)
    with StopRequest(CPU):
        pass
    assert len(handlers) == 2 and handlers[1] is signal.SIG_DFL


def test_a_run_that_knows_of_its_end_is_left_to_end_by_itself_however_long_it_takes(single_process, ends):
    with StopRequest(CPU, grace_s=0.2) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(request.received) < 5
        time.sleep(0.6)
    assert ends == []
