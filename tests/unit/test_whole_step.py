"""A training step as one CUDA graph: what it computes, what it serves, what it refuses. Captures are recordings here;
`tests/gpu/test_whole_step_gpu.py` holds the same on a GPU."""

import gc
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import get_cuda_rng_tracker

import megatron_mimo
from megatron_mimo import MimoModel, cudnn, specs
from megatron_mimo.segments import segmented
from megatron_mimo.training import StepGraphs, Trainer, TrainerSettings, TrainingControl, chunks
from megatron_mimo.training.checkpoints import random_state
from megatron_mimo.training.parts import whole_step
from megatron_mimo.training.parts.chunk_step import signature
from megatron_mimo.training.speed.counts import items
from tests import tiny
from tests.recorded_graphs import RecordedGraph, record_graphs
from tests.unit.test_cudnn import two_cudnn

IMAGES = dict(modality_submodules={"images": tiny.image_spec(decoders={}, output_projections=[])})
ROWS = 4  # of an image
RECOMPUTED = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def config_of(language=None, **changes):
    """A model that reads images."""
    parts = {**IMAGES, "special_token_ids": {"images": tiny.READ}, "generation_token_ids": {}, **changes}
    return tiny.mimo_config(language, **parts, modality_loss_weights={})


def batch_of(seed: int, images: int = 2, length: int = 24) -> dict:
    """Two samples with some images, all of them in the first where there is one alone; ten labels count."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (2, length), generator=draw)
    for image in range(images):
        at = 1 + (ROWS + 1) * (image // 2) + seed % 3
        ids[image % 2, at : at + ROWS] = tiny.READ
    labels = ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1)
    mask = torch.zeros(2 * length)
    mask[torch.randperm(2 * length, generator=draw)[:10]] = 1
    pixels = torch.randn(images, ROWS, tiny.PIXELS, generator=draw)
    inputs = {"images": {"patches": {"x": pixels}}} if images else {}
    return dict(input_ids=ids, labels=labels, loss_mask=mask.view(2, length), modality_inputs=inputs)


def trainer_of(run, graphs: StepGraphs | None = None, config=None, steps: int = 20, **options) -> Trainer:
    return Trainer(
        config or config_of(),
        run,
        TrainerSettings(steps=steps, decay="constant", progress=False),
        optimizer=OptimizerConfig(lr=1e-2),
        graphs=graphs,
        **options,
    )


def pair(run, graphs: StepGraphs, **options) -> tuple[Trainer, Trainer]:
    """A trainer without graphs and one with, of equal weights."""
    eager, graphed = trainer_of(run, **options), trainer_of(run, graphs, **options)
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    return eager, graphed


def assert_same_steps(eager: Trainer, graphed: Trainer, data, steps: int) -> None:
    for step in range(steps):
        expected, found = (each.train_step(lambda *_: data(step)) for each in (eager, graphed))
        assert found.losses == expected.losses and found.gradient_norm == expected.gradient_norm, step
    for name, weight in eager.models[0].named_parameters():
        assert graphed.models[0].get_parameter(name).equal(weight), name


@pytest.fixture
def recorded(single_process, monkeypatch):
    """A run whose random numbers a graph could use, and captures that are recordings."""
    record_graphs(monkeypatch)
    return replace(single_process, graph_safe_rng=True)


@pytest.mark.parametrize("per_token", [True, False])
def test_twenty_replayed_steps_of_changing_batches_equal_eager_ones_bit_by_bit(recorded, per_token):
    language = lambda: tiny.language_spec(tiny.language_config(calculate_per_token_loss=per_token))  # noqa: E731
    eager, graphed = (
        trainer_of(recorded, config=config_of(language())),
        trainer_of(recorded, StepGraphs(warmup=1), config=config_of(language())),
    )
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    assert_same_steps(eager, graphed, lambda step: [batch_of(2 * step), batch_of(2 * step + 1)], 20)
    assert (graphed.graphs.counts.captured, graphed.graphs.counts.replayed, graphed.graphs.counts.eager) == (1, 19, 1)


def test_a_step_that_no_graph_fits_runs_eagerly_and_is_counted(recorded):
    eager, graphed = pair(recorded, StepGraphs(warmup=1, captures=1))
    shapes = [24, 24, 24, 32, 32, 24, 16]
    assert_same_steps(eager, graphed, lambda step: [batch_of(step, length=shapes[step])], len(shapes))
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 3, 4)
    assert len(graphed.graphs._brought) == 1  # nothing is kept of shapes that got no graph


def test_a_step_that_raises_is_no_warm_up(recorded, monkeypatch):
    trainer = trainer_of(recorded, StepGraphs(warmup=1))
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.models[0].language_model), "forward", Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            trainer.train_step(lambda *_: [batch_of(0)])
    for step in range(3):
        trainer.train_step(lambda *_: [batch_of(step)])
    counts = trainer.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 2, 2)


def test_how_many_labels_count_is_part_of_the_shape(recorded):
    eager, graphed = pair(recorded, StepGraphs(warmup=1))

    def learning(step: int, labels: int) -> list[dict]:
        batch = batch_of(step)
        batch["loss_mask"].view(-1)[batch["loss_mask"].view(-1).nonzero()[labels:]] = 0.0
        return [batch]

    labels = [10, 10, 8, 8, 10]
    assert_same_steps(eager, graphed, lambda step: learning(step, labels[step]), len(labels))
    assert (graphed.graphs.counts.captured, graphed.graphs.counts.replayed) == (2, 3)


def test_an_object_that_may_hold_anything_is_never_taken_for_another():
    """Two that do not live at one time may have one address."""
    assert len({signature({"told": [object()]}) for _ in range(20)}) == 20
    assert len({signature({"told": [value]}) for value in (1, 1.0, True)}) == 3
    assert len({signature({"told": [24, "x", None]}) for _ in range(20)}) == 1


@pytest.mark.parametrize(("numbers", "replayed"), [([3, 3, 3], 2), ([2, 4, 1], 0)])
def test_media_are_padded_to_a_bucket_by_items_that_no_position_reads(recorded, numbers, replayed):
    # On the CPU rows are moved by how many there are: only one number replays. A GPU takes any.
    eager, graphed = pair(recorded, StepGraphs({"images": 4}, warmup=1 if replayed else 9))
    seen: list[int] = []
    encoder = graphed.models[0].modality_submodules["images"].encoders["patches"]
    encoder.register_forward_pre_hook(lambda module, given, keywords: seen.append(len(keywords["x"])), with_kwargs=True)
    for step, images in enumerate(numbers):
        expected, found = (each.train_step(lambda *_: [batch_of(step, images)]) for each in (eager, graphed))
        torch.testing.assert_close(dict(found.losses), dict(expected.losses), rtol=1e-6, atol=1e-6)
        # What a step is said to compute leaves the padding out.
        assert graphed._counts[items("images", "patches")] == images == eager._counts[items("images", "patches")]
    assert set(seen) == {4} and graphed.graphs.counts.replayed == replayed
    assert graphed.graphs.counts.eager == len(numbers) - replayed
    for name, weight in eager.models[0].named_parameters():
        torch.testing.assert_close(graphed.models[0].get_parameter(name), weight, rtol=1e-5, atol=1e-6)


def test_a_replay_counts_the_rows_of_its_own_batch(recorded):
    trainer = trainer_of(recorded, StepGraphs(warmup=1))
    for step in range(3):
        trainer.train_step(lambda *_: [batch_of(step)])
    assert trainer.graphs.counts.replayed == 2
    bad = batch_of(3)
    bad["input_ids"][0, bad["input_ids"][0] == tiny.READ] = 7
    with pytest.raises(ValueError, match="images: sample 1 has 4 special tokens but 8 embeddings"):
        trainer.train_step(lambda *_: [bad])


def test_evaluation_generation_and_a_second_model_run_beside_a_graphed_one(recorded):
    graphs = StepGraphs(warmup=1)
    alone, graphed = pair(recorded, graphs)
    other = trainer_of(recorded, graphs, config=config_of(tiny.language_spec(tiny.language_config(num_layers=1))))
    for step in range(4):
        expected = alone.train_step(lambda *_: [batch_of(step)])
        other.train_step(lambda *_: [batch_of(step, length=32)])
        found = graphed.train_step(lambda *_: [batch_of(step)])
        assert found.losses == expected.losses
        held = [trainer.evaluate(lambda *_: [batch_of(50, 1, length=16)]) for trainer in (alone, graphed)]
        assert held[0] == held[1]
        said = [
            trainer.generate([{"input_ids": torch.tensor([1, 2])}], max_new_tokens=3) for trainer in (alone, graphed)
        ]
        assert said[0][0].ids == said[1][0].ids
    assert graphed.graphs.counts.replayed == other.graphs.counts.replayed == 3


def test_what_a_replay_reads_outlives_any_number_of_other_lengths(recorded):
    """Megatron's rotary tables lie in a cache of 32, which models of a process share."""
    eager, graphed = pair(recorded, StepGraphs(warmup=1))
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 2)
    for length in range(25, 95):
        for trainer in (eager, graphed):
            trainer.evaluate(lambda *_: [batch_of(50, 0, length)])
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 4)
    assert graphed.graphs.counts.replayed == 5


