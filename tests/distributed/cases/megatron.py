"""Megatron-Core on the CPU backend: N gloo ranks equal one, for every axis that needs no GPU."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo import specs
from megatron_mimo.launch import Run
from tests.distributed.harness import case, relayout, shared_directory
from tests.distributed.shards import load_whole_weights, whole_gradients, whole_weights

SEQUENCE, VOCABULARY = 8, 32
# fp32 sums taken in another order: a few units in the last place of numbers around 1, over 4 layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def config_of(run: Run, **changes) -> TransformerConfig:
    settings = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": run.layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": run.layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": run.layout.virtual_pipeline_model_parallel_size,
        "expert_model_parallel_size": run.layout.expert_model_parallel_size,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**settings | changes)


def model_of(config: TransformerConfig, **chunk) -> GPTModel:
    spec = specs.language_layer_spec(config, "torch", vp_stage=chunk.get("vp_stage"))
    return GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE, **chunk)


def tokens(samples: int) -> torch.Tensor:
    """Token ids `[samples, SEQUENCE]`, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY, (samples, SEQUENCE), generator=generator)


def losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss `[samples, SEQUENCE]` of predicting each token from itself and those before it."""
    return model(ids, torch.arange(SEQUENCE).expand_as(ids), None, labels=ids)


def gradients_of_one_rank(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss, by name; those in the model are cleared."""
    losses(model, ids).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def assert_equal_by_name(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        told = partial("{}: {}".format, name)
        torch.testing.assert_close(tensor, expected[name], **tolerance or CLOSE, msg=told)


@case(ranks=2)
def tensor_parallel_ranks_equal_one_rank(run: Run) -> None:
    for kind in ({}, {"normalization": "RMSNorm", "gated_linear_unit": True, "num_query_groups": 2}):
        gated = "gated_linear_unit" in kind
        for sequence_parallel in (False, True):
            run = relayout()
            model = model_of(config_of(run, **kind))
            weights, ids = whole_weights(model), tokens(2)
            expected_loss, expected = losses(model, ids).detach(), gradients_of_one_rank(model, ids)

            run = relayout(tensor_model_parallel_size=2)
            model = model_of(config_of(run, sequence_parallel=sequence_parallel, **kind))
            load_whole_weights(model, weights, run.groups.tp, gated)
            loss = losses(model, ids)
            loss.mean().backward()
            torch.testing.assert_close(loss, expected_loss, **CLOSE)
            assert_equal_by_name(whole_gradients(model, run.groups.tp, gated), expected)


def _global_names(chunk: GPTModel) -> dict[str, str]:
    """Name in this pipeline chunk -> name in the whole model, whose layers are numbered through."""
    names = {}
    for name, _ in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        names[name] = ".".join(parts)
    return names


def _pipeline_equals_one_rank(chunks: int | None, **changes) -> None:
    microbatches = 4
    run = relayout()
    model = model_of(config_of(run))
    weights, ids = whole_weights(model), tokens(2 * microbatches)
    expected_loss, expected = losses(model, ids).mean().item(), gradients_of_one_rank(model, ids)

    run = relayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks)
    config = config_of(run, **changes)
    model = []
    for stage in range(chunks or 1):
        first = run.pipeline_rank == 0 and stage == 0
        last = run.pipeline_rank == 1 and stage == (chunks or 1) - 1
        chunk = model_of(config, pre_process=first, post_process=last, vp_stage=stage if chunks else None)
        with torch.no_grad():
            for name, whole in _global_names(chunk).items():
                chunk.get_parameter(name).copy_(weights[whole])
        model.append(chunk)

    def step(batches: Iterator[torch.Tensor], chunk: GPTModel):
        return losses(chunk, next(batches)), lambda output: (output.mean(), {"loss": output.mean().item()})

    reported = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(ids.chunk(microbatches)) for _ in model],
        model=model,
        num_microbatches=microbatches,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
    if run.pipeline_rank == 1:
        assert abs(sum(report["loss"] for report in reported) / microbatches - expected_loss) < 1e-5
    for chunk in model:
        names = _global_names(chunk)
        found = {names[name]: parameter.grad for name, parameter in chunk.named_parameters()}
        assert_equal_by_name(found, {name: expected[name] for name in found})


@case(ranks=2)
def pipeline_stages_equal_one_rank(run: Run) -> None:
    _pipeline_equals_one_rank(None)
    _pipeline_equals_one_rank(None, batch_p2p_comm=False)
    _pipeline_equals_one_rank(None, variable_seq_lengths=True, moe_token_dispatcher_type="alltoall")


@case(ranks=2)
def interleaved_pipeline_stages_equal_one_rank(run: Run) -> None:
    # With two stages, next and previous are the same rank, and only the overlapped schedule keeps the messages apart.
    _pipeline_equals_one_rank(2, overlap_p2p_comm=True, batch_p2p_comm=False)


def _data_parallel(
    run: Run, config: TransformerConfig, weights: dict[str, torch.Tensor], distributed: bool, overlap: bool
) -> tuple[DistributedDataParallel, MegatronOptimizer, Callable[[torch.Tensor], float]]:
    """A wrapped model with `weights`, its optimizer, and a function that takes a step on ids and gives its loss."""
    model = model_of(config)
    load_whole_weights(model, weights, run.groups.tp)
    if config.bf16:
        model = Float16Module(config, model)
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and distributed,
            grad_reduce_in_fp32=True,
            # Several buckets, so that there is something to overlap.
            bucket_size=2000,
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.01,
            # A large epsilon: Adam divides by the gradient's size, and would blow up the rounding of tiny ones.
            adam_eps=1e-3,
            weight_decay=0.0,
            clip_grad=0.0,
            use_distributed_optimizer=distributed,
            overlap_param_gather=overlap and distributed,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        ),
        [wrapped],
    )

    def step(ids: torch.Tensor) -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        loss = losses(wrapped, ids).float().mean()
        loss.backward()
        finalize_model_grads([wrapped])
        done, _, _ = optimizer.step()
        assert done
        return loss.item()

    return wrapped, optimizer, step


