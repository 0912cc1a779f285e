"""What a training step takes on a rank, counted before there is a GPU.

The model is built, and one microbatch goes forward and backward, on tensors without memory (`torch.device("meta")`):
the code that trains runs, operation by operation, and what it holds at each moment is added up as torch's allocator
does. So recomputation, chunks of the loss, frozen parts, packs and the layout count as they are, and no formula for an
architecture is kept here. What is assumed:

- RMSNorm and attention are one kernel each, which keeps its inputs, and a float32 number a row (and head) or two.
  TransformerEngine's attention has query, key and value each in memory of its own; a language model in float32 has
  plain torch's (`specs.core_attention`). In layers of plain torch attention without packs is Megatron's, with its
  scores, unless the model has `specs.with_fused_attention`.
- Of other kernels the space to work in, the CUDA context, NCCL's buffers, and the allocator's gaps are not counted: it
  is `torch.cuda.max_memory_allocated()` that is estimated.
- Adam or SGD, as Megatron builds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_mimo.batch import Batch, Nested
from megatron_mimo.compat.cuda_answers import gpu_without_memory
from megatron_mimo.compat.torch import functions_of, watched
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.transfer import from_bytes, to_bytes
from megatron_mimo.hf.encoder import HFEncoder
from megatron_mimo.launch import Run
from megatron_mimo.layout import check_layout
from megatron_mimo.losses import total_loss
from megatron_mimo.modality.encoding import ROWS_PER_ITEM
from megatron_mimo.model import MimoModel
from megatron_mimo.output import loss_terms
from megatron_mimo.segments import SegmentAttention, stays_plain
from megatron_mimo.specs import Backend
from megatron_mimo.training.chunks import build_chunks
from megatron_mimo.training.memory import check_memory
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.reading import part_for, placed_batches
from megatron_mimo.training.speed.counts import submodules_of

META = torch.device("meta")
#: Torch's allocator gives multiples of so many bytes.
BLOCK = 512
_FACTORIES = frozenset(
    ("arange", "empty", "empty_strided", "eye", "full", "linspace", "normal", "ones", "rand", "randint", "randn",
     "randperm", "tensor", "zeros", "as_tensor")
)  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank at the highest moment of a training step.

    Args:
        weights: parameters and buffers.
        gradients: the buffers of Megatron's DDP.
        optimizer: float32 copies and states.
        activations: most that forward and backward hold besides: what is kept for backward, inputs, gradients that
            are on their way.
        stepping: what the optimizer's step holds besides.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    stepping: int

    @property
    def peak(self) -> int:
        """The most that tensors take, as `torch.cuda.max_memory_allocated()` says it."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.stepping)


def footprint(
    config: MimoModelConfig,
    run: Run,
    batch: Batch,
    *,
    control: TrainingControl | None = None,
    optimizer: OptimizerConfig | None = None,
    ddp: DistributedDataParallelConfig | None = None,
    backend: Backend = "transformer_engine",
    fused_adam: bool = True,
    microbatches: int = 1,
) -> Footprint:
    """What a step of `Trainer` takes on this rank of a run.

    Args:
        config: of the model, whose layers are of plain torch: there is no GPU that others could run on.
        run: from `megatron_mimo.initialize`, or of one rank alone from `megatron_mimo.launch.pretended`.
        batch: one microbatch, on the CPU, as a collator gives it.
        control: which parts train.
        optimizer, ddp: as a `Trainer` takes them.
        backend: what the layers will compute with.
        fused_adam: whether TransformerEngine or Apex is there, whose Adam Megatron takes before torch's.
        microbatches: of a step; under pipeline parallelism several are on their way at once.

    Raises:
        ValueError: a layout that cannot work, interleaved stages, or another optimizer.
    """
    control, optimizer = control or TrainingControl(), optimizer or OptimizerConfig(lr=1e-3)
    ddp = ddp or DistributedDataParallelConfig()
    check_memory({**vars(ddp), **vars(optimizer)})
    check_layout(run.layout, config)
    control.check(config)
    if run.layout.virtual_pipeline_model_parallel_size is not None:
        raise ValueError("footprint: expected one chunk a stage, found an interleaved pipeline; count without it")
    model = model_without_memory(config, run, control)
    with control.keeping_precision(model):
        low = model.config.fp16 or model.config.bf16
        wrapped: nn.Module = Float16Module(model.config, model) if low else model
    fused = backend == "transformer_engine"
    held = Held()
    held.add(chain(model.parameters(), model.buffers()))
    weights = held.now
    packed = batch.get("packed_seq_params") is not None
    batches = placed_batches(iter([batch]), model)
    part = part_for(next(iter(batches)) if batches is not None else batch, model)
    launched = torch.compiler.set_stance("force_eager")  # of Megatron's fused activations nothing else is kept
    with gpu_without_memory(), _OneKernelEach(model, fused, packed), launched, held:
        kept, highest = _passes(model, wrapped, part, held)
    on_their_way = min(microbatches, run.layout.pipeline_model_parallel_size - run.pipeline_rank)
    spread = run.layout.data_parallel_size * run.layout.context_parallel_size
    gradients, states, stepping = _trained(model, optimizer, ddp, spread, fused_adam)
    return Footprint(weights, gradients, states, highest - weights + (on_their_way - 1) * (kept - weights), stepping)