def _move(trainer: Trainer) -> None:
    for weight in trainer.models[0].parameters():
        weight.data = weight.data.clone()


def _freeze(trainer: Trainer) -> None:
    trainer.models[0].modality_submodules["images"].requires_grad_(False)


def _weigh(trainer: Trainer) -> None:
    trainer.models[0].mimo_config.modality_loss_weights["text"] = 3.0


@pytest.mark.parametrize("change", [_move, _freeze, _weigh])
def test_a_step_whose_weights_moved_froze_or_weigh_otherwise_is_captured_again(recorded, change):
    eager, graphed = pair(recorded, StepGraphs(warmup=1))
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 3)
    for trainer in (eager, graphed):
        change(trainer)
    gc.collect()
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 3)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (2, 4, 2)


def test_megatrons_own_switch_captures_the_step(recorded):
    config = config_of(tiny.language_spec(tiny.language_config(cuda_graph_impl="full_iteration")))
    trainer = trainer_of(recorded, config=config)
    for step in range(4):
        trainer.train_step(lambda *_: [batch_of(step)])
    assert trainer.graphs.counts.replayed == 2 and trainer_of(recorded).graphs is None


@pytest.mark.parametrize("kind", ["local", "transformer_engine"])
def test_graphs_of_single_layers_are_refused_by_name(single_process, kind):
    language = tiny.language_config()
    language.cuda_graph_impl = kind
    with pytest.raises(ValueError, match=f"cuda_graph_impl='{kind}' .*Set it to 'full_iteration'"):
        MimoModel(config_of(tiny.language_spec(language)))


