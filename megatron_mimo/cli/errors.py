"""How a command ends: one line that says what to do, and the exit status that a script reads."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType, TracebackType

#: Exit statuses: what was asked for cannot be done; it was begun and failed; SIGTERM, Ctrl-C and nobody who reads what
#: is printed, as shells have them.
REFUSED, FAILED, STOPPED, INTERRUPTED, UNREAD = 2, 1, 143, 130, 141

#: Modules that the extras `hf` and `data` bring.
_OF_EXTRAS = (
    "PIL", "av", "datasets", "huggingface_hub", "jinja2", "safetensors", "soundfile", "soxr", "tokenizers",
    "torchvision", "transformers",
)  # fmt: skip

# What a path is not, and what to do about it.
_OF_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_REMEDIES = {
    errno.ENOENT: "name what is there",
    errno.EEXIST: "name another place, or remove what is there",
    errno.ENOTDIR: "name another place, or remove the file that stands where a directory is to be",
    errno.EISDIR: "name a file in it",
    errno.EACCES: "name a place that you may read and write, or change its rights",
    errno.EPERM: "name a place that you may read and write, or change its rights",
    errno.EROFS: "name a place that can be written to",
}

# As gloo and NCCL say that another rank has gone.
_OF_PEERS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# How long other ranks wait, so that the first one can say what all of them found, and the job ends.
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
    with _interruptions() as interrupted:
        try:
            yield
            sys.stdout.flush()  # what is printed is written too before the command is done
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if _nobody_reads():
                _end(UNREAD)
            ended_by = KeyboardInterrupt() if interrupted and not debug else error
            _let_the_first_say(error)
            _say(ended_by, debug)
            _end(_status(ended_by))


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """The Ctrl-C that came within it, each a KeyboardInterrupt as ever.

    A library that catches one while it is being imported leaves half a module, and something else is raised later.
    """
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield found
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    at_fault = (Refused, ValueError, TypeError, ImportError, *_OF_PATHS)
    # That of a hub that cannot be reached, and of nothing that was begun; a broken pipe has a kind of its own.
    return REFUSED if isinstance(error, at_fault) or type(error) is ConnectionError else FAILED


def _end(status: int) -> None:
    """Ends the process; on a rank of several without waiting for its peers, who may wait for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _let_the_first_say(error: BaseException) -> None:
    """On a rank that is not the first, and on one whose peer has gone: waits, so that one of them says what all found.

    A job ends with the first rank that does; whatever waits for a SIGTERM to go on does not.
    """
    several, rank = int(os.environ.get("WORLD_SIZE", "1")) > 1, os.environ.get("RANK", "0")
    if several and (rank != "0" or any(words in str(error) for words in _OF_PEERS)):
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_FIRST_RANK_S)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone, such as `head`.

    What cannot be written is let go of, or Python would meet it again at its end.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.errno == errno.EPIPE
    return False


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or what it came of, is that a file could not be written further."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return True
        # As checkpoints say what a writer met: the words of the system, or those of torch's writer, which has none.
        if any(words in str(found) for words in (*map(os.strerror, _FULL), "inline_container.cc")):
            return True
        found = found.__cause__ or found.__context__
    return False


def line_of(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error)
    if disk_is_full(error):
        name = f"{error.filename}: " if isinstance(error, OSError) and error.filename is not None else ""
        return f"{name}the disk is full, or a limit of file sizes is met; free some space, then the same command again"
    if isinstance(error, OSError) and error.filename is not None:
        remedy = _REMEDIES.get(error.errno or 0)
        text = f"{error.filename}: {error.strerror}{'' if remedy is None else f'; {remedy}'}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _OF_EXTRAS:
        return f"{error.name} is missing: pip install 'megatron-mimo[cli,hf,data]'"
    said = " ".join(text.split())
    return said if isinstance(error, Refused | ValueError | OSError) and said else f"{type(error).__name__}: {said}"


def _say(error: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    rank, several = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if rank != "0" and isinstance(error, Refused | KeyboardInterrupt):
        return  # which the first rank says
    where = f"rank {rank}: " if several and not isinstance(error, Refused | KeyboardInterrupt) else ""
    more = "" if debug or isinstance(error, Refused | KeyboardInterrupt) else " (--debug shows where)"
    print(f"megatron-mimo: {where}{line_of(error)}{more}", file=sys.stderr)


def _hook(debug: bool):
    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        del kind, trace
        _let_the_first_say(error)
        _say(error, debug)

    return say
