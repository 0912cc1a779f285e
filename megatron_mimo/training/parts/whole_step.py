"""A training step's forward and backward passes, all its microbatches, as one CUDA graph.

    reader       batches, checked on the host, media padded to a bucket      (`training/reading.py`, `parts/buckets.py`)
    chunk steps  what a capture takes for granted, and what changes: microbatches, prepared targets, the numbers by
                 which the loss is divided                                   (`parts/chunk_step.py`)
    captured     Megatron's schedule: forward, loss, backward, messages of stages, reduction and scaling of gradients
    outside      reading, the copies to the device, whether anything is finite, the optimizer

All ranks run a step alike, by a graph or without: what one of them cannot replay or capture none does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice, product

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mimo.axes import Layout
from megatron_mimo.batch import Batch
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.cudnn import check_one_cudnn
from megatron_mimo.graphs import places_of
from megatron_mimo.launch import Run
from megatron_mimo.model import MimoModel
from megatron_mimo.training import auxiliary
from megatron_mimo.training.agreement import agreed, error_of, raise_together
from megatron_mimo.training.finite import Gradients
from megatron_mimo.training.forward import ForwardStep
from megatron_mimo.training.parts.buckets import in_buckets, with_label_rows, with_packs_alike
from megatron_mimo.training.parts.captured import Captures, GraphCounts
from megatron_mimo.training.parts.chunk_step import ChunkStep
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.settings import check_whole


@dataclass(frozen=True)
class StepGraphs:
    """A step's forward and backward passes replayed as one CUDA graph (`Trainer(graphs=...)`).

    A step that no graph fits (a shape for the first times, or beyond `captures`) runs without, and is counted.

    Args:
        buckets: modality -> the number of its media items in a microbatch is rounded up to a multiple of this, by
            copies of the last that no position reads. For encoders that give every item as many rows, from that item
            alone, whose inputs have one leading dim of items. A modality that is not named is taken as it comes.
        label_rows: the language loss of a microbatch reads a multiple of so many rows on each context-parallel rank, by
            rows that do not count; None for a 32nd of the positions. Fewer shapes, more rows that nobody needs.
        packed_sequences: the number of sequences in a pack is rounded up to a multiple of this, by empty ones, and the
            longest to a power of two, where attention reads their boundaries on the device: packs whose samples begin
            elsewhere then run by one graph.
        captures: at most this many graphs, one a shape.
        warmup: steps of a shape that run before it is captured.

    Raises:
        TypeError, ValueError: a number that is not whole, or below 1.

    Example:
        >>> graphs = StepGraphs(buckets={"images": 8})
    """

    buckets: Mapping[str, int] = field(default_factory=dict)
    label_rows: int | None = None
    packed_sequences: int = 16
    captures: int = 4
    warmup: int = 2

    def __post_init__(self) -> None:
        for modality, size in self.buckets.items():
            check_whole(f"StepGraphs: buckets[{modality!r}]", size, least=1)
        if self.label_rows is not None:
            check_whole("StepGraphs: label_rows", self.label_rows, least=1)
        check_whole("StepGraphs: packed_sequences", self.packed_sequences, least=1)
        check_whole("StepGraphs: captures", self.captures, least=1)
        check_whole("StepGraphs: warmup", self.warmup, least=1)

    def check(
        self,
        config: MimoModelConfig,
        layout: Layout,
        device: torch.device,
        ddp: DistributedDataParallelConfig,
        control: TrainingControl,
        graph_safe_rng: bool,
    ) -> None:
        """Refuses what a step as one graph cannot be right with, naming it.

        Args:
            config: of the model.
            layout: of the run; `device`: where it computes; `graph_safe_rng`: as `Run` has it.
            ddp: of the run's wrappers.
            control: which parts train, and how.

        Raises:
            ValueError: with what to change.
        """
        _check_gpu(device)
        for modality in self.buckets:
            if modality not in config.special_token_ids:
                raise ValueError(
                    f"graphs: buckets has {modality!r}, expected modalities that are read: "
                    f"{sorted(config.special_token_ids)}."
                )
        language = config.language_config
        fits = language.fp8 is None or language.fp8_recipe in FP8_RECIPES
        # Megatron has TransformerEngine's kernel copy a number from the host unless its own switch asks for a graph.
        te_loss = language.cross_entropy_loss_fusion and language.cross_entropy_fusion_impl == "te"
        copies = te_loss and language.cuda_graph_impl != "full_iteration"
        wanted = {
            **_between_stages(language, layout),
            **_of_experts(language),
            "mtp_grad_scale_func=None, which the host calls once": auxiliary.scales_mtp(language),
            f"fp8_recipe in {FP8_RECIPES}, whose replays are the eager steps bit by bit": fits,
            "cuda_graph_impl='full_iteration' beside cross_entropy_fusion_impl='te'": not copies,
            "fp8_param=False": not language.fp8_param,
            "fp16=False, whose loss scale changes": not language.fp16,
            "recompute_granularity=None beside fp8": language.recompute_granularity is None or language.fp8 is None,
            "overlap_param_gather=False, whose weights the optimizer sends for": not ddp.overlap_param_gather,
            "check_for_nan_in_grad=False": not ddp.check_for_nan_in_grad,
            "check_for_large_grads=False": not ddp.check_for_large_grads,
            "graphed=() of TrainingControl: a step's graph has its encoders in it": not control.graphed,
            "initialize(graph_safe_rng=True)": graph_safe_rng,
            "NCCL_GRAPH_REGISTER=0 in the environment beside expandable_segments:True, or replayed collectives reach "
            "for memory that has moved": layout.world_size == 1 or not _moves_registered_memory(),
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
    settings.check(config, run.layout, run.device, ddp, control, run.graph_safe_rng)
    return Captures(settings.captures, settings.warmup, run.device)


def _between_stages(language: TransformerConfig, layout: Layout) -> dict[str, bool]:
    """What messages between pipeline stages have to be like: without a look of the host's."""
    if layout.pipeline_model_parallel_size == 1:
        return {}
    return {
        "variable_seq_lengths=False, whose stages tell their hosts a shape before each message": (
            not language.variable_seq_lengths
        ),
        "batch_p2p_sync=False, since the host waits for the device after each message": (
            not (language.batch_p2p_comm and language.batch_p2p_sync)
        ),
    }