def test_what_a_step_as_one_graph_cannot_be_right_with_is_refused_by_name(recorded):
    def refused(match: str, config=None, graphs: StepGraphs | None = None, run=recorded, **options) -> None:
        with pytest.raises(ValueError, match=match):
            trainer_of(run, graphs or StepGraphs(), config or config_of(), **options)

    refused("initialize\\(graph_safe_rng=True\\)", run=replace(recorded, graph_safe_rng=False))
    refused("buckets has 'films', expected modalities that are read: \\['images'\\]", graphs=StepGraphs({"films": 2}))
    refused("check_for_nan_in_grad=False", ddp=DistributedDataParallelConfig(check_for_nan_in_grad=True))
    experts = dict(num_moe_experts=4, moe_router_topk=2, add_bias_linear=False)
    for kind, match in (("alltoall", "moe_expert_capacity_factor and"), ("allgather", "dispatcher_type='alltoall'")):
        language = tiny.language_config(**experts, moe_token_dispatcher_type=kind)
        refused(match, config_of(tiny.language_spec(language)))
    gathered = DistributedDataParallelConfig(
        overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True
    )
    refused("overlap_param_gather=False", ddp=gathered)
    fused = dict(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    refused(
        "cuda_graph_impl='full_iteration' beside cross_entropy_fusion_impl='te'",
        config_of(tiny.language_spec(tiny.language_config(**fused))),
    )
    refused("graphed=\\(\\)", control=TrainingControl(graphed=["encoders"]))
    weighed = tiny.language_config()
    weighed.mtp_grad_scale_func = lambda: 1.0
    refused("mtp_grad_scale_func=None", config_of(tiny.language_spec(weighed)))
    recomputed = tiny.language_config(**RECOMPUTED)
    recomputed.fp8 = "hybrid"
    refused("recompute_granularity=None beside fp8", config_of(tiny.language_spec(recomputed)))


def predicting(**changes):
    """A model that predicts the token after the next too."""
    language = tiny.language_config(mtp_num_layers=1, **changes)
    layer = specs.language_layer_spec(language).submodules.layer_specs[-1]
    block = get_gpt_mtp_block_spec(language, layer, use_transformer_engine=False)
    norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), specs.norm("torch"))
    each = [replace(one, submodules=replace(one.submodules, **norms)) for one in block.layer_specs]
    return config_of(tiny.language_spec(language, mtp_block_spec=replace(block, layer_specs=each)))


