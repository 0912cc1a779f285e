"""What a training step takes is counted without memory: as much as the same step holds on real tensors."""

import inspect
from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from megatron_mimo.axes import Layout
from megatron_mimo.kernels import reference, shapes
from megatron_mimo.launch import pretended
from megatron_mimo.output import loss_terms
from megatron_mimo.training import Trainer, TrainerSettings, TrainingControl
from megatron_mimo.training.footprint import Held, footprint
from tests import tiny


def config(**changes):
    """A language model whose layers outweigh what moves rows; LayerNorm and scores, which are one kernel each here."""
    settings = dict(num_layers=4, hidden_size=tiny.HIDDEN, ffn_hidden_size=512, **changes)
    return tiny.mimo_config(tiny.language_spec(tiny.language_config(**settings)))


def counted(given=None, *, layout=Layout(1), rank=0, **options):
    with pretended(layout, rank) as run:
        return footprint(given or config(), run, tiny.batch(), **{"backend": "torch", **options})


def test_a_step_holds_as_much_on_the_cpu_as_is_counted(no_run) -> None:
    found = counted()
    run = megatron_mimo.initialize(backend="gloo")
    trainer = Trainer(config(), run, TrainerSettings(steps=1, progress=False), optimizer=OptimizerConfig(lr=1e-3))
    trainer.train(lambda *_: [tiny.batch()])
    parameters = list(trainer.models[0].parameters())
    assert found.weights == pytest.approx(
        sum(each.numel() * 4 for each in parameters), rel=0.1
    )  # small ones are rounded
    buffers = trainer.chunks[0].buffers
    assert found.gradients == pytest.approx(sum(each.grad_data.numel() * 4 for each in buffers), rel=0.02)
    held = [state for each in trainer.optimizer.chained_optimizers for state in each.optimizer.state.values()]
    states = [value for state in held for value in state.values() if torch.is_tensor(value) and value.dim()]
    assert found.optimizer == sum(value.numel() * value.element_size() for value in states)

    model, batch = trainer.models[0], tiny.batch()
    for parameter in parameters:
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    batch["placement"] = model.place(batch["input_ids"]).bound().counting(batch["loss_mask"])
    with Held("cpu") as real:
        real.add(parameters)
        before = real.now
        outputs, mask = model(**batch)
        megatron_mimo.total_loss(loss_terms(outputs, mask)).backward()
    assert found.activations == pytest.approx(real.most - before, rel=0.05)


def test_recomputation_frozen_parts_and_shares_count_as_they_are(no_run) -> None:
    plain = counted()
    whole = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert counted(config(**whole)).activations < 0.6 * plain.activations
    # Scores, which one kernel of attention does not keep. A language model in float32 has plain torch's either way.
    low = config(bf16=True, params_dtype=torch.bfloat16)
    assert counted(low, backend="transformer_engine").activations < counted(low).activations
    assert counted(backend="transformer_engine") == plain
    resting = counted(control=TrainingControl(frozen=["language_model"]))
    assert resting.gradients < 0.2 * plain.gradients and resting.optimizer == 2 * resting.gradients
    assert resting.weights == plain.weights and 0 < resting.activations < plain.activations
    spread = dict(
        optimizer=OptimizerConfig(lr=1e-3, use_distributed_optimizer=True),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True),
    )
    assert counted(layout=Layout(4), **spread).optimizer == plain.optimizer // 4
    assert counted(fused_adam=False).stepping == plain.gradients > counted().stepping == 0
    assert plain.peak == plain.weights + plain.gradients + plain.optimizer + plain.activations


def test_bfloat16_has_a_copy_in_float32_and_gradients_in_its_own_precision_or_in_float32(no_run) -> None:
    low = config(bf16=True, params_dtype=torch.bfloat16)
    found = counted(low)
    count = found.gradients // 2
    assert found.optimizer == 12 * count and found.stepping == 4 * count
    wide = counted(low, ddp=DistributedDataParallelConfig(grad_reduce_in_fp32=True))
    assert wide.gradients == 4 * count and wide.stepping == 0
    assert counted(low, optimizer=OptimizerConfig(optimizer="sgd", lr=1e-3, sgd_momentum=0.9)).optimizer == 8 * count
    precise = OptimizerConfig(lr=1e-3, use_distributed_optimizer=True)
    # Megatron refuses it at construction where TransformerEngine is not there.
    precise.use_precision_aware_optimizer, precise.exp_avg_dtype = True, torch.bfloat16
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    assert counted(low, optimizer=precise, ddp=ddp).optimizer == (4 + 2 + 4) * count


def test_each_rank_counts_its_own_part_of_the_layers_and_the_stages(no_run) -> None:
    whole = counted()
    two = config(tensor_model_parallel_size=2, sequence_parallel=True)
    cut = counted(two, layout=Layout(2, tensor_model_parallel_size=2))
    assert 0.4 * whole.weights < cut.weights < 0.7 * whole.weights
    assert 0.4 * whole.activations < cut.activations < 0.8 * whole.activations

    staged = config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    layout = Layout(2, pipeline_model_parallel_size=2)
    first, last = (counted(staged, layout=layout, rank=rank, microbatches=4) for rank in (0, 1))
    assert first.weights + last.weights == pytest.approx(whole.weights, rel=0.01)
    alone = counted(staged, layout=layout, microbatches=1)  # on the first stage two are on their way at once
    assert 1.5 * alone.activations < first.activations <= 2 * alone.activations
    assert counted(staged, layout=layout, rank=1, microbatches=1).activations == last.activations


def test_what_cannot_be_counted_is_refused(no_run) -> None:
    with pytest.raises(ValueError, match="expected the optimizer 'adam' or 'sgd', found 'muon'"):
        counted(optimizer=OptimizerConfig(optimizer="muon", lr=1e-3))
    chunks = dict(virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=True, batch_p2p_comm=False)
    interleaved = config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **chunks)
    with pytest.raises(ValueError, match="found an interleaved pipeline"):
        counted(interleaved, layout=Layout(2, 1, 2, 2))
    megatron_mimo.initialize(backend="gloo")
    with pytest.raises(RuntimeError, match="pretended: a run is in progress"):
        counted()


def test_kernels_without_memory_take_and_give_what_the_reference_does() -> None:
    for name in shapes.__all__:
        assert inspect.signature(getattr(shapes, name)) == inspect.signature(getattr(reference, name)), name
    ids = torch.tensor([[1, -200, 3], [-200, 61, 0]])
    expected = reference.plan(ids, [-200], [61], text_is_table=True, vocabulary_size=64)
    found = shapes.plan(ids.to("meta"), [-200], [61], text_is_table=True, vocabulary_size=64)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in expected]
    order = shapes.vocabulary_order(ids.to("meta"), found[0], None, 0, 64)
    assert [(len(each), each.dtype) for each in order] == [(6, torch.int64)] * 2


def test_a_layout_s_settings_reach_the_model_that_is_counted(no_run) -> None:
    given = config()
    spec = given.language_model
    short = replace(spec.params["config"], num_layers=2)
    small = replace(given, language_model=tiny.language_spec(short))
    assert counted(small).weights < counted(given).weights
