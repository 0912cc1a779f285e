"""The training loop on several ranks: batches, losses, checkpoints, signals."""

import os
import signal
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.launch import Run
from megatron_mimo.training import Trainer, TrainerSettings, TrainingControl
from megatron_mimo.training.chunks import build_chunks, parameters_gathered
from megatron_mimo.training.parts.compiled import CompiledForward
from megatron_mimo.training.speed.flops import part_sizes
from tests import tiny
from tests.compiling import compiling, results, vision_transformer
from tests.distributed.harness import case, relayout, shared_directory
from tests.distributed.setting import token_local_stage

LENGTH = 16
PIPELINE = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PIPELINE, "virtual_pipeline_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2}


def model_config(run: Run, token_local: bool = False, **changes):
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
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        **changes,
    )
    own = dict(transformer_layer_spec=token_local_stage, position_embedding_type="none") if token_local else {}
    return tiny.mimo_config(tiny.language_spec(config, **own))


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
            batch["modality_inputs"] = {"images": {"patches": {"x": torch.randn(1, read, tiny.PIXELS, generator=draw)}}}
        if write:
            pixels = torch.randn(write, tiny.PIXELS, generator=draw)
            batch["modality_targets"] = {"images": {"pixels": {"pixels": pixels}}}
        batches.append(batch)
    share = len(batches) // size
    return batches[rank * share : (rank + 1) * share]


def trainer(
    run: Run, directory, steps: int = 4, per_token: bool = True, distributed: bool = False,
    save_every: int | None = None, control: TrainingControl | None = None, **changes,
) -> Trainer:  # fmt: skip
    """A trainer of the tiny model, `changes` made to its configuration."""
    # Adam's epsilon far above rounding: with 1e-8 its first step is the gradient's sign.
    return Trainer(
        model_config(run, calculate_per_token_loss=per_token, **changes),
        run,
        TrainerSettings(steps=steps, decay="constant", progress=False, directory=directory, save_every=save_every),
        optimizer=OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=1.0, use_distributed_optimizer=distributed),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=distributed,
            overlap_param_gather=distributed,
        ),
        control=control,
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
    directory = (
        shared_directory() / f"resume-{run.layout.tensor_model_parallel_size}{run.layout.pipeline_model_parallel_size}"
    )
    unbroken = trainer(run, directory, save_every=2)
    expected = losses(unbroken.train(four_samples))
    run = relayout(**{name: getattr(run.layout, name) for name in (*TENSOR, *PIPELINE)})
    resumed = trainer(run, directory)
    assert resumed.load(directory / "step_00000002") == 2
    assert losses(resumed.train(four_samples)) == expected[2:]
    for ours, theirs in zip(resumed.models[0].parameters(), unbroken.models[0].parameters()):
        assert torch.equal(ours, theirs)


@case(ranks=2)
@case(ranks=2, **PIPELINE)
def sigterm_to_one_rank_saves_at_the_step_boundary_and_the_run_goes_on_from_there(run: Run) -> None:
    directory = shared_directory() / f"sigterm-{run.layout.pipeline_model_parallel_size}"
    expected = losses(trainer(run, None).train(four_samples))

    def with_sigterm(step: int, rank: int, size: int) -> list[dict]:
        if step == 1 and run.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return four_samples(step, rank, size)

    before = signal.getsignal(signal.SIGTERM)
    run = relayout(**{name: getattr(run.layout, name) for name in PIPELINE})
    stopped = trainer(run, directory)
    history = stopped.train(with_sigterm)
    assert history.stopped and stopped.steps_done == 2
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in directory.iterdir()] == ["step_00000002"]
    run = relayout(**{name: getattr(run.layout, name) for name in PIPELINE})
    resumed = trainer(run, directory)
    assert resumed.load() == 2
    assert losses(history) + losses(resumed.train(four_samples)) == expected


@case(ranks=2)
def what_is_compiled_trains_alike_where_its_parameters_are_gathered_late(run: Run) -> None:
    plain = trainer(run, None, distributed=True)
    start = {name: value.clone() for name, value in plain.models[0].state_dict().items() if value is not None}
    expected = losses(plain.train(four_samples))
    for parts in (["encoders"], ["encoders", "language_model"]):
        run = relayout()
        with compiling() as graphs:
            compiled = trainer(run, None, distributed=True, control=TrainingControl(compiled=parts))
            compiled.models[0].load_state_dict(start, strict=False)
            compiled.optimizer.reload_model_params()
            assert_close(losses(compiled.train(four_samples)), expected)
        assert bool(graphs) == (dist.get_rank() == 0 or len(parts) == 2), "the other rank has no image"


