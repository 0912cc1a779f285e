"""Files that have their name once they are whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text beside its place and moves it there: where it cannot be written, what was there stays.

    Args:
        path: of the file; its directory is there.
        text: in UTF-8.

    Raises:
        OSError: naming the file, such as where the disk is full; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
