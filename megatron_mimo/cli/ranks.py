"""Ranks of this host: torchrun's own launcher in this process, so that its exit status and its end are ours."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from megatron_mimo.cli.errors import INTERRUPTED, STOPPED, Refused

_STARTED = "MEGATRON_MIMO_STARTED_BY"


def under_torchrun() -> bool:
    """Whether this process is a rank that somebody started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_devices(processes: int) -> None:
    """Refuses more processes than there are GPUs, where there are any.

    Raises:
        Refused: naming both numbers.
    """
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise Refused(
            f"--nproc {processes}: expected at most one process a GPU, found {torch.cuda.device_count()} GPUs here; "
            "lower --nproc and the recipe's layout"
        )


def run_ranks(processes: int, arguments: Sequence[str]) -> int:
    """Runs `megatron-mimo *arguments` on ranks of this host, as torchrun does, and gives the exit status.

    When one fails the others are ended; when this process is killed, so are they.

    Args:
        processes: ranks.
        arguments: of the command line.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("", ".agent.server.api", ".multiprocessing.api"):  # which torch gives levels of their own
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[_STARTED] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_mimo.cli", *arguments)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else STOPPED
    return 0


def end_with_starter() -> None:
    """On a rank that `run_ranks` started: the kernel kills it when its starter is gone (PR_SET_PDEATHSIG, prctl(2))."""
    if _STARTED not in os.environ:
        return
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[_STARTED]):  # it went in the meantime
        os._exit(1)
