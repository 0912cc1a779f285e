"""A full disk: one line that says what to do, status 1, and no half-written file under its final name."""

import errno
import os
from pathlib import Path

import pytest

from megatron_mimo.cli.errors import FAILED, line_of, told
from megatron_mimo.data.written import write_whole
from tests import warm
from tests.commands import caption, command, pictures

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
from megatron_mimo.cli.entry import main
sys.argv[1:] = {words!r}
main()
"""
SAID = "the disk is full, or a limit of file sizes is met; free some space, then the same command again"


def test_what_a_full_disk_is_told_as_whatever_error_it_came_as(capsys) -> None:
    plain = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/scores.json")
    assert line_of(plain) == f"out/scores.json: {SAID}"
    for text in (
        "rank 0: __0_0.distcp: OSError: [Errno 27] File too large",
        "[enforce fail at inline_container.cc:672]",
    ):
        assert line_of(RuntimeError(f"the checkpoint was not saved: {text}")) == SAID
    wrapped = RuntimeError("I/O error")
    wrapped.__cause__ = plain
    assert line_of(wrapped) == SAID
    assert SAID not in line_of(PermissionError(errno.EACCES, "Permission denied", "out"))
    with pytest.raises(SystemExit) as ended, told(False):
        raise plain
    assert ended.value.code == FAILED and len(capsys.readouterr().err.splitlines()) == 1


def test_a_text_that_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "scores.json"
    write_whole(file, "before")

    def full(self: Path, text: str, **options) -> None:
        self.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=str(file)) as found:
        write_whole(file, "after")
    assert found.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]


@pytest.mark.long
@pytest.mark.process
def test_each_command_that_writes_ends_in_one_line_and_leaves_no_half_file_under_its_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(*caption(run, steps=2)).returncode == 0
    for size, final, words in (
        (50_000, "hf", ["convert", run, tmp_path / "hf"]),
        (50_000, "one.safetensors", ["convert", run, tmp_path / "one.safetensors", "--to", "safetensors"]),
        (50_000, "ck", ["convert", run, tmp_path / "ck", "--to", "megatron"]),
        (300, "a/answers.jsonl", ["generate", run, pictures(), "--output", tmp_path / "a", "--max-new-tokens", 4]),
        (3000, "s/scores.json", ["evaluate", run, pictures(), "--output", tmp_path / "s", "--max-new-tokens", 4]),
        (3000, "packs.html", ["data", "show", *caption(run)[1:], "--output", tmp_path / "packs.html"]),
        (50_000, "other/model", caption(tmp_path / "other", steps=2)),
    ):
        done = warm.python("-c", LIMITED.format(size=size, words=[str(word) for word in words]))
        lines = [line for line in done.stderr.splitlines() if line.startswith("megatron-mimo: ")]
        assert done.returncode == FAILED and len(lines) == 1 and SAID in lines[0], (words, done.stderr)
        assert not (tmp_path / final).exists(), words
