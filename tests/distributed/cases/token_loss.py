"""The language loss where labels count equals the loss everywhere, however labels are dealt out to ranks.

Sequences are 16 long: with four parts a rank holds 4 positions, or 2 and 2. Both losses are of the same layout and the
same weights; that the loss everywhere equals one rank's is `layouts.py`'s to show.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo import MimoModel
from megatron_mimo.draws import restart_draws
from megatron_mimo.launch import Run
from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny
from tests.distributed.cases.checkpoints import EXPERTS
from tests.distributed.cases.training import model_config
from tests.distributed.harness import case
from tests.distributed.setting import Setting

SHAPE = (3, 16)


def masks() -> dict[str, torch.Tensor]:
    """Loss masks `[B, S]` by what is special about them."""
    drawn = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3))
    edges, last = torch.zeros(SHAPE), torch.zeros(SHAPE)
    edges[:, [0, 3, 4, 7, 8, 11, 12, 15]] = 1.0
    last[:, 12:] = 1.0
    return {
        "weights": drawn.where(drawn > 0.5, 0),
        "none": torch.zeros(SHAPE),
        "all": torch.ones(SHAPE),
        "edges of shards": edges,
        "one shard": last,
        "one label": torch.zeros(SHAPE).index_put((torch.tensor(1), torch.tensor(15)), torch.tensor(1.0)),
    }


def compare(run: Run, setting: Setting) -> None:
    config = setting.mimo_config(run)
    here, everywhere = MimoModel(config), MimoModel(replace(config, loss_where_counted=False))
    everywhere.load_state_dict(here.state_dict())
    rows: list[int] = []
    if here.post_process:
        here.language_model.output_layer.register_forward_hook(
            lambda layer, given, output: rows.append(output[0].shape[0] * output[0].shape[1])
        )
    for name, mask in masks().items():
        found = []
        for model in (here, everywhere):
            model.zero_grad()
            restart_draws(0, 0, 0)
            outputs, local = model(**{**tiny.batch(), "loss_mask": mask})
            (outputs.language * local).sum().backward()
            found.append((outputs.language.detach() * (local != 0), dict(model.named_parameters())))
            if model is here:
                # Rows that count on this context-parallel rank, and no others, however the group deals them out.
                assert max(rows) == max(1, int(local.count_nonzero())), name
                rows.clear()
        (mine, gradients), (theirs, expected) = found
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        for parameter, value in gradients.items():
            grad, other = value.grad, expected[parameter].grad
            assert (grad is None) == (other is None), f"{name}: {parameter}"
            if grad is not None:
                difference = (grad - other).abs().max() / other.abs().max().clamp(min=1e-3)
                assert difference < 1e-5, f"{name}: {parameter} differs by {difference:.1e}"
    dist.barrier()


@case(ranks=2, tensor_model_parallel_size=2)
def loss_where_labels_count_is_the_loss_everywhere_over_vocabulary_shards(run: Run) -> None:
    compare(run, Setting())
    compare(run, Setting(tied=True))


@case(ranks=2, tensor_model_parallel_size=2)
def loss_where_labels_count_is_the_loss_everywhere_with_sequence_parallelism(run: Run) -> None:
    compare(run, Setting(sequence_parallel=True))
    compare(run, Setting(sequence_parallel=True, tied=True))
    compare(run, Setting(sequence_parallel=True, pattern="*-*-"))


@case(ranks=2, context_parallel_size=2)
def loss_where_labels_count_is_the_loss_everywhere_on_parts_of_the_sequence(run: Run) -> None:
    compare(run, Setting(token_local=True))


@case(ranks=4, tensor_model_parallel_size=2, context_parallel_size=2)
def loss_where_labels_count_is_the_loss_everywhere_on_four_parts_of_the_sequence(run: Run) -> None:
    compare(run, Setting(token_local=True, sequence_parallel=True))


@case(ranks=2, pipeline_model_parallel_size=2)
def loss_where_labels_count_is_the_loss_everywhere_after_other_stages(run: Run) -> None:
    compare_steps(run)


@case(ranks=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
def loss_where_labels_count_is_the_loss_everywhere_on_interleaved_stages(run: Run) -> None:
    compare_steps(run)


@case(ranks=2, expert_model_parallel_size=2)
def loss_where_labels_count_is_the_loss_everywhere_with_experts_shared_out(run: Run) -> None:
    compare_steps(run, **EXPERTS)


def compare_steps(run: Run, **changes) -> None:
    """Losses and gradients of a step by Megatron's schedule, whose two microbatches have the same mask."""
    here, everywhere = (
        Trainer(
            replace(model_config(run, **changes), loss_where_counted=counted),
            run,
            TrainerSettings(steps=len(masks()), decay="constant", progress=False),
            optimizer=OptimizerConfig(lr=1e-12),  # each mask meets the same weights
        )
        for counted in (True, False)
    )
    for ours, theirs in zip(here.models, everywhere.models, strict=True):
        ours.load_state_dict(theirs.state_dict())
    for name, mask in masks().items():
        batches = [tiny.batch() | {"loss_mask": mask} for _ in range(2)]
        found, expected = (trainer.train_step(lambda *_: batches) for trainer in (here, everywhere))
        assert found.losses == pytest.approx(expected.losses, rel=1e-5), name
        for chunk, other in zip(here.chunks, everywhere.chunks, strict=True):
            for (parameter, value), theirs in zip(chunk.named_parameters(), other.parameters(), strict=True):
                largest = theirs.main_grad.abs().max().clamp(min=1e-3)
                assert (value.main_grad - theirs.main_grad).abs().max() / largest < 1e-5, f"{name}: {parameter}"
