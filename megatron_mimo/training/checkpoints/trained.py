"""What trained in the run that wrote a checkpoint, and whether its optimizer's state is that of another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.training.parts.control import TrainingControl


@dataclass(frozen=True)
class Trained:
    """What trained in a run, so that its optimizer has a state of it, and how that state is stored.

    Args:
        frozen: what the names of parameters that did not train begin with.
        embedding_rows: rows of the embedding that trained; empty where the table trained like the rest.
        distributed_optimizer: whether it is that of Megatron's distributed optimizer; None where that is
            not known, and not compared.
    """

    frozen: tuple[str, ...]
    embedding_rows: tuple[int, ...]
    distributed_optimizer: bool | None = None

    @classmethod
    def by(
        cls, control: TrainingControl, config: MimoModelConfig, distributed_optimizer: bool | None = None
    ) -> Trained:
        """What `control` trains of the model that `config` describes."""
        return cls(
            frozen=control.frozen_prefixes(config),
            embedding_rows=tuple(sorted(control.embedding_rows)),
            distributed_optimizer=distributed_optimizer,
        )


def check_trained(path: Path | str, theirs: Trained, ours: Trained, instead: str) -> None:
    """Refuses an optimizer state that this run cannot read, or that has momentum of rows that shall not move.

    Args:
        path: of the checkpoint, for the error.
        theirs: what trained in the run that wrote it.
        ours: what trains now.
        instead: what to do, the end of the error.

    Raises:
        ValueError: the two differ.
    """
    if tuple(theirs.frozen) != ours.frozen:
        raise ValueError(
            f"{path} was written with {list(theirs.frozen)} frozen, this run freezes {list(ours.frozen)}: the "
            f"optimizer's states do not match. {instead}"
        )
    rows = set(theirs.embedding_rows)
    if ours.embedding_rows and not (rows and rows <= set(ours.embedding_rows)):
        raise ValueError(
            f"{path} has momentum of embedding rows outside embedding_rows, which would go on moving. {instead}"
        )
    distributed = (theirs.distributed_optimizer, ours.distributed_optimizer)
    if None not in distributed and distributed[0] != distributed[1]:
        raise ValueError(
            f"{path} was written with use_distributed_optimizer={distributed[0]}, this run has {distributed[1]}: the "
            f"optimizer's state is stored in another form. {instead} To go on with that state, set "
            f"use_distributed_optimizer={distributed[0]} in OptimizerConfig and DistributedDataParallelConfig."
        )