@case(ranks=2, **TENSOR)
def compiled_layers_train_alike_where_they_are_split(run: Run) -> None:
    plain = trainer(run, None)
    start = {name: value.clone() for name, value in plain.models[0].state_dict().items() if value is not None}
    expected = losses(plain.train(four_samples))
    run = relayout(**TENSOR)
    with compiling() as graphs:
        compiled = trainer(run, None, control=TrainingControl(compiled=["language_model"]))
        compiled.models[0].load_state_dict(start, strict=False)
        assert_close(losses(compiled.train(four_samples)), expected)
    assert graphs


@case(ranks=2, long=True, **TENSOR)
def a_compiled_encoder_gives_what_it_gives_uncompiled(run: Run) -> None:
    encoder = vision_transformer(tiny.language_config(tensor_model_parallel_size=2))
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = results(encoder, images)
    with compiling() as graphs:
        encoder.forward = CompiledForward(encoder)
        torch.testing.assert_close(results(encoder, images), plain)
    assert graphs


ROWS = (3, 31, 32, tiny.WRITE)  # the table's halves on two tensor-parallel ranks meet between 31 and 32


class Halfway(tiny.PatchEncoder):
    """An encoder whose last layer the loss does not reach, as of LLaVA's, which reads the layer before it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.last = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = super().forward(x)
        self.last(states)
        return states


class Unread(tiny.LinearDecoder):
    """A decoder with a layer that its loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(tiny.HIDDEN, tiny.HIDDEN)


@case(ranks=2, timeout_s=120)
def layers_that_the_loss_does_not_reach_train_with_overlapped_reductions(run: Run) -> None:
    images = tiny.image_spec(encoders={"patches": Halfway}, decoders={"pixels": Unread})
    config = model_config(run).with_submodules({"images": images})
    found, kept, start = [], [], None
    directory = shared_directory() / "unread"
    for overlap, sharded in ((False, False), (True, False), (True, True)):
        trained = Trainer(
            config,
            run,
            TrainerSettings(steps=3, decay="constant", progress=False, directory=directory),
            optimizer=OptimizerConfig(lr=1e-2, adam_eps=1e-3, weight_decay=0.0, use_distributed_optimizer=sharded),
            ddp=DistributedDataParallelConfig(use_distributed_optimizer=sharded, overlap_grad_reduce=overlap),
        )
        if start is None:
            start = trained.save()
        else:
            trained.load(start)
        parts = trained.models[0].modality_submodules["images"]
        unread = [parts.encoders["patches"].last, parts.decoders["pixels"].last]
        before = [p.detach().clone() for module in unread for p in module.parameters()]
        found.append(losses(trained.train(four_samples)))
        kept.append(all(torch.equal(a, p) for a, p in zip(before, (p for m in unread for p in m.parameters()))))
    assert kept == [True, True, True]
    for one in found[1:]:
        assert len(one) == 3
        assert_close(one, found[0])


def naming_all_rows(step: int, rank: int, size: int) -> list[dict]:
    batches = four_samples(step, rank, size)
    for batch in batches:
        batch["input_ids"][0, 12:15] = torch.tensor(ROWS[:3])
    return batches


def rows_that_moved(run: Run, tied: bool, distributed: bool) -> list[int]:
    """Of the embedding, over all tensor-parallel ranks, after three steps of Adam with weight decay."""
    config = model_config(run)
    config.language_model.params["share_embeddings_and_output_weights"] = tied
    ours = Trainer(
        config,
        run,
        TrainerSettings(steps=3, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1, use_distributed_optimizer=distributed),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, overlap_grad_reduce=distributed, overlap_param_gather=distributed
        ),
        control=TrainingControl(frozen=["language_model", "encoders"], embedding_rows=ROWS),
    )
    model = ours.models[0]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours.train(naming_all_rows)
    if distributed:
        with parameters_gathered(ours.chunks, ours.optimizer):
            pass
    moved = {name: (p != before[name]) for name, p in model.named_parameters() if not p.equal(before[name])}
    tables = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
    assert not any(name.startswith("language_model.") and name not in tables for name in moved), sorted(moved)
    assert any(".input_projections." in name or ".decoders." in name for name in moved)
    first = run.tensor_rank * tiny.VOCABULARY // run.layout.tensor_model_parallel_size
    rows = {name: (first + moved[name].any(1).nonzero().flatten()).tolist() for name in tables if name in moved}
    everywhere: list = [None] * run.world_size
    dist.all_gather_object(everywhere, rows)
    if run.layout.pipeline_model_parallel_size > 1 and tied:  # the copy of the last stage moves alike
        assert everywhere[0][tables[0]] == everywhere[1][tables[1]]
    return sorted({row for each in everywhere for of_table in each.values() for row in of_table})


@case(ranks=2, timeout_s=120)
def only_the_named_embedding_rows_move_on_every_layout(run: Run) -> None:
    for layout in (TENSOR, {}, PIPELINE):
        for tied in (False, True):
            for distributed in (False,) if layout else (False, True):
                run = relayout(**layout)
                assert rows_that_moved(run, tied, distributed) == list(ROWS), (layout, tied, distributed)


