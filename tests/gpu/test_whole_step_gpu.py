"""A training step as one CUDA graph on a GPU: bit by bit the eager step's, beside other work, without a host sync."""

import functools

import pytest
import torch

import megatron_mimo
from megatron_mimo import MimoModel, specs
from megatron_mimo.training import StepGraphs, Trainer, TrainingControl
from tests import tiny, writing
from tests.distributed.cases.graphs import EXPERTS, torch_layers
from tests.gpu.test_packed_gpu import on_gpu
from tests.unit.test_whole_step import RECOMPUTED, assert_same_steps, batch_of, config_of, trainer_of
from tests.unit.test_whole_step_writing import batch_of as writing_batch_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def run(graph_safe_run):
    return graph_safe_run


def language_of(backend: str, **changes):
    kind = dict(bf16=True, params_dtype=torch.bfloat16) if backend == "transformer_engine" else {}
    config = tiny.language_config(masked_softmax_fusion=False, **kind, **changes)
    layers = functools.partial(specs.language_layer_spec, backend=backend)
    return config_of(tiny.language_spec(config, transformer_layer_spec=lambda config, vp_stage=None: layers(config)))


def pair_of(run, backend: str, graphs: StepGraphs, **changes) -> tuple[Trainer, Trainer]:
    eager = trainer_of(run, config=language_of(backend, **changes))
    graphed = trainer_of(run, graphs, config=language_of(backend, **changes))
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    return eager, graphed


@pytest.mark.parametrize("per_token", [True, False])
def test_twenty_replayed_steps_of_changing_batches_equal_eager_ones_bit_by_bit(run, per_token):
    eager, graphed = pair_of(run, "torch", StepGraphs(), calculate_per_token_loss=per_token)
    batches = lambda step: [batch_of(2 * step), batch_of(2 * step + 1)]  # noqa: E731
    assert_same_steps(eager, graphed, batches, 20)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 18, 2)


def test_compiled_layers_are_replayed_bit_by_bit_and_train_as_before(run):
    """By cuDNN's attention too, whose rows are not a multiple of its tiles."""

    def config():
        language = tiny.language_config(num_layers=3, bf16=True, params_dtype=torch.bfloat16)
        layers = specs.with_fused_attention(specs.language_layer_spec(language, "torch"))
        return config_of(tiny.language_spec(language, transformer_layer_spec=layers))

    compiled = TrainingControl(compiled=["language_model"])
    plain = trainer_of(run, config=config())
    eager, graphed, other = (
        trainer_of(run, graphs, config=config(), control=compiled) for graphs in (None, StepGraphs(), None)
    )
    for each in (eager, graphed, other):
        each.models[0].load_state_dict(plain.models[0].state_dict())
    first, again = (each.train_step(lambda *_: [batch_of(0)]).losses["text"] for each in (plain, other))
    assert again == pytest.approx(first, rel=5e-3)
    assert_same_steps(eager, graphed, lambda step: [batch_of(2 * step), batch_of(2 * step + 1)], 10)
    assert graphed.graphs.counts.replayed == 8


@pytest.mark.parametrize("kind", writing.KINDS)
def test_replayed_steps_of_a_model_that_writes_equal_eager_ones_bit_by_bit(run, kind):
    def config():
        made = writing.config_of(kind, masked_softmax_fusion=False)
        made.language_model.params["transformer_layer_spec"] = torch_layers
        return made

    eager, graphed = trainer_of(run, config=config()), trainer_of(run, StepGraphs(), config=config())
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    batches = lambda step: [writing_batch_of(kind, 2 * step), writing_batch_of(kind, 2 * step + 1)]  # noqa: E731
    assert_same_steps(eager, graphed, batches, 12)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 10, 2)


def test_experts_of_fixed_capacity_are_replayed_and_report_their_losses(run):
    eager, graphed = pair_of(run, "torch", StepGraphs(), **EXPERTS)
    for step in range(8):
        expected, found = (each.train_step(lambda *_: [batch_of(step)]) for each in (eager, graphed))
        assert found.losses == expected.losses and "load_balancing_loss" in found.losses, step
    assert graphed.graphs.counts.replayed == 6


