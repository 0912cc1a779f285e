"""The training loop on several ranks: batches, losses, checkpoints, signals."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.launch import Run
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny
from tests.distributed.harness import case, relayout, shared_directory

LENGTH = 16
PIPELINE = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PIPELINE, "virtual_pipeline_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2}


def model_config(run: Run, **changes):
    """The tiny model on a layout; four layers, so that two stages of two chunks each have one."""
    layout = run.layout
    config = tiny.language_config(
        num_layers=4,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        sequence_parallel=layout.tensor_model_parallel_size > 1,
        overlap_p2p_comm=layout.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=layout.virtual_pipeline_model_parallel_size is None,
        **changes,
    )

    return tiny.mimo_config(tiny.language_spec(config))


def four_samples(step: int, rank: int, size: int) -> list[dict]:
    """Microbatches of one sample: read and write, write alone, text, text; a second rank has no image."""
    draw = torch.Generator().manual_seed(100 + step)
    batches = []
    for read, write in ((2, 3), (0, 2), (0, 0), (0, 0)):
        ids = torch.randint(0, 60, (1, LENGTH), generator=draw)
        ids[0, 1 : 1 + read] = tiny.READ
        ids[0, 9 : 9 + write] = tiny.WRITE
        batch = dict(
            input_ids=ids,
            labels=ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1),
            loss_mask=(torch.rand(1, LENGTH, generator=draw) > 0.3).float(),
        )
        if read:
            batch["modality_inputs"] = {
                "images": {"patches": {"x": torch.randn(1, read, tiny.PIXELS, generator=draw)}}
            }
        if write:
            pixels = torch.randn(write, tiny.PIXELS, generator=draw)
            batch["modality_targets"] = {"images": {"pixels": {"pixels": pixels}}}
        batches.append(batch)
    share = len(batches) // size
    return batches[rank * share : (rank + 1) * share]


def trainer(run: Run, directory, steps: int = 4, per_token: bool = True, **options) -> Trainer:
    # Adam's epsilon far above rounding: with 1e-8 its first step is the gradient's sign.
    distributed = options.pop("distributed", False)
    return Trainer(
        model_config(run, calculate_per_token_loss=per_token),
        run,
        TrainerSettings(steps=steps, decay="constant", progress=False, directory=directory, **options),
        optimizer=OptimizerConfig(
            lr=1e-2, adam_eps=1e-3, clip_grad=1.0, use_distributed_optimizer=distributed
        ),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=distributed,
            overlap_param_gather=distributed,
        ),
    )


def losses(history) -> list[dict]:
    return [dict(report.losses) for report in history.steps]


def assert_close(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs, rel=1e-5), (found, expected)


@case(ranks=2, timeout_s=120)
def trainer_gives_the_same_losses_on_every_layout(run: Run) -> None:
    directory = shared_directory() / "layouts"
    first = trainer(run, directory)
    start = first.save()
    expected = losses(first.train(four_samples))
    for layout, options in (
        ({}, {"per_token": False}),
        ({}, {"distributed": True}),
        (TENSOR, {}),
        (PIPELINE, {}),
        (PIPELINE, {"per_token": False}),
        (INTERLEAVED, {}),
    ):
        run = relayout(**layout)
        other = trainer(run, None, **options)
        other.load(start)
        assert_close(losses(other.train(four_samples)), expected)


@case(ranks=2)
@case(ranks=2, **TENSOR)
@case(ranks=2, **PIPELINE)
def a_resumed_run_equals_an_unbroken_one_exactly(run: Run) -> None:
    directory = shared_directory() / f"resume-{run.layout.tensor_model_parallel_size}{run.layout.pipeline_model_parallel_size}"
    unbroken = trainer(run, directory, save_every=2)
    expected = losses(unbroken.train(four_samples))
    run = relayout(**{name: getattr(run.layout, name) for name in (*TENSOR, *PIPELINE)})
    resumed = trainer(run, directory)
    assert resumed.load(directory / "step_00000002") == 2
    assert losses(resumed.train(four_samples)) == expected[2:]
    for ours, theirs in zip(resumed.models[0].parameters(), unbroken.models[0].parameters()):
        assert torch.equal(ours, theirs)
