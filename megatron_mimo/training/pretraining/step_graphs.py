"""Steps of Megatron's loop as one CUDA graph each, where --cuda-graph-impl is full_iteration.

Megatron's own wrapper copies what an iterator gives into static buffers: it knows one shape, and neither placements nor
prepared targets. In its place stands what `Trainer(graphs=...)` replays by.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.utils import unwrap_model

from megatron_mimo.axes import Layout
from megatron_mimo.batch import Batch
from megatron_mimo.compat.megatron_training import full_iteration_stream
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.run import run_over_megatrons_groups
from megatron_mimo.training.forward import ForwardStep
from megatron_mimo.training.parts.captured import Captures, GraphCounts
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.parts.whole_step import StepGraphs, WholeSteps

FULL_ITERATION = "full_iteration"
_NO_HOOKS = "a replay calls no hook that could look into a pass"
#: Field of `StepGraphs` -> the argument that gives it.
_ARGUMENTS = {
    "buckets": "--cuda-graph-buckets ",
    "label_rows": "--cuda-graph-label-rows",
    "packed_sequences": "--cuda-graph-packed-sequences",
    "warmup": "--cuda-graph-warmup-steps",
}
#: Arguments of Megatron's -> why not.
NOT_BESIDE = {
    "save_activations_interval": _NO_HOOKS,
    "save_dgrads_interval": _NO_HOOKS,
    "save_tokens_per_expert_interval": _NO_HOOKS,
    "save_wgrads_interval": _NO_HOOKS,
    "timing_log_level": "its timers wait for the device within the step, which no capture can",
    "optimizer_cuda_graph": "it was not tried beside another graph",
}


def step_graphs_from_args(args: Namespace) -> StepGraphs | None:
    """What the command line says of steps as one CUDA graph; None where it asks for none.

    Raises:
        ValueError: an argument without effect, or one that would look into a replay.
    """
    buckets, rows, sequences = (
        dict(args.cuda_graph_buckets), args.cuda_graph_label_rows, args.cuda_graph_packed_sequences
    )  # fmt: skip
    if args.cuda_graph_impl != FULL_ITERATION:
        if buckets or (rows, sequences) != (None, None):
            raise ValueError(
                "--cuda-graph-buckets, --cuda-graph-label-rows and --cuda-graph-packed-sequences shape steps for their "
                f"CUDA graph, found --cuda-graph-impl {args.cuda_graph_impl}. Give --cuda-graph-impl {FULL_ITERATION}, "
                "or leave them out."
            )
        return None
    for name, why in NOT_BESIDE.items():
        if value := getattr(args, name, None):
            given = "" if value is True else f" {value}"
            raise ValueError(
                f"--{name.replace('_', '-')}{given} with --cuda-graph-impl {FULL_ITERATION}: {why}. Leave one of the "
                "two out."
            )
    more = {} if sequences is None else {"packed_sequences": sequences}
    try:
        return StepGraphs(buckets, rows, warmup=args.cuda_graph_warmup_steps, **more)
    except ValueError as error:
        said = str(error)
        for name, argument in _ARGUMENTS.items():
            said = said.replace(f"StepGraphs: {name}", argument)
        raise ValueError(said) from error


def ready_for_step_graphs(args: Namespace, config: MimoModelConfig, layout: Layout, control: TrainingControl) -> None:
    """Refuses what a step as one graph cannot be right with, and has stages send without a wait of the host's.

    Of that wait Megatron has no argument. Nothing happens where the command line asks for no graphs.

    Raises:
        ValueError: as `step_graphs_from_args` and `StepGraphs.check`.
    """
    graphs = step_graphs_from_args(args)
    if graphs is None:
        return
    config.language_config.batch_p2p_sync = False
    ddp = DistributedDataParallelConfig(
        overlap_param_gather=args.overlap_param_gather,
        check_for_nan_in_grad=args.check_for_nan_in_loss_and_grad,
        check_for_large_grads=args.check_for_large_grads,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    graphs.check(config, layout, device, ddp, control, graph_safe_rng=True)  # Megatron sees to these numbers


@dataclass(frozen=True)
class FullIterations:
    """In place of Megatron's class `FullCudaGraphWrapper`.

    Args:
        steps_of: gives what runs the loop's schedules.
    """

    steps_of: Callable[[Callable[..., Any]], LoopSteps]

    def __call__(self, schedule: Callable[..., Any], **options: Any) -> LoopSteps:
        """What runs `schedule`; Megatron's options are what Megatron's own class would need."""
        return self.steps_of(schedule)


class LoopSteps:
    """Runs the loop's schedules, training steps by CUDA graphs.

    Args:
        schedule: Megatron's.
        args: Megatron's.
        layout: of the run.
        forward_step: of the run.
    """

    def __init__(
        self, schedule: Callable[..., Any], args: Namespace, layout: Layout, forward_step: ForwardStep
    ) -> None:
        self._schedule, self._args, self._layout, self._forward_step = schedule, args, layout, forward_step
        self._steps: WholeSteps | None = None

    @property
    def counts(self) -> GraphCounts:
        """How training steps ran."""
        return GraphCounts() if self._steps is None else self._steps.counts

    def __call__(
        self, *, data_iterator: Any, model: Any, num_microbatches: int, forward_only: bool, **named: Any
    ) -> list[Any]:
        """What the schedule gives, with its arguments.

        Raises:
            ValueError: a bad batch.
        """
        schedule = partial(
            self._schedule, model=model, num_microbatches=num_microbatches, forward_only=forward_only, **named
        )
        if forward_only:
            return schedule(data_iterator=data_iterator)
        chunks = model if isinstance(model, list) else [model]
        if self._steps is None:
            self._steps = self._made(chunks)
        self._forward_step.start_evaluation()  # the one that comes next
        of_chunks = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        # Every chunk goes through the same batches, by an iterator of its own, which has to move on.
        read = [_microbatches(iterator, num_microbatches) for iterator in of_chunks]
        return self._steps(read[0], partial(schedule, data_iterator=[iter(()) for _ in chunks]))

    def _made(self, chunks: list[Any]) -> WholeSteps:
        """What replays the steps of these chunks. Collective over all ranks."""
        args = self._args
        settings = step_graphs_from_args(args)
        assert settings is not None
        run = run_over_megatrons_groups(self._layout, args.seed, 60.0 * args.distributed_timeout_minutes)
        if run.device.type == "cuda" and not run.graph_safe_rng:
            raise ValueError(
                f"--cuda-graph-impl {FULL_ITERATION}: the process had random numbers before Megatron read its "
                "arguments, and they are not those of a CUDA graph. Train in a process of its own."
            )
        captures: Captures = Captures(settings.captures, settings.warmup, run.device, full_iteration_stream())
        return WholeSteps(settings, captures, unwrap_model(chunks), self._forward_step, None, run)


def _microbatches(iterator: Iterator[Batch] | None, number: int) -> list[Batch]:
    """A step's; none on ranks that read nothing."""
    return [] if iterator is None else [next(iterator) for _ in range(number)]
