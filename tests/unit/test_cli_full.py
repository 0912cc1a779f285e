"""A full disk: one line that says what to do, and no half-written file; `test_cli_faults.py` has each command."""

import errno
import os
from pathlib import Path

import pytest

from megatron_mimo.cli.errors import FAILED, line_of, told
from megatron_mimo.data.written import write_whole

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


@pytest.mark.parametrize("after", ["after", b"after"])
def test_a_file_that_cannot_be_written_leaves_what_was_there_and_nothing_else(after, tmp_path, monkeypatch) -> None:
    file = tmp_path / "scores.json"
    write_whole(file, "before")

    def full(self: Path, content: str | bytes, **options) -> None:
        with self.open("wb") as partial:
            partial.write(b"af")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text" if isinstance(after, str) else "write_bytes", full)
    with pytest.raises(OSError, match=str(file)) as found:
        write_whole(file, after)
    monkeypatch.undo()
    assert found.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]
