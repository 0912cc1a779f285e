"""Kill -9 while a checkpoint is written in the background: those that are finished stay, and the next start goes on."""

import random
import re
from pathlib import Path

import pytest

from megatron_mimo.training.checkpoints import manifest
from tests import warm

ROUNDS = 20

KILLS = """
import contextlib, os, signal, sys, threading
from pathlib import Path
from megatron_mimo.training.checkpoints import directories, writing

saves, directory = 0, Path({directory!r})
publish, write = directories.publish, writing.write

def children():
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found += (task / "children").read_text().split()
    return found

def kill():
    try:
        print("children", children(), "writing", any(directory.glob("writing_*")), flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)

def writes(plan):
    global saves
    saves += 1
    assert threading.current_thread() is not threading.main_thread()
    if saves == {save}:
        threading.Timer({delay}, kill).start()
    return write(plan)

def published(written, target):
    publish(written, target)
    print("finished", int(target.name.rpartition("_")[2]), flush=True)

directories.publish, writing.write = published, writes
"""

TRAINER = """
import megatron_mimo
from megatron_mimo.training import CheckpointSettings, Trainer, TrainerSettings
from tests import tiny

run = megatron_mimo.initialize(backend="gloo")
settings = TrainerSettings(steps=100_000, save_every=1, directory=directory, progress=False)
ours = Trainer(tiny.mimo_config(), run, settings, checkpoints=CheckpointSettings(background=True))
print("loaded", ours.load(), flush=True)
ours.train(lambda step, rank, size: [tiny.batch(step)])
"""

PRETRAIN = """
from examples.recipes import any_to_any_small
from megatron_mimo.training import pretrain
from tests.distributed.cases.pretrain import SIZES, TRAINING

sys.argv[1:] = [*SIZES, *TRAINING, "--train-iters", "100000", "--global-batch-size", "1", "--save-interval", "1"]
sys.argv += ["--save", str(directory), "--load", str(directory), "--async-save", "--use-persistent-ckpt-worker"]
pretrain(any_to_any_small)
"""


def whole(directory: Path) -> list[int]:
    """The steps of checkpoints of which every file is as it was written."""
    found = []
    for path in directory.glob("[si]t*_*"):
        if (path / manifest.COMPLETE).exists() and (written := manifest.read(path)) is not None:
            assert manifest.faults(path, written) == [], path
            found.append(int(path.name.rpartition("_")[2]))
    return sorted(found)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("loop", ["trainer", "pretrain"])
def test_kill_9_within_background_saves_loses_no_finished_checkpoint_and_leaves_no_process(loop, tmp_path) -> None:
    draw = random.Random(18)
    directory = tmp_path / "run"
    directory.mkdir()
    finished: set[int] = set()
    within = 0
    for turn in range(ROUNDS):
        expected = max(whole(directory), default=0)
        if loop == "pretrain" and expected:
            # Megatron's note of the newest is written once the checkpoint lies there.
            noted = int((directory / "latest_checkpointed_iteration.txt").read_text())
            assert noted in whole(directory) and noted >= max(finished - {expected}, default=0)
            expected = noted
        kills = KILLS.format(directory=str(directory), save=draw.randint(1, 3), delay=draw.uniform(0, 0.1))
        done = warm.python("-c", kills + (TRAINER if loop == "trainer" else PRETRAIN))
        assert done.returncode == -9, done.stderr[-3000:]
        said_so = r"^loaded (\d+)" if loop == "trainer" else r"successfully loaded .* at iteration (\d+)"
        loaded = re.search(said_so, done.stdout, re.M)
        assert int(loaded[1] if loaded else 0) == expected, (turn, done.stdout[-3000:])
        finished |= {int(step) for step in re.findall(r"^finished (\d+)", done.stdout, re.M)}
        assert finished <= set(whole(directory)), turn
        said = re.search(r"children \[\] writing (True|False)", done.stdout)
        assert said, done.stdout[-3000:]
        within += said[1] == "True"
    assert finished and within >= ROUNDS // 2, (sorted(finished), within)
    print(f"{loop}: {ROUNDS} kills, {within} within a save, {len(finished)} checkpoints finished, none lost")
