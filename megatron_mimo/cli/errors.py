"""How a command ends: one line that says what to do, and the exit status that a script reads."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

#: Exit statuses: what was asked for cannot be done; it was begun and failed; SIGTERM and Ctrl-C, as shells have them.
REFUSED, FAILED, STOPPED, INTERRUPTED = 2, 1, 143, 130

# How long other ranks go on, so that the first one can say what all of them found.
_FIRST_RANK_S = 1.0


class Refused(Exception):
    """What was asked for cannot be done; nothing was begun. The message is one line and says what to do."""


@contextmanager
def told(debug: bool) -> Iterator[None]:
    """Within it, an exception is one line on standard error and ends the process: with 2 where the input is at fault.

    On a rank of several an exception ends the process at once, as `exit_on_error` does.

    Args:
        debug: show the traceback.
    """
    sys.excepthook = _hook(debug)
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        _say(error, debug)
        _end(_status(error))


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    at_fault = (Refused, FileNotFoundError, FileExistsError, NotADirectoryError, ValueError, TypeError, ImportError)
    return REFUSED if isinstance(error, at_fault) else FAILED


def _end(status: int) -> None:
    """Ends the process; on a rank of several without waiting for its peers, who may wait for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_FIRST_RANK_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def line_of(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    said = " ".join(text.split())
    return said if isinstance(error, Refused | ValueError | OSError) and said else f"{type(error).__name__}: {said}"


def _say(error: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    rank, several = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if rank != "0" and isinstance(error, Refused | KeyboardInterrupt):
        return  # which the first rank says
    where = f"rank {rank}: " if several and not isinstance(error, Refused) else ""
    more = "" if debug or isinstance(error, Refused | KeyboardInterrupt) else " (--debug shows where)"
    print(f"megatron-mimo: {where}{line_of(error)}{more}", file=sys.stderr)


def _hook(debug: bool):
    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        del kind, trace
        _say(error, debug)

    return say