def model_without_memory(config: MimoModelConfig, run: Run, control: TrainingControl | None = None) -> MimoModel:
    """This rank's model in training mode, its parameters and buffers on the meta device."""
    with _Unbacked():
        (model,) = build_chunks(config, replace(run, device=META), control or TrainingControl())
    return model.to(META).train()


def _passes(model: MimoModel, wrapped: nn.Module, part: Batch, held: Held) -> tuple[int, int]:
    """Bytes that forward leaves, and the most that there were."""
    for parameter in model.parameters():
        if parameter.requires_grad:  # DDP adds a gradient to its buffer and lets go of it
            parameter.register_post_accumulate_grad_hook(_let_go)
    # Megatron's rotary embedding reads the boundaries of packed samples, which are a few numbers.
    boundaries = {name: part[name] for name in ("packed_seq_params",) if name in part}
    rest = {name: value for name, value in part.items() if name not in boundaries}
    if model.pre_process:
        rest["modality_inputs"] = _with_rows(part.get("modality_inputs") or {}, model)
    manifest, buffer = to_bytes(rest)
    given = from_bytes(manifest, torch.empty_like(buffer, device=META)) | boundaries
    if not model.pre_process:
        states = torch.empty(_hidden_shape(model, part), dtype=model.config.params_dtype, device=META)
        model.set_input_tensor(states.requires_grad_())
    outputs, loss_mask = wrapped(**given)
    del given
    if model.post_process:
        end = total_loss(loss_terms(outputs, loss_mask))
        kept = held.now
        end.backward()
    else:
        assert isinstance(outputs, Tensor)  # hidden states
        kept = held.now
        outputs.backward(torch.empty_like(outputs))
    return kept, held.most


def _with_rows(inputs: Nested, model: MimoModel) -> dict[str, dict[str, dict[str, object]]]:
    """Inputs of encoders with the rows that each item gives, where these stand in a mask or a grid."""
    told: dict[str, dict[str, dict[str, object]]] = {}
    for modality, of in inputs.items():
        told[modality] = {name: dict(given) for name, given in of.items()}
        for name, encoder in submodules_of(model)[modality].encoders.items():
            given = told[modality].get(name)
            if isinstance(encoder, HFEncoder) and given and ROWS_PER_ITEM not in given:
                counts = encoder.told({key: value for key, value in given.items() if isinstance(value, Tensor)})
                given.update({} if counts is None else {ROWS_PER_ITEM: tuple(counts)})
    return told


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _hidden_shape(model: MimoModel, part: Batch) -> tuple[int, int, int]:
    samples, length = part["input_ids"].shape
    groups = model.pg_collection
    splits = groups.cp.size() * (groups.tp.size() if model.config.sequence_parallel else 1)
    return length // splits, samples, model.config.hidden_size


def _trained(
    model: MimoModel, optimizer: OptimizerConfig, ddp: DistributedDataParallelConfig, spread: int, fused_adam: bool
) -> tuple[int, int, int]:
    """Bytes of gradients, of the optimizer's copies and states, and of what its step holds besides."""
    if optimizer.optimizer not in ("adam", "sgd"):
        raise ValueError(f"footprint: expected the optimizer 'adam' or 'sgd', found {optimizer.optimizer!r}")
    shards = spread if optimizer.use_distributed_optimizer else 1
    gradients = states = stepping = 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        full, count = parameter.dtype is torch.float32, parameter.numel()
        wide = full or ddp.grad_reduce_in_fp32
        gradients += count * (4 if wide else parameter.element_size())
        states += count / shards * _state_bytes(optimizer, full)
        precise = optimizer.use_precision_aware_optimizer
        stepping += count / shards * (0 if wide or precise else 4)  # gradients in float32
        if not fused_adam and optimizer.optimizer == "adam":  # torch's own takes the root of all second moments at once
            stepping += count / shards * 4
    return int(gradients), int(states), int(stepping)


