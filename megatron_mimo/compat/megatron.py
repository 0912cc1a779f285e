"""Private and undocumented names of `megatron.core`, one function each: version, reason, what to do when it goes.

Checked by `tests/unit/test_compat.py` on the installed version; last read in Megatron-Core 0.19.2. Nothing is
imported from Megatron until a function is called.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_mimo.compat.torch import forward_pre_hooks

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer, ParamKey
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup

_DDP = "megatron.core.distributed.distributed_data_parallel"


# Data parallelism ------------------------------------------------------------------------------------------------


def gathers_parameters(hook: Callable[..., Any]) -> bool:
    """Whether a forward pre-hook is the one that DDP gathers a module's parameters with (`overlap_param_gather`).

    Private: the hook is the inner function of `DistributedDataParallel._make_forward_pre_hook`; it is known by the
    module that it was defined in.
    Reason: a rank whose batch lacks a modality has to gather where the others do; Megatron does it in hooks alone.
    When it goes: Megatron would need a public `gather(module)`; look at what `enable_forward_pre_hook` registers.
    """
    return hook.__module__ == _DDP


def gather_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """DDP's hooks on a module, called as ``hook(module, ())``; empty without `overlap_param_gather`.

    Private, reason, when it goes: see `gathers_parameters`.
    """
    return [hook for hook in forward_pre_hooks(module).values() if gathers_parameters(hook)]


@contextmanager
def without_gather_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, forward passes of `modules` ask nothing of DDP.

    Private, reason, when it goes: see `gathers_parameters`. Handles of hooks refer to the dict, so it is changed in
    place.
    """
    taken = []
    for module in modules:
        hooks = forward_pre_hooks(module)
        others = {key: hook for key, hook in hooks.items() if not gathers_parameters(hook)}
        if len(others) < len(hooks):
            taken.append((hooks, dict(hooks)))
            _fill(hooks, others)
    try:
        yield
    finally:
        for hooks, before in taken:
            _fill(hooks, before)


def _fill(hooks: dict[int, Callable[..., Any]], content: Mapping[int, Callable[..., Any]]) -> None:
    hooks.clear()
    hooks.update(content)


def gradient_buffers(chunk: nn.Module) -> list[torch.Tensor]:
    """The flat buffers that hold the gradients of a chunk in Megatron's DDP, experts' included; padding is zero.

    Undocumented: `buffers` and `expert_parallel_buffers` of `DistributedDataParallel`, lists of `_ParamAndGradBuffer`
    with `grad_data`.
    Reason: one pass over them costs a launch a buffer; over the gradients it would cost one a parameter.
    When it goes: take `parameter.main_grad` of every parameter that trains.
    """
    buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]  # type: ignore[misc]  # DDP's hide nn.Module.buffers
    return [buffer.grad_data for buffer in buffers]


def shared_buffers() -> list[object]:
    """Buffers in which this process gathers tensors, each replaced once it is too small; empty without a run.

    Undocumented: `GlobalMemoryBuffer.buffer`, `(name, dtype)` -> tensor.
    Reason: what was captured on one writes where it was.
    When it goes: see where a sequence-parallel linear layer gathers its input.
    """
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return []
    return list(parallel_state.get_global_memory_buffer().buffer.values())


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether an output weight is the last stage's copy of a tied embedding.

    Undocumented: `LanguageModule.setup_embeddings_and_output_layer` sets `shared_embedding` on it.
    Reason: rows of the embedding that train have to train in the copy too.
    When it goes: compare `share_embeddings_and_output_weights` of the language model instead.
    """
    return bool(getattr(parameter, "shared_embedding", False))


def summed_by_name(name: str, config: TransformerConfig) -> bool:
    """Whether Megatron sums a parameter's gradient over tensor-parallel ranks for its name, whatever module it is in.

    Undocumented: `finalize_model_grads` looks for `q_layernorm` and `k_layernorm` anywhere in the name, where the
    language model's configuration has `qk_layernorm`.
    Reason: an encoder's parameter of such a name is replicated, and its gradient would come out TP times too large.
    When it goes: nothing is summed by name; take the callers' exception away.
    """
    return config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)


# Random numbers and compiled encoders ----------------------------------------------------------------------------


@contextmanager
def tracker_without_forks() -> Iterator[None]:
    """Within it, Megatron's RNG tracker stays where it is, whatever asks it for another generator.

    Undocumented: that layers ask the one tracker of `get_cuda_rng_tracker()` for `fork()` and that an attribute of the
    object hides its method. TransformerEngine's attention keeps the method that it finds when it is built; for that one
    `megatron.core.tensor_parallel.random._get_cuda_rng_state` and `_set_cuda_rng_state`, which it calls, do nothing,
    and the tracker's `states_` are put back.
    Reason: switches between generators can neither be captured in a CUDA graph nor compiled. What runs within it must
    draw nothing.
    When it goes: a tracker of Megatron's with `use_cudagraphable_rng` can be captured, though not compiled.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, random

    tracker = get_cuda_rng_tracker()
    states, read, write = dict(tracker.states_), random._get_cuda_rng_state, random._set_cuda_rng_state
    tracker.fork = _stay
    random._get_cuda_rng_state = random._set_cuda_rng_state = lambda *args, **options: None
    try:
        yield
    finally:
        random._get_cuda_rng_state, random._set_cuda_rng_state = read, write
        tracker.states_ = states
        del tracker.fork


