"""A training step's forward and backward passes, all its microbatches, as one CUDA graph.

    reader       batches, checked on the host, media padded to a bucket     (`training/reading.py`)
    key          what a capture takes for granted: shapes, rows of the loss, which terms count anything
    captured     Megatron's schedule: forward, loss, backward, reduction and scaling of gradients
    outside      reading, the copies to the device, whether anything is finite, the optimizer

What changes from step to step lies in tensors: the microbatches in one buffer each, and the numbers by which the loss
is divided in one more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor, nn

from megatron_mimo.batch import Batch, Nested
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.transfer import Manifest, Record, Slot, from_bytes
from megatron_mimo.launch import Run
from megatron_mimo.model import MimoModel
from megatron_mimo.placement import Placement
from megatron_mimo.tally import HostFacts
from megatron_mimo.token_loss import rows_of_labels
from megatron_mimo.training.finite import Gradients
from megatron_mimo.training.forward import Ahead, ForwardStep
from megatron_mimo.training.parts.captured import Captures, GraphCounts
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.scale import StepScale, numbers_of, told_of
from megatron_mimo.training.settings import check_whole
from megatron_mimo.training.speed import counts as names


@dataclass(frozen=True)
class StepGraphs:
    """A step's forward and backward passes replayed as one CUDA graph (`Trainer(graphs=...)`).

    A step that no graph fits (a shape for the first times, or beyond `captures`; a sequence length that is no multiple
    of 4096 with attention of TransformerEngine) runs without, and is counted.

    Args:
        buckets: modality -> the number of its media items in a microbatch is rounded up to a multiple of this, by
            items of zeros that no position reads. For encoders that give every item as many rows, whose inputs have
            one leading dim of items. A modality that is not named is taken as it comes.
        captures: at most this many graphs, one a shape.
        warmup: steps of a shape that run before it is captured.

    Raises:
        TypeError, ValueError: a number that is not whole, or below 1.

    Example:
        >>> graphs = StepGraphs(buckets={"images": 8})
    """

    buckets: Mapping[str, int] = field(default_factory=dict)
    captures: int = 4
    warmup: int = 2

    def __post_init__(self) -> None:
        for modality, size in self.buckets.items():
            check_whole(f"StepGraphs: buckets[{modality!r}]", size, least=1)
        check_whole("StepGraphs: captures", self.captures, least=1)
        check_whole("StepGraphs: warmup", self.warmup, least=1)

    def check(
        self, config: MimoModelConfig, run: Run, ddp: DistributedDataParallelConfig, control: TrainingControl
    ) -> None:
        """Refuses what a step as one graph cannot be right with, naming it.

        Raises:
            ValueError: with what to change.
        """
        _check_gpu(run)
        for modality in self.buckets:
            if modality not in config.special_token_ids:
                raise ValueError(
                    f"graphs: buckets has {modality!r}, expected modalities that are read: "
                    f"{sorted(config.special_token_ids)}."
                )
        language, layout = config.language_config, run.layout
        fits = language.fp8 is None or language.fp8_recipe in FP8_RECIPES
        wanted = {
            "no generation_token_ids, since decoders draw anew for each microbatch": not config.generation_token_ids,
            "pipeline_model_parallel_size=1": layout.pipeline_model_parallel_size == 1,
            "context_parallel_size=1": layout.context_parallel_size == 1,
            "num_moe_experts=None, whose routing the host waits for": language.num_moe_experts is None,
            "mtp_num_layers=None": not language.mtp_num_layers,
            f"fp8_recipe in {FP8_RECIPES}, whose replays are the eager steps bit by bit": fits,
            "fp8_param=False": not language.fp8_param,
            "fp16=False, whose loss scale changes": not language.fp16,
            "recompute_granularity=None": language.recompute_granularity is None,
            "overlap_grad_reduce=False": not ddp.overlap_grad_reduce,
            "overlap_param_gather=False": not ddp.overlap_param_gather,
            "graphed=() of TrainingControl: a step's graph has its encoders in it": not control.graphed,
            "initialize(graph_safe_rng=True)": run.graph_safe_rng,
        }
        wrong = [condition for condition, holds in wanted.items() if not holds]
        if wrong:
            raise ValueError(
                f"graphs: a step as one CUDA graph expects {'; '.join(wrong)}. Change that, or leave graphs out (and "
                "cuda_graph_impl='full_iteration')."
            )


def captures_of(
    settings: StepGraphs | None,
    config: MimoModelConfig,
    run: Run,
    ddp: DistributedDataParallelConfig,
    control: TrainingControl,
) -> Captures | None:
    """Where steps are captured; None where neither `settings` nor the language model's `cuda_graph_impl` asks for it.

    Raises:
        ValueError: as `StepGraphs.check`.
    """
    if settings is None and config.language_config.cuda_graph_impl != "full_iteration":
        return None
    settings = settings or StepGraphs()
    settings.check(config, run, ddp, control)
    return Captures(settings.captures, settings.warmup, run.device)


#: Replays of "delayed" gave other losses than eager steps do; further recipes were not tried.
FP8_RECIPES = ("tensorwise", "blockwise")

#: cuDNN's backward attention (`fort_native_sdpa_sm90_flash_bprop`) writes behind its output at some lengths: found by
#: compute-sanitizer at S = 24. In the pool of a graph that is memory of nobody. Replays were right at multiples of
#: this, ended in an illegal access at 24 and at 64, and were not tried in between.
CUDNN_ROWS = 4096


class WholeSteps:
    """Runs training steps, by a graph where there is one for their shape.

    Args:
        settings: what is captured.
        model: of the one stage.
        forward_step: reads microbatches and hands them to the schedule.
        gradients: whose largest is looked at when a step has run.
    """

    def __init__(
        self,
        settings: StepGraphs,
        captures: Captures,
        model: MimoModel,
        forward_step: ForwardStep,
        gradients: Gradients,
    ) -> None:
        self._settings, self._captures, self._model = settings, captures, model
        self._forward_step, self._gradients = forward_step, gradients
        self._brought: dict[Hashable, list] = {}
        for encoder in model.modality_submodules.children():
            _check_encoders(encoder)
        self._multiple = CUDNN_ROWS if _has_cudnn(model.language_model) else 1

    @property
    def counts(self) -> GraphCounts:
        """How steps ran."""
        return self._captures.counts

    def __call__(
        self, batches: Iterator[Batch] | None, schedule: Callable[[], list[dict[str, Tensor]]]
    ) -> list[dict[str, Tensor]]:
        """What the schedule gives for a step.

        Args:
            batches: the step's microbatches on the CPU, on rank 0 of the tensor-parallel group.
            schedule: runs over microbatches that the forward step was given.

        Raises:
            ValueError: a bad batch.
        """
        padded = None if batches is None else (in_buckets(b, self._settings.buckets, self._model) for b in batches)
        step, scale = self._forward_step.read(padded, self._model)
        each = [step.next_bytes() for _ in range(len(step))]
        manifests = [manifest for manifest, _, _ in each]
        counts = [count for _, _, count in each]
        buffers = [buffer for _, buffer, _ in each]
        numbers = numbers_of(scale, (count[names.HELD] for count in counts), buffers[0].device)
        shapes = tuple(_signature(manifest.tree, buffers[0].device) for manifest in manifests)
        key: Hashable | None = (shapes, tuple(count == 0 for count in scale.counts.values()))
        if any(_length(manifest) % self._multiple for manifest in manifests):
            key = None
        if self._captures.captured(key):
            self._recheck(key, manifests)

        def run(inputs: Sequence[Tensor]) -> tuple[list[dict[str, Tensor]], Tensor | None]:
            *buffers, numbers = inputs
            ahead = _ahead(manifests, buffers, counts, scale, numbers)
            with self._forward_step.given(ahead), self._model.checks.recording() as self._brought[key]:
                logged = schedule()
            return logged, self._gradients.largest

        logged, self._gradients.largest = self._captures(key, [*buffers, numbers], run)
        if not self._captures.captured(key):
            del self._brought[key]
        return logged

    def _recheck(self, key: Hashable, manifests: Sequence[Manifest]) -> None:
        """Holds the rows that a replay will make against the tokens of this step's microbatches.

        Raises:
            ValueError: as `Placement.check_rows`.
        """
        for manifest, brought in zip(manifests, self._brought[key], strict=True):
            batch = from_bytes(manifest, torch.empty(manifest.size, dtype=torch.uint8))
            for table, rows, items in brought:
                cast(Placement, batch["placement"]).check_rows(table, rows, items)


def whole_steps(
    settings: StepGraphs | None,
    captures: Captures | None,
    model: MimoModel,
    forward_step: ForwardStep,
    gradients: Gradients,
) -> WholeSteps | None:
    """What runs training steps by CUDA graphs, as `WholeSteps` takes it; None without captures."""
    if captures is None:
        return None
    return WholeSteps(settings or StepGraphs(), captures, model, forward_step, gradients)


def in_buckets(batch: Batch, buckets: Mapping[str, int], model: MimoModel) -> Batch:
    """The batch with items of zeros behind its media, up to a bucket, which no position reads.

    Args:
        batch: tensors on the CPU.
        buckets: modality -> items are a multiple of this.
        model: makes the placement, where the batch brings none.

    Raises:
        ValueError: inputs that are not a number of items alike, or tokens that are no equal number of rows an item.
    """
    inputs: Nested = batch.get("modality_inputs") or {}
    padded, spare = dict(inputs), {}
    placement = names.placement_of(batch, model)
    for modality, size in buckets.items():
        for encoder, keywords in (inputs.get(modality) or {}).items():
            where = f"modality_inputs[{modality!r}][{encoder!r}]"
            items = {value.shape[0] for value in keywords.values() if isinstance(value, Tensor) and value.dim()}
            if len(items) != 1 or len(inputs[modality]) != 1:
                raise ValueError(
                    f"graphs: {where} cannot be padded to a bucket of {size}: expected one encoder, whose tensors have "
                    f"one leading dim of items, found {sorted(items)}. Leave the modality out of buckets."
                )
            (number,) = items
            tokens = int(placement.counts(modality).sum())
            if number == 0:
                continue
            if tokens % number:
                raise ValueError(
                    f"graphs: {modality} has {tokens} special tokens for {number} items, expected as many for each: "
                    "only such items are padded to a bucket. Leave the modality out of buckets."
                )
            more = -number % size
            spare[modality] = more * (tokens // number)
            padded[modality] = {encoder: {name: _longer(value, more) for name, value in keywords.items()}}
    if not any(spare.values()) or placement.host is None:
        return {**batch, "placement": placement}
    placement = replace(placement, host=replace(placement.host, spare=spare))
    return {**batch, "modality_inputs": padded, "placement": placement}


def _longer(value: Any, more: int) -> Any:
    if not isinstance(value, Tensor) or not value.dim() or not more:
        return value
    return torch.cat([value, value.new_zeros(more, *value.shape[1:])])


def _ahead(
    manifests: Sequence[Manifest], buffers: Sequence[Tensor], counts: Sequence, scale: StepScale, numbers: Tensor
) -> Iterator[Ahead]:
    for manifest, buffer, count, told in zip(manifests, buffers, counts, told_of(scale, numbers), strict=True):
        yield from_bytes(manifest, buffer), count, scale, told


def _signature(node: Any, device: torch.device) -> Hashable:
    """What a capture takes for granted of a microbatch: all of its manifest but what the host alone looks at.

    Args:
        node: of the manifest.
        device: where the microbatch runs.
    """
    match node:
        case Record(kind=kind, fields=values) if kind is HostFacts:
            counted = cast(Tensor | None, values["counted"])
            return None if counted is None else rows_of_labels(int(counted.sum()), counted.numel(), device)
        case Record(kind=kind, fields=values):
            hidden = {f.name for f in fields(kind) if f.metadata.get("on_host")} | {"checks", "arrival"}
            return kind, _signature({name: value for name, value in values.items() if name not in hidden}, device)
        case Mapping():
            return tuple((key, _signature(value, device)) for key, value in node.items())
        case list() | tuple():
            return tuple(_signature(value, device) for value in node)
        case Slot() | None | bool() | int() | float() | str() | torch.dtype():
            return type(node), node
        case _ if is_dataclass(node):
            return type(node), node
    return object()  # what may hold anything is a shape of its own, each time: such steps run without a graph


def _length(manifest: Manifest) -> int:
    """`S` of a microbatch."""
    return cast(Any, manifest.tree)["input_ids"].shape[1]


def _has_cudnn(module: nn.Module) -> bool:
    """Whether attention of TransformerEngine, which may be cuDNN's, is in a module."""
    kinds = {base.__name__ for each in module.modules() for base in type(each).__mro__}
    return "TEDotProductAttention" in kinds


def _check_encoders(parts: nn.Module) -> None:
    """Refuses attention of TransformerEngine in encoders, whose lengths are not known here."""
    if any(parameter.requires_grad for parameter in parts.parameters()) and _has_cudnn(parts):
        raise ValueError(
            "graphs: an encoder that trains has attention of TransformerEngine, whose backward pass writes behind its "
            f"output at some numbers of rows (right at multiples of {CUDNN_ROWS}). Build it with backend 'torch', "
            "freeze it, or leave graphs out."
        )


def _check_gpu(run: Run) -> None:
    if run.device.type != "cuda":
        raise ValueError(f"graphs: CUDA graphs need a GPU, found a run on {run.device}. Leave graphs out.")