def _state_bytes(optimizer: OptimizerConfig, full: bool) -> float:
    """Bytes of a parameter's copy in float32 and of its moments."""
    if optimizer.optimizer == "sgd":
        return (0 if full else 4) + (4 if optimizer.sgd_momentum else 0)
    if not optimizer.use_precision_aware_optimizer:
        return (0 if full else 4) + 8
    # Of a copy in 16 bits beside weights in 16 bits the optimizer keeps the remainder alone, as many bytes.
    moments = optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize
    return moments + (0 if full else optimizer.main_params_dtype.itemsize)


# Counting --------------------------------------------------------------------------------


class Held:
    """Bytes of the storages on a device that are alive, as torch's allocator rounds them.

    Args:
        device: the kind; "meta" has no memory.

    Attributes:
        now: at this moment; `most`: the highest so far.

    Example:
        >>> with Held("cpu") as held:
        ...     x = torch.ones(1000)
        ...     y = (x + 1).sum()
        >>> held.now, held.most
        (4608, 8704)
    """

    def __init__(self, device: str = "meta") -> None:
        self._device = device
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref] = {}
        self._watched = watched(self._operation)

    def __enter__(self) -> Held:
        self._watched.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._watched.__exit__(*exception)

    def add(self, tensors: Iterator[Tensor] | Sequence[Tensor]) -> None:
        """Counts what these tensors lie in, once."""
        for tensor in tensors:
            if tensor.device.type != self._device:
                continue
            storage = tensor.untyped_storage()
            key, size = id(storage), -(-storage.nbytes() // BLOCK) * BLOCK
            if key in self._alive:
                continue
            self._alive[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int, _: weakref.ref) -> None:
        del self._alive[key]
        self.now -= size

    def _operation(self, function: Any, args: tuple, named: dict) -> Any:
        result = function(*args, **named)
        self.add([one for one in (result if isinstance(result, tuple | list) else [result]) if isinstance(one, Tensor)])
        return result


class _Unbacked(TorchFunctionMode):
    """Within it factories make tensors without memory, whatever device they are asked for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if getattr(function, "__name__", "") in _FACTORIES:
            given["device"] = META
        return function(*args, **given)


class _OneKernelEach:
    """Within it RMSNorm and attention are one operation each, as on a GPU. A mode would be off in backward.

    Args:
        model: whose core attentions compute nothing meanwhile.
        fused: whether layers are TransformerEngine's, whose attention has query, key and value each in memory of its
            own.
        packed: whether batches are packs, of which no backend keeps the scores.
    """

    def __init__(self, model: nn.Module, fused: bool, packed: bool) -> None:
        cores = (module.core_attention for module in model.modules() if isinstance(module, Attention))
        engines = {core: fused and not _is_plain(core) for core in cores if isinstance(core, DotProductAttention)}
        self._cores = {core: apart for core, apart in engines.items() if apart or packed}
        self._masked = F.scaled_dot_product_attention
        self._replaced = functions_of(
            rms_norm=_rms_norm, scaled_dot_product_attention=self._scaled_dot_product_attention
        )

    def __enter__(self) -> None:
        for core, apart in self._cores.items():
            core.forward = partial(_attention, apart)
        self._replaced.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._replaced.__exit__(*exception)
        for core in self._cores:
            del core.forward

    def _scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
    ) -> Tensor:
        if attn_mask is not None:
            return self._masked(query, key, value, attn_mask, *rest, **named)
        return _Attention.apply(query, key, value)


def _is_plain(core: DotProductAttention) -> bool:
    """Whether it stays plain torch's beside layers of TransformerEngine, as `specs.core_attention` has it."""
    return isinstance(core, SegmentAttention) and stays_plain(core.config)


def _attention(apart: bool, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    """`[..., heads, d]` each -> `[..., heads * d]`."""
    if apart:
        query, key, value = (x.contiguous() for x in (query, key, value))
    return _Attention.apply(query, key, value).flatten(-2)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    del normalized_shape, eps
    return _Norm.apply(input, weight)


class _Norm(torch.autograd.Function):
    """Shapes of RMSNorm in one kernel, which keeps a float32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


class _Attention(torch.autograd.Function):
    """Shapes of attention in one kernel, which keeps a float32 number a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query) if query.shape[-1] == value.shape[-1] else _wide(query, value)
        ctx.save_for_backward(query, key, value, mixed, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _wide(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])