def test_recomputed_steps_are_replayed_bit_by_bit(run):
    eager, graphed = pair_of(run, "torch", StepGraphs(), **RECOMPUTED)
    assert_same_steps(eager, graphed, lambda step: [batch_of(2 * step), batch_of(2 * step + 1)], 8)
    assert graphed.graphs.counts.replayed == 6


def test_dropout_in_recomputed_activations_is_refused(run):
    with pytest.raises(ValueError, match="recomputed activations would draw other numbers"):
        trainer_of(run, config=language_of("torch", hidden_dropout=0.1, **RECOMPUTED))


@pytest.mark.parametrize("length", [24, 64, 100])
def test_attention_of_transformer_engine_is_replayed_bit_by_bit_at_any_length(run, length):
    eager, graphed = pair_of(run, "transformer_engine", StepGraphs())
    assert_same_steps(eager, graphed, lambda step: [batch_of(step, length=length)], 20)
    assert graphed.graphs.counts.replayed == 18


def test_any_number_of_media_in_a_bucket_is_one_graph(run):
    eager, graphed = pair_of(run, "torch", StepGraphs({"images": 4}))
    for step, images in enumerate([2, 4, 1, 3, 4, 1, 2]):
        expected, found = (each.train_step(lambda *_: [batch_of(step, images)]) for each in (eager, graphed))
        torch.testing.assert_close(dict(found.losses), dict(expected.losses), rtol=1e-5, atol=1e-5)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed) == (1, 5)
    for name, weight in eager.models[0].named_parameters():
        torch.testing.assert_close(graphed.models[0].get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    bad = batch_of(9)
    bad["input_ids"][0, bad["input_ids"][0] == tiny.READ] = 7
    with pytest.raises(ValueError, match="special tokens"):
        graphed.train_step(lambda *_: [bad])


def test_replays_draw_dropout_anew(run):
    config = language_of("torch", hidden_dropout=0.2, attention_dropout=0.2)
    trainer = trainer_of(run, StepGraphs(), config=config)
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["max_lr"] = group["min_lr"] = 0.0
    losses = []
    for _ in range(8):
        losses.append(trainer.train_step(lambda *_: [batch_of(0)]).losses["text"])
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0
    assert trainer.graphs.counts.replayed == 6
    assert len(set(losses[2:])) == 6, losses


def test_evaluation_generation_other_shapes_and_a_second_model_run_beside_a_graphed_one(run):
    alone, graphed = pair_of(run, "torch", StepGraphs(captures=1))
    other = trainer_of(run, StepGraphs(), config=language_of("torch", num_layers=1))
    for step in range(6):
        length = 32 if step == 4 else 24
        expected = alone.train_step(lambda *_: [batch_of(step, length=length)])
        other.train_step(lambda *_: [batch_of(step, length=32)])
        found = graphed.train_step(lambda *_: [batch_of(step, length=length)])
        assert found.losses == expected.losses
        held = [trainer.evaluate(lambda *_: [batch_of(50, 1, length=16)]) for trainer in (alone, graphed)]
        assert held[0] == held[1]
        said = [
            trainer.generate([{"input_ids": torch.tensor([1, 2])}], max_new_tokens=3) for trainer in (alone, graphed)
        ]
        assert said[0][0].ids == said[1][0].ids
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 3, 3) and other.graphs.counts.replayed == 4


def test_a_step_checked_on_the_host_copies_nothing_to_it_and_pins_nothing(run, monkeypatch):
    model, batch = MimoModel(language_of("torch")).cuda(), batch_of(0)
    placement = model.settle(
        {**batch, "placement": model.place(batch["input_ids"]).bound().counting(batch["loss_mask"])}
    )
    batch = {**on_gpu(batch), "placement": placement.to("cuda")}

    def step() -> None:
        outputs, mask = model(**batch)
        megatron_mimo.total_loss(megatron_mimo.loss_terms(outputs, mask)).backward()

    step()  # compiles and loads kernels
    torch.cuda.synchronize()
    pinned: list[object] = []
    empty, pin = torch.empty, torch.Tensor.pin_memory
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: (pinned.append(a) if k.get("pin_memory") else None, empty(*a, **k))[1]
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *a: (pinned.append(x), pin(x, *a))[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    copies = [event.key for event in profile.key_averages() if "DtoH" in event.key]
    assert not copies and not pinned and not model.checks._waiting
