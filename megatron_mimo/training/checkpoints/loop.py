"""Checkpoints of Megatron's own loop: looked at before they are loaded, and with what the model is beside them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_mimo.compat.checkpoints import directory_to_load
from megatron_mimo.compat.megatron import writers_report_here
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.checkpoints import identity
from megatron_mimo.training.checkpoints.inert import check_inert
from megatron_mimo.training.checkpoints.reading import problems_of, read


def functions(model: Callable[[], MimoModelConfig]) -> dict[str, Callable[..., Any]]:
    """What Megatron's loop shall load and save by, by the name of its own function.

    Args:
        model: gives the configuration of the run's model, once Megatron has its arguments.
    """
    load, load_common, save = (
        dist_checkpointing.load,
        dist_checkpointing.load_common_state_dict,
        dist_checkpointing.save,
    )

    def read_checked(wanted: dict, directory: str, *given: Any, **options: Any) -> Any:
        return read(wanted, directory, model(), lambda *one, **more: load(*one, *given, **more), **options)

    def read_common(directory: str) -> dict:
        check_inert(directory)
        return load_common(directory)

    def write(state: dict, directory: str, *given: Any, async_sharded_save: bool = False, **options: Any) -> Any:
        def finish() -> None:
            if dist.get_rank() == 0:
                identity.write(Path(directory), model())

        if async_sharded_save:
            request = save(state, directory, *given, async_sharded_save=True, **options)
            request.add_finalize_fn(finish)
            return request
        with writers_report_here():
            save(state, directory, *given, **options)
        finish()
        return None

    return {"load": read_checked, "load_common_state_dict": read_common, "save": write}


def check_loadable(args: Namespace, config: MimoModelConfig) -> None:
    """Refuses a checkpoint that Megatron's loop shall not load. Rank-local, before any process group.

    Args:
        args: Megatron's, which name the checkpoint.
        config: of the model to load into.

    Raises:
        ValueError: loading it would run what the file says, or it is of another model.
    """
    for load in (args.load, args.pretrained_checkpoint):
        path = None if load is None else directory_to_load(args, load)
        problems = [] if path is None else problems_of(path, config)
        if problems:
            raise ValueError("\n  ".join(problems))
