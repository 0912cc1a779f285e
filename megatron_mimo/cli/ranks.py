"""Ranks of this host: torchrun's own launcher in this process, so that its exit status and its end are ours."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_mimo.cli.errors import INTERRUPTED, STOPPED, Refused
from megatron_mimo.torchrun import torchrun_number

if TYPE_CHECKING:
    from megatron_mimo.cli.recipe import Layout

_STARTED = "MEGATRON_MIMO_STARTED_BY"


def under_torchrun() -> bool:
    """Whether this process is a rank that somebody started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def started_here() -> bool:
    """Whether `run_ranks` started this process, whose words had been checked then."""
    return _STARTED in os.environ


def check_processes(layout: Layout, processes: int) -> None:
    """Refuses a layout that so many processes cannot have, and more of them on this host than it has GPUs.

    Args:
        layout: of a recipe, or asked for.
        processes: to be started on this host; under torchrun what it has started counts in their place.

    Raises:
        Refused: naming both numbers.
    """
    option, here = "--nproc", processes
    if under_torchrun():
        option, here = "--nproc-per-node", torchrun_number("LOCAL_WORLD_SIZE", 1, 1)
        processes = torchrun_number("WORLD_SIZE", 1, 1)
    _check_devices(option, here)
    whole = layout.tensor * layout.pipeline * layout.context
    if processes % whole:
        raise Refused(
            f"layout: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} takes a multiple "
            f"of {whole} processes, found {processes}; give {option} {whole}, or lower one of the three"
        )


def _check_devices(option: str, processes: int) -> None:
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise Refused(
            f"{option} {processes}: expected at most one process a GPU, found {torch.cuda.device_count()} GPUs here; "
            f"lower {option} and the layout"
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
    if not started_here():
        return
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[_STARTED]):  # it went in the meantime
        os._exit(1)
