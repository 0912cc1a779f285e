"""One run of Megatron's loop in this process: what its arguments ask for, and what its steps have in common."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.step import Counts
from megatron_mimo.graphs import end_graphs
from megatron_mimo.layout import check_layout
from megatron_mimo.modality.marks import check_orthogonalized
from megatron_mimo.model import MimoModel
from megatron_mimo.training.ema import Ema
from megatron_mimo.training.forward import ForwardStep
from megatron_mimo.training.hooks import Callback, FurtherLoss, Hooks, Told, check_hooks
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.pretraining.arguments import (
    ModelConfig,
    control_from_args,
    layout_from_args,
    with_loss_weights,
)
from megatron_mimo.training.pretraining.checks import check_comparing, check_in_effect, check_resumed, check_supported
from megatron_mimo.training.pretraining.packs import LoopData, check_data
from megatron_mimo.training.pretraining.step_graphs import LoopSteps, ready_for_step_graphs
from megatron_mimo.training.pretraining.telling import Telling
from megatron_mimo.training.speed.flops import PartSize, part_sizes
from megatron_mimo.training.speed.throughput import Throughput, log_to_megatron, peak_of_all


@dataclass(frozen=True)
class Asked:
    """What Megatron's arguments ask for, once nothing in them is refused.

    Attributes:
        model: of the whole model.
        control: which parts train, and how.
    """

    model: MimoModelConfig
    control: TrainingControl


class Session:
    """A run of Megatron's loop. `session_of` gives the one of this process.

    Args:
        args: Megatron's, one object for the whole run.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        #: Whether the run tells tokens/s, FLOPs and MFU.
        self.logs_throughput = False
        #: Where --data and what is evaluated are.
        self.data = LoopData(args)
        self._asked: tuple[ModelConfig, Asked] | None = None
        self._chunks: list[MimoModel] = []
        self._models: list[MimoModel] = []
        self._sizes: dict[str, PartSize] = {}
        self._counts: Counts = {}
        self._weights: Mapping[str, float] = {}
        self._steps: LoopSteps | None = None
        #: What takes part in the run.
        self.hooks = _hooks

    def ask(self, model_config: ModelConfig) -> Asked:
        """What the arguments ask for; checked the first time, later calls get the same.

        Args:
            model_config: gives the configuration for Megatron's arguments, as a recipe's does.

        Raises:
            ValueError: an argument that would be ignored, a layout that cannot work, a part or modality that the
                model does not have, or a checkpoint to go on from in whose run other parts trained.
        """
        if self._asked is None or self._asked[0] != model_config:
            check_in_effect(self.args, self.logs_throughput)
            check_supported(self.args)
            check_data(self.args)
            layout, control = layout_from_args(self.args), control_from_args(self.args)
            model = with_loss_weights(model_config(self.args), self.args)
            check_layout(layout, model, self.args.seq_length)
            control.check(model)
            check_resumed(self.args, control, model)
            check_comparing(self.args, model, [each.name for each in self._further_losses])
            ready_for_step_graphs(self.args, model, layout, control)
            check_hooks(self._callbacks, self._further_losses, list(model.modality_submodules))
            self._asked = model_config, Asked(model, control)
        return self._asked[1]

    def built(self, chunk: MimoModel) -> None:
        """Takes note of a model chunk of this rank; with the last one the sizes of all parts are known.

        Where throughput is logged, the last chunk's call is collective over the pipeline-parallel group.

        Raises:
            ValueError: an optimizer that would take a modality's attention apart by the language model's heads.
        """
        check_orthogonalized(chunk.modality_submodules, chunk.config, self.args.optimizer)
        self._weights = chunk.loss_weights
        self._chunks.append(chunk)
        self._models.append(chunk)
        if len(self._chunks) == (self.args.virtual_pipeline_model_parallel_size or 1):
            self._sizes = part_sizes(self._chunks) if self.logs_throughput else {}
            self._chunks = []

    @cached_property
    def forward_step(self) -> ForwardStep:
        """The run's forward step, which keeps its microbatches."""
        return ForwardStep(
            microbatches=get_num_microbatches,
            step=lambda: self.args.curr_iteration,
            seed=self.args.seed,
            on_step=self._keep_counts,
            further_losses=self._further_losses,
            sources=lambda: self.data.source_names,
            stages=self.telling.stages,
        )

    def steps_of(self, schedule: Callable[..., Any]) -> LoopSteps:
        """What runs training steps by CUDA graphs; the loop's, since an evaluation asks for one of its own."""
        if self._steps is None:
            self._steps = LoopSteps(schedule, self.args, layout_from_args(self.args), self.forward_step)
        return self._steps

    def tell_graphs(self) -> None:
        """Prints how training steps ran, where any were to be captured."""
        if self._steps is not None:
            from megatron.training import print_rank_0  # configures logging

            print_rank_0(f"training steps as one CUDA graph: {self._steps.counts.told}")

    @cached_property
    def telling(self) -> Telling:
        """Tells the run's callbacks."""
        weights = {each.name: each.weight for each in self._further_losses}
        return Telling(self.args, Told(self._callbacks), lambda: {**self._weights, **weights}, self.ema)

    @cached_property
    def ema(self) -> Ema | None:
        """Averages of the weights, with --ema-decay; asked for once the models are built."""
        return None if self.args.ema_decay is None else Ema(self._models, self.args.ema_decay)

    @cached_property
    def _callbacks(self) -> Sequence[Callback]:
        return [] if self.hooks.callbacks is None else list(self.hooks.callbacks(self.args))

    @cached_property
    def _further_losses(self) -> Sequence[FurtherLoss]:
        return [] if self.hooks.further_losses is None else list(self.hooks.further_losses(self.args))

    def stepped(self, seconds: float) -> None:
        """Takes note of how long a training step took; pipeline stages that count nothing keep silent."""
        if self._counts:
            self._throughput.add(self.args.curr_iteration + 1, self._counts, seconds)

    @cached_property
    def _throughput(self) -> Throughput:
        args = self.args
        peak = peak_of_all(args.world_size, args.bf16 or args.fp16, args.device_peak_tflops)
        return Throughput(self._sizes, peak, log_to_megatron(args), args.log_interval)

    def _keep_counts(self, step: int, counts: Counts) -> None:
        self._counts = counts


# Megatron keeps one set of arguments a process, and calls providers and forward step with nothing that tells the run.
_session: Session | None = None
_hooks = Hooks()


def use_hooks(hooks: Hooks) -> None:
    """What takes part in the run that begins."""
    global _hooks
    _hooks = hooks


def session_of(args: Namespace) -> Session:
    """The session of Megatron's arguments, of which a run has one object."""
    global _session
    if _session is None or _session.args is not args:
        _session = Session(args)
    return _session


def end_session() -> None:
    """Tells callbacks that the run ended, and forgets it, its model's configuration and its last microbatches."""
    global _session
    ended, _session = _session, None
    use_hooks(Hooks())
    end_graphs()
    if ended is not None:
        ended.tell_graphs()
    if ended is not None and "telling" in vars(ended):
        ended.telling.end()