def generators_of_tracker() -> list[torch.Generator]:
    """The generators of Megatron's RNG tracker, which a capture has to know; none of a tracker that no graph can use.

    Undocumented: that the tracker's states are generators where it was made with `use_cudagraphable_rng`.
    Reason: a graph draws anew at each replay from those generators alone that were registered with it.
    When it goes: a graph registers them by itself.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return [state for state in get_cuda_rng_tracker().get_states().values() if isinstance(state, torch.Generator)]


def _stay(*args: object, **options: object) -> AbstractContextManager[None]:
    return nullcontext()


def trace_through_linear_layers() -> None:
    """Keeps a compiled layer in one piece.

    Undocumented: `megatron.core.utils.get_tensor_model_parallel_group_if_none`, which is marked to go.
    Reason: Megatron's row-parallel layers give it no process group, it then warns on rank 0, and `torch.compile`
    breaks the graph at a warning. The group of a run does not change, so it is called once, when a layer is compiled.
    When it goes: the layers get their group from the caller, nothing warns; remove the call.
    """
    from megatron.core import utils

    torch.compiler.assume_constant_result(utils.get_tensor_model_parallel_group_if_none)


# Optimizers ------------------------------------------------------------------------------------------------------


def key_without_decay(overrides: Mapping[ParamKey, Any]) -> tuple[ParamKey, ...]:
    """The key of biases and norms, which have no weight decay; empty where there are no standard overrides.

    Undocumented: it is the first of `get_standard_config_overrides`.
    Reason: a part's factor on weight decay shall not reach parameters that have none.
    When it goes: find it by its value, `{"wd_mult": 0.0}`.
    """
    return tuple(overrides)[:1]


def single_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that a chained one is made of; the optimizer itself where it is not chained.

    Undocumented: `ChainedOptimizer.chained_optimizers`.
    Reason: each has a description of its own state, see `describe_momentum`.
    When it goes: look at what `ChainedOptimizer.step` goes through.
    """
    from megatron.core.optimizer import ChainedOptimizer

    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def describe_momentum(optimizer: MegatronOptimizer) -> None:
    """Gives Megatron a description of the state of an SGD that has not taken a step, where it lacks one.

    Undocumented: `MegatronOptimizer.init_state_fn`, `(torch optimizer, config) -> None`.
    Reason: loading a checkpoint begins with that description, and Megatron has Adam's alone.
    When it goes: fill the state by a step with gradients of zero, as older versions of Megatron did.
    """
    for each in single_optimizers(optimizer):
        if each.init_state_fn is None:
            each.init_state_fn = _momentum_of_nothing


def _momentum_of_nothing(optimizer: torch.optim.Optimizer, config: object = None) -> None:
    for group in optimizer.param_groups:
        if not group.get("momentum"):
            continue
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


# Checkpoints -----------------------------------------------------------------------------------------------------


