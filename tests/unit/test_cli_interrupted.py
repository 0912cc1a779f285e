"""Ctrl-C: one line, status 130, nothing left running, whatever the command was about."""

import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_mimo.cli import app, entry
from megatron_mimo.cli.errors import told
from tests.commands import caption, command, pictures

COMMANDS = {
    "train": ["train", "caption"],
    "generate": ["generate", "run", "data", "--output", "answers"],
    "evaluate": ["evaluate", "run", "data", "--output", "scores"],
    "convert": ["convert", "run", "target"],
    "inspect": ["inspect", "run"],
    "data show": ["data", "show", "caption"],
    "data prepare": ["data", "prepare", "caption"],
}


def test_every_command_is_tried() -> None:
    names = {each.callback.__name__ for each in app.app.registered_commands}
    names |= {f"data {each.callback.__name__}" for each in app.data_app.registered_commands}
    assert names == COMMANDS.keys()


class Interrupted(AbstractContextManager):
    """Begins, and is interrupted."""

    def __enter__(self) -> None:
        raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_one_line_and_130_in_every_command(name, monkeypatch) -> None:
    monkeypatch.setattr(app, "Answered", Interrupted)
    # What a command sets for the process that is its own.
    monkeypatch.setattr(app.logging, "basicConfig", lambda **options: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    found = CliRunner().invoke(app.app, COMMANDS[name])
    assert (found.exit_code, found.stderr, found.stdout) == (130, "megatron-mimo: interrupted\n", "")


def test_ctrl_c_before_a_command_has_begun_is_one_line_too(monkeypatch, capsys) -> None:
    class Importing:
        def find_spec(self, name, path=None, target=None):
            if name == "megatron_mimo.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "megatron_mimo.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Importing(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "megatron-mimo: interrupted\n"


def test_ctrl_c_that_somebody_else_caught_is_still_what_ends_the_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended, told(debug=False):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except BaseException:  # as an import that is tried does
            raise RecursionError("of half a module") from None
    assert ended.value.code == 130 and capsys.readouterr().err == "megatron-mimo: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = each.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(each.parent.name))
    return found


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("after", [1.5, 6.0, 14.0])
def test_nothing_runs_on_after_ctrl_c(tmp_path, after) -> None:
    """Cold processes, as a terminal interrupts them: while they begin, import, and work or have ended."""
    run = tmp_path / "run"
    assert command(*caption(run, steps=2)).returncode == 0
    recipe = caption(run)[1:]
    words = {
        "generate": ["generate", run, pictures(), "--output", tmp_path / "answers", "--nproc", 2],
        "evaluate": ["evaluate", run, pictures(), "--output", tmp_path / "scores"],
        "convert": ["convert", run, tmp_path / "hf"],
        "inspect": ["inspect", run],
        "data show": ["data", "show", *recipe, "--output", tmp_path / "packs.html"],
        "data prepare": ["data", "prepare", *recipe],
    }
    assert words.keys() | {"train"} == COMMANDS.keys()  # train has a test of its own
    for name, each in words.items():
        started = subprocess.Popen(
            [sys.executable, "-m", "megatron_mimo.cli", *map(str, each)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        time.sleep(after)
        ended_before = started.poll() is not None
        if not ended_before:
            os.killpg(started.pid, signal.SIGINT)
        _, said = started.communicate(timeout=120)
        if ended_before:
            assert started.returncode == 0, (name, said)
        else:
            lines = [line for line in said.splitlines() if line.startswith("megatron-mimo: ")]
            # Python ends itself by the signal where a string was being executed, as of a dataclass. Shells say 130.
            assert started.returncode in (130, -signal.SIGINT), (name, started.returncode, said)
            # Its work was done and it was ending; of ranks that had ended none was left to say so.
            silent = [] if started.returncode == -signal.SIGINT or "30/30" in said else None
            assert lines in (["megatron-mimo: interrupted"], silent), (name, started.returncode, said)
            assert "Traceback" not in said, (name, said)
        waited = time.monotonic() + 30
        while session(started.pid):
            assert time.monotonic() < waited, (name, session(started.pid))
            time.sleep(0.1)
