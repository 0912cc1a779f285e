"""A pipeline stage's part of the model, wrapped as Megatron's schedules and optimizers take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    is_graph_safe_cuda_rng_tracker,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.launch import Run
from megatron_mimo.model import MimoModel
from megatron_mimo.pretrained import Source, load_pretrained
from megatron_mimo.training.parts.control import TrainingControl


def build_stage(
    config: MimoModelConfig,
    control: TrainingControl,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    pg_collection: ProcessGroupCollection | None,
    pretrained: Source | None = None,
) -> MimoModel:
    """The model of one pipeline stage, or of one chunk of it, whose parts train as `control` says.

    Every loop builds its models here: `Trainer` and `pretrain`, this library's and Megatron's.

    Args:
        config: of the whole model.
        control: what is frozen, compiled and graphed, and what happens to gradients after their reduction.
        pre_process, post_process, vp_stage: which stage and chunk it is.
        pg_collection: process groups; None for Megatron's global ones.
        pretrained: what the weights begin from, as `load_pretrained` takes it; None for fresh ones.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `load_pretrained`.
    """
    with _unhooked(config.language_config):
        model = MimoModel(
            config, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage, pg_collection=pg_collection
        )
    if pretrained is not None:  # here, since optimizers copy the weights in full precision
        load_pretrained(model, pretrained)
    control.apply(model)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    control.graph(model)
    model.config.finalize_model_grads_func = control.finalize_func()
    return model


_HOOKS = ("grad_scale_func", "finalize_model_grads_func", "no_sync_func", "grad_sync_func", "mtp_grad_scale_func")


@contextmanager
def _unhooked(config: TransformerConfig) -> Iterator[None]:
    """Within it a configuration has no hooks of an earlier trainer.

    Megatron copies it, with all that hangs on it, for attention with fewer groups of keys than tensor-parallel ranks;
    process groups, which an optimizer has, cannot be copied.
    """
    hooks = {name: getattr(config, name) for name in _HOOKS}
    for name in hooks:
        setattr(config, name, None)
    try:
        yield
    finally:
        for name, hook in hooks.items():
            setattr(config, name, hook)


def build_chunks(
    config: MimoModelConfig, run: Run, control: TrainingControl, pretrained: Source | None = None
) -> list[MimoModel]:
    """This rank's model chunks, one without an interleaved pipeline, on its device.

    Args:
        config: of the model.
        run: the layout and its process groups.
        control: how the parts train.
        pretrained: what the weights begin from, as `load_pretrained` takes it; None for fresh ones.
    """
    chunks = run.layout.virtual_pipeline_model_parallel_size
    last = run.layout.pipeline_model_parallel_size - 1
    return [
        build_stage(
            config,
            control,
            pre_process=run.pipeline_rank == 0 and vp_stage in (None, 0),
            post_process=run.pipeline_rank == last and vp_stage in (None, (chunks or 1) - 1),
            vp_stage=vp_stage,
            pg_collection=run.groups,
            pretrained=pretrained,
        ).to(run.device)
        for vp_stage in ((None,) if chunks is None else range(chunks))
    ]


def wrap_chunks(
    chunks: list[MimoModel], run: Run, ddp: DistributedDataParallelConfig, control: TrainingControl
) -> list[DistributedDataParallel]:
    """The chunks in half precision where their configuration says so, in Megatron's DDP.

    Args:
        chunks: from `build_chunks`.
        run: the layout and its process groups.
        ddp: options of the gradient reduction.
        control: which encoders keep their precision.

    Raises:
        ValueError: as `check_redrawn`.
    """
    wrapped = []
    for chunk in chunks:
        check_redrawn(chunk)
    for index, chunk in enumerate(chunks):
        config = chunk.config
        with control.keeping_precision(chunk):
            inner: nn.Module = Float16Module(config, chunk) if config.fp16 or config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                config,
                replace(ddp),  # DDP writes the bucket size that it chose into its configuration
                inner,
                # Chunks after the first finish while others still compute: nothing to overlap in pieces.
                disable_bucketing=index > 0,
                pg_collection=run.groups,
            )
        )
    return wrapped


def check_redrawn(model: nn.Module) -> None:
    """Refuses dropout in recomputed activations where random numbers are a graph's: it would be drawn anew.

    Of generators that a graph can use Megatron keeps no copies: they have moved on when activations are recomputed, and
    the gradient would be another forward pass's.

    Raises:
        ValueError: naming the first such part of the model.
    """
    if not is_graph_safe_cuda_rng_tracker(get_cuda_rng_tracker()):
        return
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if not isinstance(config, TransformerConfig) or config.recompute_granularity is None:
            continue
        if config.hidden_dropout or config.attention_dropout:
            raise ValueError(
                f"{name or 'the model'}: recompute_granularity={config.recompute_granularity!r} with dropout and "
                "initialize(graph_safe_rng=True): recomputed activations would draw other numbers than the forward "
                "pass did. Set hidden_dropout and attention_dropout to 0, or leave one of the other two out."
            )


def hook_schedule(
    chunks: list[DistributedDataParallel], scale_loss: Callable, finalize: Callable = finalize_model_grads
) -> None:
    """Tells Megatron's schedules, through the model's configuration, how gradients are scaled, reduced and finalized.

    Models that share a configuration, such as two trainers in one process, would meet there: call it before each
    model's schedule runs.

    Args:
        chunks: this rank's.
        scale_loss: the optimizer's loss scale.
        finalize: what happens to the gradients after the last microbatch, called as Megatron's `finalize_model_grads`.
    """
    config, overlap = chunks[0].module.config, chunks[0].ddp_config.overlap_grad_reduce
    one_or_all = (lambda of_each: of_each[0]) if len(chunks) == 1 else (lambda of_each: of_each)
    config.grad_scale_func = scale_loss
    config.finalize_model_grads_func = finalize
    config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks]) if overlap else None
    config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks] if overlap and len(chunks) > 1 else None


@contextmanager
def parameters_gathered(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within it, every rank holds whole weights, however the distributed optimizer gathers them.

    With `overlap_param_gather` the weights of a step arrive with the next forward pass in training.
    """
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    if overlapped:
        optimizer.prepare_model_params_for_param_sync()
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