@contextmanager
def writers_report_here() -> Iterator[None]:
    """Within it, the writing threads of `dist_checkpointing` report through a queue of this process.

    Private: `strategies.filesystem_async._results_queue`, taken by `get_write_results_queue` where it is not None.
    Reason: Megatron's own queue lives in a process spawned for it, so that writers in another process could use it.
    Spawned, that process imports the main script anew, which is a second run unless the script guards against it.
    When it goes: leave the context out, and tell users to guard their scripts by ``if __name__ == "__main__"``.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


# Layers ----------------------------------------------------------------------------------------------------------


def norms_chosen_at_import() -> tuple[type, ...]:
    """The norms that Megatron's own layer specs hold where TransformerEngine and Apex are absent.

    Undocumented: `vit_layer_specs.LNImpl`, chosen when that module is imported, and `WrappedTorchNorm`, which
    `get_gpt_decoder_block_spec` takes likewise.
    Reason: they refuse sequence parallelism; `specs` puts the norm of the chosen backend in their places.
    When it goes: build the specs from a `BackendSpecProvider` of one's own, whose `layer_norm` is ours.
    """
    from megatron.core.models.vision import vit_layer_specs
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return (WrappedTorchNorm, vit_layer_specs.LNImpl)


# Multi-token prediction ---------------------------------------------------------------------------------------------


def roll_to_next(
    values: torch.Tensor, cp_group: ProcessGroup, packed_seq_params: PackedSeqParams | None
) -> torch.Tensor:
    """Values `[B, S / CP]` of each next position of its sequence, zero where there is none; collective over `cp_group`.

    Undocumented: `multi_token_prediction.roll_tensor`, which gives `(rolled, sum)` and crosses shards of context
    parallelism and stops at packed boundaries.
    Reason: what rolls beside Megatron's own token ids has to roll as they do.
    When it goes: see what `MultiTokenPredictionLayer._get_embeddings` rolls ids with.
    """
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    return roll_tensor(values, shifts=-1, dims=-1, cp_group=cp_group, packed_seq_params=packed_seq_params)[0]


# Losses of experts --------------------------------------------------------------------------------------------------


def forget_scale_of_expert_losses() -> None:
    """Lets the next run of a schedule give the losses of experts its own scale.

    Undocumented: `moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale`, process-wide; a backward pass outside a
    schedule makes it a scalar, into which the schedule's `[1]` cannot be copied.
    Reason: a model may have been run by hand before it is trained.
    When it goes: nothing is left to forget; see what `set_loss_scale` keeps.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def release_graphs_of_experts(modules: Iterable[nn.Module]) -> None:
    """Drops the tensors of the last pass that experts' dispatchers hold, between two passes.

    Undocumented: a `MoETokenDispatcher` keeps routing probabilities as attributes, with their autograd graph.
    Reason: the graph holds DDP's hooks, which hold the model, in a cycle that Python's collector does not see: a model
    with experts was never freed after its first backward pass, nor its process groups.
    When it goes: the test shows whether a model is freed without it.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for module in modules:
        if isinstance(module, MoELayer):
            dispatcher = module.token_dispatcher
            for name, value in list(vars(dispatcher).items()):
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(dispatcher, name, None)


# Generation ---------------------------------------------------------------------------------------------------------


def scaled_logits(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """What a language model returns for what its output layer gave.

    Private: `LanguageModule._scale_logits`, which multiplies by the factor of maximal update parametrisation (muP).
    Reason: generation runs the output layer on the last positions alone, where `forward` would run it on all.
    When it goes: `logits * config.mup_output_mult` where `config.use_mup` is set.
    """
    return model._scale_logits(logits)


def turned_rows(attention: nn.Module, rows: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys `[S, 1, heads, d]` turned by angles `[S, 1, 1, d]`, as a batch that is not packed.

    Private: `Attention._yarn_concentration_factor`, which Megatron's own forward pass multiplies them by.
    Reason: packs are turned position by position (`packed_rotary`), which Megatron does within its forward pass alone.
    When it goes: pass on what `Attention.forward` gives `apply_rotary_pos_emb` as `mscale`.
    """
    from megatron.core.models.common.embeddings import apply_rotary_pos_emb

    own: Any = attention
    factor = own._yarn_concentration_factor
    return apply_rotary_pos_emb(rows, angles, config=own.config, mscale=factor, cp_group=own.pg_collection.cp)