@pytest.mark.parametrize("per_token", [True, False])
def test_multi_token_prediction_weighs_in_each_replay_as_in_its_own_step(recorded, per_token):
    options = dict(calculate_per_token_loss=per_token)
    eager, graphed = (trainer_of(recorded, g, config=predicting(**options)) for g in (None, StepGraphs(warmup=1)))
    graphed.models[0].load_state_dict(eager.models[0].state_dict())

    def weighed(step: int) -> list[dict]:
        """As many labels in each step, whose weights are others."""
        batch = batch_of(step)
        batch["loss_mask"] *= 1 + step
        return [batch, batch_of(step + 1)]

    assert_same_steps(eager, graphed, weighed, 8)
    assert graphed.graphs.counts.replayed == 7


def test_packed_tokens_that_the_host_cuts_for_multi_token_prediction_run_without_a_graph(recorded):
    trainer = trainer_of(recorded, StepGraphs(warmup=1), config=predicting())
    params = segmented(torch.tensor([0, 8, 24], dtype=torch.int32))
    batch = {name: value[:1] for name, value in batch_of(0, images=0).items() if name != "modality_inputs"}
    for _ in range(3):  # of one shape
        trainer.train_step(lambda *_: [{**batch, "packed_seq_params": params}])
    assert (trainer.graphs.counts.captured, trainer.graphs.counts.eager) == (0, 3)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_that_moves_under_replayed_collectives_is_refused(monkeypatch, name):
    monkeypatch.delenv("NCCL_GRAPH_REGISTER", raising=False)
    assert not whole_step._moves_registered_memory()
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    assert whole_step._moves_registered_memory()
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    assert not whole_step._moves_registered_memory()


def test_recomputed_steps_are_replayed_bit_by_bit(recorded):
    config = lambda: config_of(tiny.language_spec(tiny.language_config(**RECOMPUTED)))  # noqa: E731
    eager, graphed = trainer_of(recorded, config=config()), trainer_of(recorded, StepGraphs(warmup=1), config=config())
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    assert_same_steps(eager, graphed, lambda step: [batch_of(2 * step), batch_of(2 * step + 1)], 6)
    assert graphed.graphs.counts.replayed == 5


def test_dropout_in_recomputed_activations_is_refused_where_random_numbers_are_a_graphs(recorded, monkeypatch):
    def built(**changes) -> Trainer:
        language = tiny.language_config(**{**RECOMPUTED, "hidden_dropout": 0.1, **changes})
        return trainer_of(recorded, config=config_of(tiny.language_spec(language)))

    built()
    monkeypatch.setattr(chunks, "is_graph_safe_cuda_rng_tracker", lambda tracker: True)
    built(hidden_dropout=0.0)
    with pytest.raises(ValueError, match="recomputed activations would draw other numbers"):
        built()


def test_without_a_gpu_graphs_are_refused(single_process):
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        trainer_of(single_process, StepGraphs())