def _of_experts(language: TransformerConfig) -> dict[str, bool]:
    """What routing to experts has to be like: as many rows for each, whatever is routed."""
    if language.num_moe_experts is None:
        return {}
    return {
        "moe_token_dispatcher_type='alltoall'": language.moe_token_dispatcher_type == "alltoall",
        "moe_expert_capacity_factor and moe_pad_expert_input_to_capacity=True, since the host waits for how many rows "
        "are routed to each expert": (
            language.moe_expert_capacity_factor is not None and language.moe_pad_expert_input_to_capacity
        ),
    }


#: Settings that a layer may look up in every pass, such as the weights of experts' losses.
_PLAIN = (bool, int, float, str, list, tuple)
#: Replays of "delayed" gave other losses than eager steps do; further recipes were not tried.
FP8_RECIPES = ("tensorwise", "blockwise")


class WholeSteps:
    """Runs training steps, by a graph where there is one for their shape.

    Args:
        settings: what is captured.
        captures: where.
        models: this rank's chunks.
        forward_step: reads microbatches and hands them to the schedule.
        gradients: whose largest is looked at when a step has run; None where nobody does.
        run: whose ranks run a step alike.

    Raises:
        ValueError: the process has two cuDNN; or, on every rank, items of a modality with a bucket see one another.
    """

    def __init__(
        self,
        settings: StepGraphs,
        captures: Captures,
        models: Sequence[MimoModel],
        forward_step: ForwardStep,
        gradients: Gradients | None,
        run: Run,
    ) -> None:
        self._settings, self._captures, self._models, self._run = settings, captures, models, run
        self._forward_step, self._gradients = forward_step, gradients
        self._brought: dict[Hashable, list] = {}
        self._granted: list[tuple] = []
        check_one_cudnn("graphs")
        raise_together(error_of(lambda: _check_buckets(settings.buckets, models)), run.hosts.world)

    @property
    def counts(self) -> GraphCounts:
        """How steps ran."""
        return self._captures.counts

    def __call__(
        self, batches: Sequence[Batch], schedule: Callable[[], list[dict[str, Tensor]]]
    ) -> list[dict[str, Tensor]]:
        """What the schedule gives for a step.

        Args:
            batches: the step's microbatches on the CPU, on rank 0 of the tensor-parallel group.
            schedule: runs over microbatches that the forward step was given.

        Raises:
            ValueError: a bad batch.
        """
        read = [
            ChunkStep.read([self._fitted(batch, model) for batch in batches], model, self._forward_step)
            for model in self._models
        ]
        if (granted := self._taken_for_granted()) != self._granted:
            self._captures.drop()  # of weights, settings or losses of before: none can serve again
            self._brought.clear()
            self._granted = granted
        key: Hashable | None = tuple(chunk.key for chunk in read)
        if not all(chunk.captured for chunk in read):
            key = None
        brought = self._brought[key] if self._captures.captured(key) else [()] * read[0].microbatches
        graph = self._together(self._captures.ready(key), error_of(lambda: read[0].recheck(brought)))
        numbers = [len(chunk.inputs) for chunk in read]

        def run(inputs: Sequence[Tensor]) -> tuple[list[dict[str, Tensor]], Tensor | None, auxiliary.Reports]:
            rest, given = iter(inputs), {}
            for chunk, number in zip(read, numbers, strict=True):
                own = [*islice(rest, number)]
                given[chunk.model.vp_stage] = chunk.ahead(own)
                chunk.scale_mtp(own)
            with self._forward_step.given(given), self._recording() as self._brought[key]:
                logged = schedule()
            largest = None if self._gradients is None else self._gradients.largest
            return logged, largest, auxiliary.reports()

        inputs = [tensor for chunk in read for tensor in chunk.inputs]
        logged, largest, reports = self._captures(key, inputs, run, graph)
        if self._gradients is not None:
            self._gradients.largest = largest
        auxiliary.report_again(reports)
        if not self._captures.captured(key):
            del self._brought[key]
        return logged

    def _fitted(self, batch: Batch, model: MimoModel) -> Batch:
        """The batch, on the CPU, in shapes that others of its kind have too, for the stage of `model`."""
        settings = self._settings
        batch = with_packs_alike(batch, settings.packed_sequences, model)
        if settings.buckets and model.pre_process:
            batch = in_buckets(batch, settings.buckets, model)
        if settings.label_rows is not None and model.post_process:
            batch = with_label_rows(batch, settings.label_rows, model)
        return batch

    def _taken_for_granted(self) -> list[tuple]:
        """What captures have of the models: weights, buffers, the weights of losses, the language model's settings."""
        return [
            (
                places_of(model),
                tuple(self._forward_step.weights(model).items()),
                _plain_settings(model.language_model.config),
            )
            for model in self._models
        ]

    def _together(self, ready: bool, error: Exception | None) -> bool:
        """Whether all ranks run the step by a graph, as where each is ready. Raises what any of them found."""
        waits, failed = agreed([not ready, error is not None], self._run)
        if failed:
            raise_together(error, self._run.hosts.world)
        return not waits

    @contextmanager
    def _recording(self) -> Iterator[list]:
        """Within it, batches count as checked, as the reader does for a GPU; gives what the first chunk encodes."""
        on_host = next(self._models[0].parameters()).device.type != "cpu"
        with ExitStack() as stack:
            brought = [stack.enter_context(model.checks.recording(settled=on_host)) for model in self._models]
            yield brought[0]


