"""A model's weights as a checkpoint without an optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_mimo.compat.checkpoints import planned
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.launch import Run
from megatron_mimo.model import MimoModel
from megatron_mimo.training.checkpoints.writing import Saver


def save_weights(
    path: Path, chunks: Sequence[MimoModel], run: Run, beside: Callable[[Path], None] = lambda written: None
) -> None:
    """Writes a model's weights to `path`, whole, for any layout. Collective over all ranks.

    `Trainer.load(path, weights_only=True)`, `load_parts` and `pretrain --load` with `--finetune` read it.

    Args:
        path: directory of the checkpoint, which is replaced once the new one is whole.
        chunks: of the model on this rank, not wrapped.
        run: the layout and its process groups.
        beside: writes other files to the directory that it is given, on rank 0.

    Raises:
        OSError: on every rank, where one of them could not write.
    """
    metadata: dict[str, Any] = {"singleton_local_shards": False, "dp_cp_group": run.groups.dp_cp}
    state = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    write_weights(path, state, chunks[0].mimo_config, beside)


def write_weights(
    path: Path,
    weights: Mapping[str, Any],
    config: MimoModelConfig,
    beside: Callable[[Path], None] = lambda written: None,
) -> None:
    """As `save_weights`, of a state that is sharded as `dist_checkpointing.save` takes it."""

    def plan(written: Path):
        state = {**weights, "step": 0, "iteration": 0, "checkpoint_version": 3.0}
        return planned(dist_checkpointing.save, state, written, content_metadata={"singleton_local_shards": False})

    Saver().save(plan, path, config, background=False, beside=beside)