def test_labels_of_any_number_are_rounded_up_to_one_shape_and_give_the_loss_that_they_give(recorded):
    eager, graphed = pair(recorded, StepGraphs(label_rows=16, warmup=1))
    for step, labels in enumerate([10, 8, 3, 9, 0, 10]):
        batch = batch_of(step)
        batch["loss_mask"].view(-1)[batch["loss_mask"].view(-1).nonzero()[labels:]] = 0.0
        batches = [batch, batch_of(step + 1)]  # a step learns something
        expected, found = (each.train_step(lambda *_: batches) for each in (eager, graphed))
        torch.testing.assert_close(dict(found.losses), dict(expected.losses), rtol=1e-6, atol=1e-6)
        assert graphed._counts == eager._counts
    # A microbatch in which no label counts holds nothing against the losses of its term: a shape of its own.
    assert (graphed.graphs.counts.captured, graphed.graphs.counts.replayed, graphed.graphs.counts.eager) == (1, 4, 2)
    for name, weight in eager.models[0].named_parameters():  # Adam makes steps of rounding where a gradient is small
        torch.testing.assert_close(graphed.models[0].get_parameter(name), weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("given", [dict(captures=0), dict(label_rows=0), dict(warmup=0), dict(buckets={"images": 0})])
def test_numbers_below_one_are_refused(given):
    with pytest.raises(ValueError, match="at least 1"):
        StepGraphs(**given)


def test_media_that_are_not_items_alike_are_refused(recorded):
    trainer = trainer_of(recorded, StepGraphs({"images": 4}))
    batch = batch_of(0)
    batch["input_ids"][0, -1] = tiny.READ
    with pytest.raises(ValueError, match="9 special tokens for 2 items, expected as many for each"):
        trainer.train_step(lambda *_: [batch])
    batch = batch_of(0)
    batch["modality_inputs"]["images"]["patches"]["mask"] = torch.ones(3)
    with pytest.raises(ValueError, match="expected one encoder, whose tensors have one leading dim"):
        trainer.train_step(lambda *_: [batch])


def test_a_batch_checked_on_the_host_is_looked_at_no_more(single_process):
    model, batch = MimoModel(config_of()), batch_of(0)
    placement = model.place(batch["input_ids"]).bound().counting(batch["loss_mask"])
    settled = model.settle({**batch, "placement": placement})
    assert settled.settled and not placement.settled
    looked: list[object] = []
    model.checks.check = lambda *given: looked.append(given)
    model(**batch, placement=settled)
    assert not looked
    model(**batch, placement=placement)
    assert looked, "one that nobody checked is looked at again"


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("labels", lambda x: x + tiny.VOCABULARY, "labels outside the vocabulary"),
        ("loss_mask", lambda x: -x, "negative, infinite or NaN"),
        ("position_ids", lambda x: torch.zeros_like(x), "position"),
    ],
)
def test_a_bad_batch_is_refused_on_the_host(single_process, name, change, match):
    model, batch = MimoModel(config_of()), batch_of(0)
    batch["position_ids"] = torch.arange(24).expand(2, -1)
    batch[name] = change(batch[name])
    with pytest.raises(ValueError, match=match):
        model.settle({**batch, "placement": model.place(batch["input_ids"]).bound()})
    assert not model.checks.settled


def test_a_stage_in_the_middle_checks_on_the_host_what_it_has_and_looks_no_more_within_a_capture(single_process):
    model, batch = MimoModel(config_of(), pre_process=False, post_process=False), batch_of(0)
    assert model.settle(batch) is None
    with pytest.raises(ValueError, match="position_ids differ"):
        model.settle({**batch, "position_ids": torch.zeros(2, 24, dtype=torch.long)})
    for settled in (False, True):
        with model.checks.recording(settled=settled) as brought:
            model.checks.begin()
            assert model.checks.settled is settled and brought == [[]]
    model.checks.begin()
    assert not model.checks.settled


def test_graphs_end_before_the_groups_whose_collectives_they_hold(recorded, no_run, monkeypatch):
    """NCCL waits for ever for a graph that has one of its collectives; a trainer may be alive when a run ends."""
    graphs: list[RecordedGraph] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(RecordedGraph()) or graphs[-1])
    run = replace(megatron_mimo.initialize(seed=1, backend="gloo"), graph_safe_rng=True)
    trainer = trainer_of(run, StepGraphs(warmup=1))
    for _ in range(2):
        trainer.train_step(lambda *_: [batch_of(0)])
    assert trainer.graphs.counts.captured == 1 and graphs[0].steps
    left, destroy = [], dist.destroy_process_group
    with monkeypatch.context() as patch:
        patch.setattr(
            dist, "destroy_process_group", lambda *groups: left.append(len(graphs[0].steps)) or destroy(*groups)
        )
        megatron_mimo.shutdown()
    assert left and not any(left)


def test_a_process_with_two_cudnn_is_refused(recorded, monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(two_cudnn())
    monkeypatch.setattr(cudnn, "MAPS", maps)
    with pytest.raises(ValueError, match=r"graphs: expected one cuDNN .* LD_LIBRARY_PATH=/opt/lib/site-packages/"):
        trainer_of(recorded, StepGraphs())


def test_random_numbers_of_a_graph_are_kept_in_a_checkpoint_as_states(single_process, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()
    monkeypatch.setattr(random_state, "is_graph_safe_cuda_rng_tracker", lambda tracker: True)
    tracker.set_states({"a graph's": generator})
    try:
        kept = random_state.random_state()
        assert isinstance(kept["tracker"]["a graph's"], torch.Tensor)
        drawn = torch.rand(3, generator=generator)
        random_state.set_random_state(kept)
        assert torch.equal(torch.rand(3, generator=generator), drawn)
    finally:
        tracker.set_states(before)
