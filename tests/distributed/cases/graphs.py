"""A step as one CUDA graph on several ranks. Captures are recordings here, in which nothing moves between ranks;
`tests/gpu/whole_step_ranks.py` holds the same on GPUs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mimo import specs
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.launch import Run
from megatron_mimo.training import StepGraphs, Trainer, TrainerSettings
from tests import tiny
from tests.distributed.cases.steps import mtp_config
from tests.distributed.cases.training import INTERLEAVED, PIPELINE, TENSOR, model_config
from tests.distributed.harness import case
from tests.recorded_graphs import record_graphs

LENGTH, STEPS = 16, 20
CONTEXT = {"context_parallel_size": 2}
EXPERTS = dict(
    num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall", add_bias_linear=False,
    moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.05, moe_expert_capacity_factor=1.5,
    moe_pad_expert_input_to_capacity=True,
)  # fmt: skip


def microbatches(step: int, rank: int, size: int, length: int = LENGTH) -> list[dict]:
    """Two of two samples: the first reads and writes, the second is text; tokens wander, labels too.

    Tokens stay in their quarter of the sequence, as many of each half of the vocabulary, and as many labels count on
    each context-parallel rank: the CPU moves rows and picks labels by how many a rank has. A GPU takes any.
    """
    draw = torch.Generator().manual_seed(1000 * rank + step)
    found = []
    for read, write in ((2, 2), (0, 0)):
        ids = torch.randint(0, 28, (2, length), generator=draw) + torch.tensor([0, 32]).repeat(length // 2)
        quarter = length // 4
        at = quarter + step % 3
        ids[step % 2, at : at + read] = tiny.READ
        at = 2 * quarter + step % 2
        ids[(step + rank) % 2, at : at + write] = tiny.WRITE
        mask = torch.zeros(2, length)
        outer = torch.cat([torch.arange(quarter), torch.arange(length - quarter, length)])
        inner = torch.arange(quarter, length - quarter)
        for sample in range(2):
            for half in (outer, inner):
                mask[sample, half[torch.randperm(len(half), generator=draw)[:3]]] = 1.0
        batch = dict(input_ids=ids, labels=ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1), loss_mask=mask)
        if read:
            patches = torch.randn(1, read, tiny.PIXELS, generator=draw)
            batch["modality_inputs"] = {"images": {"patches": {"x": patches}}}
        if write:
            pixels = torch.randn(write, tiny.PIXELS, generator=draw)
            batch["modality_targets"] = {"images": {"pixels": {"pixels": pixels}}}
        found.append(batch)
    return found


def torch_layers(config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None) -> ModuleSpec:
    """Layers that a graph takes at any length, on GPUs too."""
    return specs.language_layer_spec(config, "torch", vp_stage, pp_rank)


def config_of(run: Run, further_tokens: bool = False, **changes) -> MimoModelConfig:
    """The tiny model as a graph takes it on any layout; with `further_tokens` it predicts the token after the next."""
    token_local = run.layout.context_parallel_size > 1
    changes = dict(batch_p2p_sync=False, masked_softmax_fusion=False) | changes
    if further_tokens:
        return mtp_config(run, True, token_local, None if token_local else torch_layers, **changes)
    config = model_config(run, token_local, **changes)
    if not token_local:
        config.language_model.params["transformer_layer_spec"] = torch_layers
    return config


def trainer(
    run: Run, graphs: StepGraphs | None, overlap: bool = False, distributed: bool = False, **changes
) -> Trainer:
    return Trainer(
        config_of(run, **changes),
        run,
        TrainerSettings(steps=STEPS, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=1.0, use_distributed_optimizer=distributed),
        ddp=DistributedDataParallelConfig(
            overlap_grad_reduce=overlap, use_distributed_optimizer=distributed, bucket_size=2000 if overlap else None
        ),
        graphs=graphs,
    )


def pair(run: Run, warmup: int = 1, **changes) -> tuple[Trainer, Trainer]:
    """A trainer without graphs and one with, of equal weights."""
    eager, graphed = trainer(run, None, **changes), trainer(run, StepGraphs(warmup=warmup), **changes)
    for ours, theirs in zip(graphed.models, eager.models, strict=True):
        ours.load_state_dict(theirs.state_dict())
    return eager, graphed


def assert_replayed(run: Run, steps: int = STEPS, warmup: int = 1, **changes) -> None:
    """Each step's losses and norm, and weights afterwards, are those of eager steps bit by bit."""
    eager, graphed = pair(run, warmup, **changes)
    for step in range(steps):
        expected, found = (each.train_step(microbatches) for each in (eager, graphed))
        assert dict(found.losses) == dict(expected.losses), step
        assert found.gradient_norm == expected.gradient_norm, step
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, steps - warmup, warmup)
    for ours, theirs in zip(graphed.models, eager.models, strict=True):
        for name, weight in theirs.named_parameters():
            assert ours.get_parameter(name).equal(weight), name


def recording(run: Run, check: Callable[[Run], None]) -> None:
    """Runs a check where captures are recordings."""
    with pytest.MonkeyPatch.context() as patch:
        record_graphs(patch)
        check(replace(run, graph_safe_rng=True))


@case(ranks=2)
@case(ranks=2, **TENSOR)
@case(ranks=2, **CONTEXT)
@case(ranks=2, **PIPELINE)
@case(ranks=2, **INTERLEAVED)
@case(ranks=4, **TENSOR, **CONTEXT)
@case(ranks=4, **TENSOR, **PIPELINE)
def twenty_replayed_steps_of_changing_batches_equal_eager_ones_bit_by_bit(run: Run) -> None:
    recording(run, assert_replayed)


