"""Files that have their name once they are whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there: where it cannot be written, what was there stays.

    Args:
        path: of the file; its directory is there.
        content: a text, which is written in UTF-8, or bytes.

    Raises:
        OSError: naming the file, such as where the disk is full; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
