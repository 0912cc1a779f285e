"""Batches on their way to a GPU: pinned, in one copy, without waiting for the device."""

import pytest
import torch
import torch.distributed as dist

import megatron_mimo
from megatron_mimo.data.step import read_step
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.sources import PackSource
from tests import data_samples as made
from tests import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def run():
    """Megatron-Core with one rank on the GPU."""
    yield megatron_mimo.initialize(seed=1)
    megatron_mimo.shutdown()


def step_of(batches: list[dict], device: torch.device):
    alone = dist.new_group([dist.get_rank()])
    return read_step(
        iter(batches), len(batches), keep=dict, count=lambda batch: {("loss", "text"): 1.0}, tensor_group=alone,
        data_group=None, device=device,
    )  # fmt: skip


def test_batches_lie_in_pinned_memory_and_move_without_a_wait(run, tmp_path):
    path = made.tiny_records(tmp_path)
    data = made.tiny_data(path, workers=2)
    packs = [next(data) for _ in range(3)]
    data.close()
    step = step_of([pack.batch() for pack in packs], run.device)
    assert len(step._buffers) == 3 and all(buffer.is_pinned() for buffer in step._buffers)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [step.next()[0] for _ in packs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for pack, batch in zip(packs, moved, strict=True):
        assert batch["input_ids"].is_cuda and torch.equal(batch["input_ids"].cpu(), pack.input_ids)
        assert torch.equal(batch["labels"].cpu(), pack.labels)


def test_a_trainer_reads_packs_of_files_and_goes_on_exactly(run, tmp_path):
    path = made.tiny_records(tmp_path)

    def trainer(directory, steps: int) -> Trainer:
        settings = TrainerSettings(steps=steps, directory=directory, decay="constant", progress=False)
        return Trainer(tiny.mimo_config(), run, settings)

    first = trainer(tmp_path / "out", 3)
    source = PackSource(made.tiny_data(path, workers=2), microbatches=2)
    first.train(source)
    source.data.close()
    seen = made.tiny_data(path)
    for _ in range(6):
        next(seen)
    resumed = trainer(tmp_path / "out", 4)
    assert resumed.load(tmp_path / "out" / "step_00000003") == 3
    source = PackSource(made.tiny_data(path), microbatches=2)
    asked, give = [], source.next_step
    source.next_step = lambda: [asked.append(batch["input_ids"]) or batch for batch in give()]
    resumed.train(source)
    assert [ids.tolist() for ids in asked] == [next(seen).input_ids.tolist() for _ in range(2)]