@case(ranks=2, **CONTEXT)
@case(ranks=2, **PIPELINE)
def without_loss_per_token_too(run: Run) -> None:
    recording(run, lambda run: assert_replayed(run, 6, calculate_per_token_loss=False))


@case(ranks=2, **TENSOR)
@case(ranks=2, **CONTEXT)
def multi_token_prediction_too(run: Run) -> None:
    recording(run, lambda run: assert_replayed(run, 6, further_tokens=True))


@case(ranks=2)
@case(ranks=2, **PIPELINE)
@case(ranks=2, **INTERLEAVED)
def reductions_beside_the_backward_pass_and_shared_optimizer_states_too(run: Run) -> None:
    for options in ({"overlap": True}, {"distributed": True}, {"overlap": True, "distributed": True}):
        recording(run, lambda run: assert_replayed(run, 6, **options))


@case(ranks=2)
@case(ranks=2, expert_model_parallel_size=2)
@case(ranks=2, **PIPELINE)
def experts_of_fixed_capacity_are_replayed_and_report_their_losses(run: Run) -> None:
    recording(run, lambda run: assert_replayed(run, 8, **EXPERTS))


@case(ranks=2, **TENSOR)
@case(ranks=2, **CONTEXT)
def what_a_replay_reads_outlives_longer_batches_and_any_number_of_lengths(run: Run) -> None:
    """Sequence-parallel layers gather in a buffer that a longer batch replaces, and shards lie in a cache of 64."""

    def check(run: Run) -> None:
        eager, graphed = pair(run)
        for length in [16, 16, 48, 48, 16, *range(52, 52 + 4 * 66, 4), 16]:
            data = lambda at, rank, size: microbatches(at, rank, size, length)  # noqa: E731
            if length in (16, 48):
                expected, found = (each.train_step(data) for each in (eager, graphed))
                assert dict(found.losses) == dict(expected.losses), length
            else:
                graphed.evaluate(data)
        counts = graphed.graphs.counts
        assert (counts.captured, counts.replayed, counts.eager) == (2, 4, 2)

    recording(run, check)


@case(ranks=2)
def a_step_that_one_rank_cannot_replay_runs_without_a_graph_on_all(run: Run) -> None:
    def check(run: Run) -> None:
        eager, graphed = pair(run)
        lengths = [16, 16, 32, 16, 32, 32]  # of the second rank; the first has 16 alone
        for step, length in enumerate(lengths):
            data = lambda at, rank, size: microbatches(at, rank, size, length if rank else LENGTH)  # noqa: E731
            expected, found = (each.train_step(data) for each in (eager, graphed))
            assert dict(found.losses) == dict(expected.losses), step
        counts = graphed.graphs.counts
        told: list = [None, None]
        dist.all_gather_object(told, (counts.replayed, counts.eager))
        assert told == [(4, 2), (4, 2)]
        assert counts.captured == (2 if run.rank else 1)

    recording(run, check)


@case(ranks=2)
@case(ranks=2, **TENSOR)
@case(ranks=2, **PIPELINE)
def rows_that_a_replay_would_make_and_tokens_do_not_fit_are_refused_on_every_rank(run: Run) -> None:
    def check(run: Run) -> None:
        ours = trainer(run, StepGraphs(warmup=1))
        for _ in range(2):
            ours.train_step(microbatches)

        def spoiled(step: int, rank: int, size: int) -> list[dict]:
            batches = microbatches(step, rank, size)
            if rank == size - 1:  # tokens that are text in place of the image's
                batches[0]["input_ids"][batches[0]["input_ids"] == tiny.READ] = 7
            return batches

        with pytest.raises(ValueError, match="images: sample .* has 0 special tokens but 2 embeddings"):
            ours.train_step(spoiled)

    recording(run, check)


class Normed(nn.Module):
    """Takes statistics over all images of a batch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(tiny.PIXELS, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(x)
        return self.norm(rows.flatten(0, 1)).view_as(rows)


@case(ranks=2, **PIPELINE)
def a_bucket_that_one_stage_cannot_have_is_refused_on_every_rank(run: Run) -> None:
    def check(run: Run) -> None:
        images = tiny.image_spec(encoders={"patches": ModuleSpec(module=Normed)})
        config = replace(config_of(run), modality_submodules={"images": images, "audio": tiny.audio_spec()})
        with pytest.raises(ValueError, match="buckets has 'images', whose encoders.patches.norm"):
            Trainer(config, run, TrainerSettings(steps=1, progress=False), graphs=StepGraphs({"images": 4}))

    recording(run, check)


@case(ranks=2, **PIPELINE)
def messages_for_which_the_host_waits_are_refused_by_name(run: Run) -> None:
    def check(run: Run) -> None:
        for changes, match in (
            ({"batch_p2p_sync": True}, "batch_p2p_sync=False, since the host waits"),
            (
                {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"},
                "variable_seq_lengths=False, whose stages",
            ),
        ):
            config = model_config(run, **{"batch_p2p_sync": False, **changes})
            with pytest.raises(ValueError, match=match):
                Trainer(config, run, TrainerSettings(steps=1, progress=False), graphs=StepGraphs())

    recording(run, check)