def whole_steps(
    settings: StepGraphs | None,
    captures: Captures | None,
    models: Sequence[MimoModel],
    forward_step: ForwardStep,
    gradients: Gradients,
    run: Run,
) -> WholeSteps | None:
    """What runs training steps by CUDA graphs, as `WholeSteps` takes it; None without captures."""
    if captures is None:
        return None
    return WholeSteps(settings or StepGraphs(), captures, models, forward_step, gradients, run)


def _plain_settings(config: TransformerConfig) -> dict[str, str]:
    """Settings as they are now, also those in lists, which may be changed in place."""
    return {name: repr(value) for name, value in vars(config).items() if isinstance(value, _PLAIN)}


def _check_buckets(buckets: Mapping[str, int], models: Sequence[MimoModel]) -> None:
    """Refuses buckets of encoders whose items see one another; the first stage alone has encoders."""
    for modality, first in product(buckets, (model for model in models if model.pre_process)):
        for name, module in first.modality_submodules[modality].named_modules():
            if getattr(module, "track_running_stats", False) and module.training:
                raise ValueError(
                    f"graphs: buckets has {modality!r}, whose {name} ({type(module).__name__}) takes statistics over "
                    "all items: those that fill a bucket would be among them. Leave the modality out of buckets."
                )


def _moves_registered_memory() -> bool:
    """Whether torch's allocator grows segments that NCCL registers with a graph, which Megatron refuses for its own."""
    settings = [os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")]
    return any("expandable_segments:True" in each for each in settings) and os.environ.get("NCCL_GRAPH_REGISTER") != "0"


def _check_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"graphs: CUDA graphs need a GPU, found a run on {device}. Leave graphs out (and "
            "cuda_graph_impl='full_iteration')."
        )
