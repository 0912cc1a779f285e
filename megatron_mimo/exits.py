"""A rank that fails takes its job down at once, instead of leaving its peers waiting."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Within it, an exception on one rank ends that process at once, and with it the job.

    A rank that raises leaves its peers waiting in a collective, and ordinary interpreter exit may wait for them too.
    Here the exception is printed as usual, pending NCCL communication is aborted and the process exits with status 1
    without running exit handlers; torchrun then stops the other ranks, and gloo ranks see the connection close. With
    one rank there is nobody to take down, and the exception propagates. ``sys.exit(0)`` and a finished body pass.

    Example:
        >>> with exit_on_error():
        ...     answer = 6 * 7
        >>> answer
        42
    """
    try:
        yield
    except SystemExit as request:
        if request.code in (None, 0) or not _has_peers():
            raise
        _exit_now(request)
    except BaseException as error:
        if not _has_peers():
            raise
        _exit_now(error)


def exit_now(message: str) -> None:
    """Ends this process at once with status 1, whatever its other threads wait for.

    Args:
        message: to print on standard error.
    """
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Helper processes (data loaders, dist_checkpointing's writers) would outlive this one and hold its output open.
    for child in multiprocessing.active_children():
        child.kill()
    # _exit rather than exit: destructors of process groups may wait for ranks that will never answer.
    os._exit(1)


def _exit_now(error: BaseException) -> None:
    sys.excepthook(type(error), error, error.__traceback__)
    exit_now("")


def _has_peers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