@case(ranks=2, **TENSOR)
def the_batch_of_a_step_is_read_once_and_sent_in_one_broadcast_a_microbatch(run: Run) -> None:
    sent: list[int] = []
    whole = dist.broadcast

    def counted(tensor, *given, **named):
        sent.append(tensor.numel() * tensor.element_size())
        return whole(tensor, *given, **named)

    reads: list[int] = []

    def read(step: int, rank: int, size: int) -> list[dict]:
        reads.append(step)
        return four_samples(step, rank, size)[: 1 + step]

    ours = trainer(run, None, steps=5)
    ours.train_step(read)  # whatever is sent once
    numbers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", counted)
        for _ in range(3):
            sent.clear()
            ours.train_step(read)
            numbers.append(len(sent))
    # One more for each microbatch more; beside them a step's shapes, counts and layouts.
    assert [b - a for a, b in pairwise(numbers)] == [1, 1]
    assert reads == ([0, 1, 2, 3] if run.tensor_rank == 0 else [])


@case(ranks=2, **TENSOR)
@case(ranks=2, **PIPELINE)
def operations_are_counted_alike_on_every_layout(run: Run) -> None:
    def sizes(run: Run) -> dict:
        config = model_config(run)
        return {name: vars(size) for name, size in part_sizes(build_chunks(config, run, TrainingControl())).items()}

    found = sizes(run)
    expected = sizes(relayout())
    for name, size in expected.items():
        for key in ("weights", "trained", "attention", "positions"):
            assert found[name][key] == pytest.approx(size[key]), (name, key)


def assert_equals(first: Trainer, layouts: tuple, build) -> None:
    """The losses of `first` and of what `build(run)` gives on each layout, from the same weights."""
    start = first.save()
    expected = [*losses(first.train(four_samples)), first.evaluate(four_samples)]
    for layout in layouts:
        other = build(relayout(**layout))
        other.load(start)
        assert_close([*losses(other.train(four_samples)), other.evaluate(four_samples)], expected)


@case(ranks=2, timeout_s=120)
def trainer_trains_experts_and_parts_of_a_sequence_as_one_rank_does(run: Run) -> None:
    experts = dict(
        num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall", moe_aux_loss_coeff=0.0,
        moe_router_load_balancing_type="none", add_bias_linear=False,
    )  # fmt: skip

    def with_experts(run: Run) -> Trainer:
        return trainer(run, shared_directory() / "experts", **experts)

    def token_local(run: Run) -> Trainer:
        return trainer(run, shared_directory() / "token-local", token_local=True)

    assert_equals(with_experts(run), ({"expert_model_parallel_size": 2},), with_experts)
    assert_equals(token_local(relayout()), ({"context_parallel_size": 2},), token_local)


@case(ranks=4, timeout_s=180)
def trainer_trains_on_two_axes_and_on_four_stages_as_on_one(run: Run) -> None:
    def build(run: Run) -> Trainer:
        return trainer(run, shared_directory() / "two-axes", distributed=run.layout.data_parallel_size > 1)

    four_stages = {"pipeline_model_parallel_size": 4}
    assert_equals(build(run), ({**TENSOR, **PIPELINE}, PIPELINE, four_stages), build)


@case(ranks=4, **PIPELINE)
def middle_and_outer_stages_read_what_they_need_alone(run: Run) -> None:
    run = relayout(pipeline_model_parallel_size=4)
    ours = trainer(run, None)
    seen: set[str] = set()
    whole = type(ours.models[0]).forward

    def forward(self, **batch):
        seen.update(batch)
        return whole(self, **batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ours.models[0]), "forward", forward)
        ours.train_step(four_samples)
    more = {
        0: {"placement", "modality_inputs", "modality_targets"},
        3: {"placement", "labels", "loss_mask", "modality_targets"},
    }
    assert seen == {"input_ids"} | more.get(run.pipeline_rank, set())


@case(ranks=2)
def a_layer_that_the_loss_does_not_reach_is_reduced_where_ranks_without_images_reduce_it(run: Run) -> None:
    """A bucket for each layer: ranks that reduced them in another order would not agree on a size, or hang."""
    images = tiny.image_spec(encoders={"patches": Halfway})
    config = tiny.mimo_config(modality_submodules={"images": images, "audio": tiny.audio_spec()})
    trained = Trainer(
        config,
        run,
        TrainerSettings(steps=3, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=1e-2),
        ddp=DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=100),
    )
    text = dict(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long))
    for step in range(3):
        batch = tiny.batch(step) if run.data_rank == 0 or step == 1 else text
        trained.train_step(lambda *_, batch=batch: [batch])
