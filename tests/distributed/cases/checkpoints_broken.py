"""A checkpoint that has changed is refused on every rank at once, whichever rank would read the harm."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mimo.launch import Run
from megatron_mimo.training.checkpoints.inert import stored
from megatron_mimo.training.checkpoints.manifest import Damaged
from tests.distributed.cases.training import four_samples, trainer
from tests.distributed.harness import case, shared_directory

# A rank that is left waiting waits for the timeout of its collective, which is minutes.
SECONDS = 10.0


def places(path: Path) -> dict[str, tuple[Path, int]]:
    """What is flipped: by name, the file and the byte in it."""
    found = {f"middle of {file.name}": (file, file.stat().st_size // 2) for file in sorted(path.iterdir())}
    common = next(each for each in stored(path / ".metadata") if each.name.startswith("common_state"))
    return found | {"common state": (common.file, common.offset + common.length // 2)}


@case(ranks=2, timeout_s=120)
def a_flipped_bit_of_any_file_is_refused_on_every_rank_within_seconds(run: Run) -> None:
    ours = trainer(run, shared_directory() / "flipped", distributed=True)
    ours.train_step(four_samples)
    path = ours.save()
    before = [weight.clone() for weight in ours.models[0].parameters()]
    harmed = places(path)
    assert {".metadata", "metadata.json", "mimo.json", "complete", "__0_0.distcp", "__1_0.distcp"} <= {
        file.name for file, _ in harmed.values()
    }
    dist.barrier()
    for what, (file, place) in harmed.items():
        whole = file.read_bytes()
        dist.barrier()
        if run.rank == 0:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        dist.barrier()
        for weights_only in (False, True):
            began = time.monotonic()
            with pytest.raises(Damaged, match="is not whole, and nothing was loaded"):
                ours.load(path, weights_only=weights_only)
            assert time.monotonic() - began < SECONDS, what
        dist.barrier()
        if run.rank == 0:
            file.write_bytes(whole)
        dist.barrier()
    assert all(torch.equal(weight, kept) for weight, kept in zip(ours.models[0].parameters(), before))
    assert ours.load(path) == 1