def _trained_by_torch(model: GPTModel, ids: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model, ids).mean().backward()
        optimizer.step()
    return whole_weights(model)


@case(ranks=2, timeout_s=90)
def data_parallel_training_equals_one_rank_for_every_optimizer(run: Run) -> None:
    model = model_of(config_of(run))
    weights, ids = whole_weights(model), tokens(4)
    expected = _trained_by_torch(model, ids, steps=3)
    for distributed in (False, True):
        for overlap in (False, True):
            wrapped, _, step = _data_parallel(run, config_of(run), weights, distributed, overlap)
            for _ in range(3):
                step(ids.chunk(2)[run.data_rank])
            if distributed and overlap:
                wrapped.start_param_sync(force_sync=True)
            assert_equal_by_name(whole_weights(wrapped.module), expected, rtol=1e-4, atol=1e-5)


@case(ranks=2, timeout_s=90)
def bfloat16_training_follows_fp32_and_its_ranks_agree(run: Run) -> None:
    model = model_of(config_of(run))
    weights, ids = whole_weights(model), tokens(4)
    expected = _trained_by_torch(model, ids, steps=3)
    for distributed in (False, True):
        config = config_of(run, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
        wrapped, _, step = _data_parallel(run, config, weights, distributed, overlap=distributed)
        curve = [step(ids.chunk(2)[run.data_rank]) for _ in range(3)]
        if distributed:
            wrapped.start_param_sync(force_sync=True)
        assert curve[-1] < curve[0]
        found = whole_weights(wrapped.module.module)
        for name, tensor in found.items():
            assert tensor.dtype == torch.bfloat16
            # bf16 keeps 8 bits; three steps of at most 0.01 each went through gradients of that precision.
            torch.testing.assert_close(tensor.float(), expected[name], rtol=1e-2, atol=1e-2)
            of_rank_0 = tensor.clone()
            dist.broadcast(of_rank_0, src=0)
            assert torch.equal(of_rank_0, tensor)


@case(ranks=2)
def expert_parallel_ranks_equal_one_rank(run: Run) -> None:
    experts = 4
    for dispatcher in ("alltoall", "allgather"):
        kind = {
            "num_moe_experts": experts,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": dispatcher,
            "add_bias_linear": False,
        }
        run = relayout()
        model = model_of(config_of(run, **kind))
        weights, ids = whole_weights(model), tokens(4).chunk(2)
        per_batch = [gradients_of_one_rank(model, batch) for batch in ids]

        run = relayout(expert_model_parallel_size=2)
        model = model_of(config_of(run, **kind))
        whole_names = {}
        for name, _ in model.named_parameters():
            parts = name.split(".")
            if "local_experts" in parts:
                place = parts.index("local_experts") + 1
                parts[place] = str(int(parts[place]) + run.expert_rank * experts // 2)
            whole_names[name] = ".".join(parts)
        with torch.no_grad():
            for name, whole in whole_names.items():
                model.get_parameter(name).copy_(weights[whole])
        losses(model, ids[run.expert_rank]).mean().backward()
        for name, whole in whole_names.items():
            mine = per_batch[run.expert_rank][whole]
            # An expert sees the tokens of both ranks, everything else those of its own.
            expected = per_batch[0][whole] + per_batch[1][whole] if "local_experts" in name else mine
            torch.testing.assert_close(model.get_parameter(name).grad, expected, **CLOSE)


@case(ranks=2, timeout_s=90)
def checkpoints_saved_by_two_tensor_ranks_load_whole(run: Run) -> None:
    model = model_of(config_of(run))
    weights = whole_weights(model)
    directory = shared_directory() / "checkpoint"
    directory.mkdir(exist_ok=True)

    run = relayout(tensor_model_parallel_size=2)
    model = model_of(config_of(run))
    load_whole_weights(model, weights, run.groups.tp)
    dist_checkpointing.save(model.sharded_state_dict(), directory)

    run = relayout(seed=99)
    model = model_of(config_of(run))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), directory))
    assert_equal_by_name(whole_weights(model), weights, rtol=0, atol=0)


@case(ranks=2, timeout_s=90)
def distributed_optimizers_resume_from_a_checkpoint_exactly(run: Run) -> None:
    weights, ids = whole_weights(model_of(config_of(run))), tokens(4).chunk(2)[run.data_rank]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    def state(wrapped, optimizer, loading: bool, sharding: str) -> dict:
        model_state = wrapped.module.sharded_state_dict()
        metadata = {
            "distrib_optim_sharding_type": sharding,
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
        return {"model": model_state, "optimizer": optimizer_state}

    for sharding in ("fully_reshardable", "dp_reshardable"):
        directory = shared_directory() / sharding
        directory.mkdir(exist_ok=True)
        wrapped, optimizer, step = _data_parallel(run, config_of(run), weights, True, False)
        step(ids)
        dist_checkpointing.save(state(wrapped, optimizer, False, sharding), directory)
        for _ in range(2):
            step(ids)
        expected = whole_weights(wrapped.module)

        wrapped, optimizer, step = _data_parallel(run, config_of(run), zeros, True, False)
        loaded = dist_checkpointing.load(state(wrapped, optimizer, True, sharding), directory)
        wrapped.module.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        for _ in range(2):
            step(ids)
        assert_equal_by_name(whole_weights(wrapped.module), expected, rtol=0, atol=0)
