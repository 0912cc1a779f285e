"""A small training loop on Megatron's parts, for a laptop, a notebook or a few GPUs.

The same few lines train on every layout: one process, tensor, sequence, pipeline, context, expert and
data parallelism. For long runs on many machines there is `megatron.training.pretrain`
(`examples/pretrain_mimo.py`), which uses the same forward step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.compat.megatron import release_graphs_of_experts
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.progress import State
from megatron_mimo.data.step import Counts
from megatron_mimo.launch import Run, exit_on_error
from megatron_mimo.layout import check_layout
from megatron_mimo.modality.marks import check_orthogonalized
from megatron_mimo.moved import names_of
from megatron_mimo.pretrained import Source
from megatron_mimo.training import auxiliary
from megatron_mimo.training.agreement import agree_on_microbatches, agreed, error_of, shared
from megatron_mimo.training.best import EARLY, KEPT, check_term, compared
from megatron_mimo.training.checkpointed import Checkpointed
from megatron_mimo.training.checkpoints.directories import CheckpointSettings, newest_first
from megatron_mimo.training.checkpoints.trained import Trained
from megatron_mimo.training.checkpoints.writing import Saver
from megatron_mimo.training.chunks import (
    build_chunks,
    hook_schedule,
    parameters_gathered,
    wrap_chunks,
)
from megatron_mimo.training.course import schedule_of, with_precision_of
from megatron_mimo.training.ema import Ema
from megatron_mimo.training.finite import Found, Gradients, look, refuse
from megatron_mimo.training.forward import ForwardStep
from megatron_mimo.training.hooks import Began, Callback, FurtherLoss, Told, check_hooks
from megatron_mimo.training.masters import Masters
from megatron_mimo.training.memory import check_memory
from megatron_mimo.training.norms import norms_of
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.parts.whole_step import StepGraphs, captures_of, whole_steps
from megatron_mimo.training.progress import Progress
from megatron_mimo.training.settings import History, StepReport, TrainerSettings, due
from megatron_mimo.training.showing import Samples
from megatron_mimo.training.sources import DataSource, Reader
from megatron_mimo.training.speed.counts import LOSS
from megatron_mimo.training.stop import Pace, StopRequest
from megatron_mimo.training.watch import BETWEEN, COMPUTING, EVALUATING, READING, REDUCING, STEPPING, Stages, Watch

#: `(step, rank, size) -> microbatches`: what one of `size` data-parallel ranks trains on in a step. A
#: pure function: every pipeline stage asks for itself, and a resumed run asks again. Each microbatch
#: holds keyword arguments of `MimoModel.forward`, on the CPU.
StepData = Callable[[int, int, int], Sequence[Batch]]


class Trainer(Checkpointed):
    """A model with its optimizer, on the layout of a run.

    Args:
        config: of the model. Under pipeline parallelism its `transformer_layer_spec` is a function, such
            as `specs.language_layer_spec`, because each stage has layers of its own.
        run: from `megatron_mimo.initialize`.
        settings: how long and how often.
        optimizer: Megatron's options: kind, learning rate, weight decay, clipping, the distributed
            optimizer. `bf16`, `fp16` and `params_dtype` follow the model's configuration.
        ddp: Megatron's options of the gradient reduction.
        control: which parts train, and how fast.
        checkpoints: whether they are written in the background, and which are kept.
        pretrained: what the weights begin from, as `megatron_mimo.load_pretrained` takes it: a directory or a name on
            the hub, or part -> one of these. Parts that it has not begin fresh.
        samples: prompts that the model answers at every evaluation.
        callbacks: what is told of each step and evaluation, such as loggers.
        further_losses: added to those of the model.
        graphs: replay each step as one CUDA graph; None does so where `cuda_graph_impl` is "full_iteration".

    Raises:
        FileNotFoundError, ConnectionError: as `load_pretrained`.
        ValueError: a layout that cannot work, or options that contradict each other.

    Example:
        >>> run = megatron_mimo.initialize()                                      # doctest: +SKIP
        >>> trainer = Trainer(config, run, TrainerSettings(steps=100))            # doctest: +SKIP
        >>> history = trainer.train(lambda step, rank, size: [batch])             # doctest: +SKIP
    """

    def __init__(
        self,
        config: MimoModelConfig,
        run: Run,
        settings: TrainerSettings,
        *,
        optimizer: OptimizerConfig | None = None,
        ddp: DistributedDataParallelConfig | None = None,
        control: TrainingControl | None = None,
        checkpoints: CheckpointSettings | None = None,
        pretrained: Source | None = None,
        samples: Samples | None = None,
        callbacks: Sequence[Callback] = (),
        further_losses: Sequence[FurtherLoss] = (),
        graphs: StepGraphs | None = None,
    ) -> None:
        self.samples = samples
        self.run, self.settings, self.control = run, settings, control or TrainingControl()
        ddp, optimizer = ddp or DistributedDataParallelConfig(), optimizer or OptimizerConfig(lr=1e-3)
        check_memory({**vars(ddp), **vars(optimizer)})
        check_layout(run.layout, config)
        check_hooks(callbacks, further_losses, list(config.modality_submodules))
        self._best = compared(settings.early_stopping, checkpoints)
        for option, best in self._best.items():
            check_term(option, best.term, config, [each.name for each in further_losses])
        self.control.check(config)
        captures = captures_of(graphs, config, run, ddp, self.control)
        self.models = build_chunks(config, run, self.control, pretrained)
        optimizer = with_precision_of(self.models[0], optimizer, ddp)
        for model in self.models:
            check_orthogonalized(model.modality_submodules, model.config, optimizer.optimizer)
        with nullcontext() if captures is None else captures.stream():  # DDP's hooks remember it
            self.chunks = wrap_chunks(self.models, run, ddp, self.control)
        self.optimizer = get_megatron_optimizer(
            optimizer,
            self.chunks,
            config_overrides=self.control.overrides(optimizer, config),
            use_gloo_process_groups=False,
            pg_collection=run.groups,
        )
        self._masters = Masters(self.models, self.optimizer)
        self.schedule = schedule_of(self.optimizer, optimizer, settings)
        self._gradients = Gradients(self.chunks, self.control.finalize_func())
        self.steps_done = 0
        self._microbatches = 1
        self._forward_step = ForwardStep(
            microbatches=lambda: self._microbatches,
            step=lambda: self.steps_done,
            seed=settings.seed,
            on_step=self._keep_counts,
            further_losses=further_losses,
            sources=lambda: self._source_names,
            hosts=run.hosts,
        )
        self._source_names: Sequence[str] = ()
        self._told, self._stages = Told(callbacks), Stages()
        self.ema = None if settings.ema_decay is None else Ema(self.models, settings.ema_decay)
        #: Runs training steps by CUDA graphs, and counts how they ran; None without.
        self.graphs = whole_steps(graphs, captures, self.models, self._forward_step, self._gradients, run)
        self._counts: Counts = {}
        self._saver, self._pace = Saver(checkpoints), Pace()
        self._trained = Trained.by(self.control, config, optimizer.use_distributed_optimizer)
        self._reader: Reader | None = None
        self._data_state: State | None = None  # of the checkpoint, until a source takes it

    def train(self, data: StepData | DataSource, evaluation: StepData | None = None) -> History:
        """Trains to `settings.steps`, from where the trainer stands.

        On several ranks an exception on one of them ends the job at once, and a SIGTERM to one
        saves a checkpoint (where there is a directory) at the end of the current step. With `keep_best` an evaluation
        that is the best so far is saved too. A step that does not end within
        `settings.stop_grace_s` of it ends the process with status 1, which prints in which collective it was.

        Args:
            data: to train on: a function of the step, or a source such as `PackSource`, which is read on one rank of
                each data-parallel rank and goes on where the loaded checkpoint's was.
            evaluation: to evaluate on, every `settings.evaluate_every` steps and after the last one; asked for
                steps `0 .. settings.evaluation_steps - 1`.

        Raises:
            ValueError: `settings.evaluate_every` without data to evaluate on.
        """
        if evaluation is None and self.settings.evaluate_every is not None:
            raise ValueError(
                f"evaluate_every is {self.settings.evaluate_every}, but train() got no evaluation data. Give "
                "train(data, evaluation), or leave evaluate_every out."
            )
        run, settings, history, data = self.run, self.settings, History(), self._step_data(data)
        history.ended_early = self._patience_is_over()
        shown = settings.progress and self.run.rank == self.run.world_size - 1
        asked = StopRequest(
            group=run.hosts.world, pace=self._pace, grace_s=settings.stop_grace_s, saving=lambda: self._saver.writing
        )
        self._stages.step = self.steps_done
        watch = Watch(self.run, self._stages, self._pace, settings.stall_s)
        began = Began(self.steps_done, settings.steps, writes=self.run.rank == 0)
        with (
            exit_on_error(),
            asked as stop,
            Progress(settings.steps, shown) as bar,
            self._told.of(began) as told,
            watch,
        ):
            while self.steps_done < settings.steps and not history.stopped and not history.ended_early:
                report = self.train_step(data)
                history.steps.append(report)
                bar.show(self.steps_done, report.losses, report.seconds)
                told.trained(report)
                ended, best = self.steps_done == settings.steps, False
                if evaluation is not None and (ended or due(self.steps_done, settings.evaluate_every)):
                    losses = history.evaluations[self.steps_done] = self.evaluate(evaluation)
                    told.evaluated(self.steps_done, losses)
                    best, history.ended_early = self._compare(losses)
                    if self.samples is not None:
                        began_at = time.perf_counter()
                        self.samples.take(self.generate, self.steps_done, self.run)
                        self._pace.ended(time.perf_counter() - began_at)
                history.stopped = stop.received()
                if ended or history.stopped or history.ended_early:
                    self.save(losses=history.evaluations.get(self.steps_done))
                elif best or due(self.steps_done, settings.save_every):
                    background = self._saver.settings.background
                    self.save(background=background, losses=history.evaluations.get(self.steps_done))
                else:
                    self._saver.poll()
        return history

    def train_step(self, data: StepData) -> StepReport:
        """One optimizer step on `data` of step `steps_done`. Collective over all ranks.

        Raises:
            FloatingPointError: on every rank, naming step and ranks, where a loss or (but for fp16, whose loss scale
                follows) a gradient is NaN or infinite. No weight and no optimizer state has changed then.
            ValueError: on every rank, where one of them found a half-precision weight changed by other means than
                `load_state_dict` (see `sync_weights`), or ranks that wait for each other have other microbatches.
        """
        started = time.perf_counter()
        if self.ema is not None:
            self.ema.start()
        changed = error_of(self._masters.follow)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        logged = self._run(data, self.steps_done, forward_only=False, error=changed)
        learned = sum(count for (kind, *_), count in self._counts.items() if kind == LOSS)
        self._stages.enter(STEPPING)
        found = look(logged, self.run, self._gradients.largest, learned)
        self._check_finite(found, logged)
        wanted = self.settings.part_norms and found.learns
        norms = norms_of(self.chunks, self.optimizer, self.run.groups) if wanted else {}
        succeeded, norm, _ = self.optimizer.step() if found.learns else (False, None, None)
        losses, norm, succeeded = shared(found.losses, norm, succeeded, self._counts, self.run)
        losses |= auxiliary.reported(self.models[0].config, self.run, self._microbatches)
        learning_rate = self.schedule.get_lr({})  # of a group that says nothing of its own
        if succeeded:
            self.schedule.step(increment=1)
            if self.ema is not None:
                with parameters_gathered(self.chunks, self.optimizer):
                    self.ema.update()
        self.steps_done += 1
        self._stages.step = self.steps_done
        self._stages.enter(BETWEEN)
        seconds = time.perf_counter() - started
        self._pace.ended(seconds)
        return StepReport(self.steps_done - 1, losses, learning_rate, norm, not succeeded, seconds, norms)

    @torch.no_grad()
    def evaluate(self, data: StepData) -> dict[str, float]:
        """Mean of every term over steps `0 .. settings.evaluation_steps - 1` of `data`, and the weighted loss.

        Collective over all ranks.
        """
        with parameters_gathered(self.chunks, self.optimizer):
            for chunk in self.chunks:
                chunk.eval()
            self._forward_step.start_evaluation()
            logged = []
            for step in range(self.settings.evaluation_steps):
                logged += self._run(data, step, forward_only=True)
                self._pace.ended()
            for chunk in self.chunks:
                chunk.train()
        losses, _, _ = shared(look(logged, self.run).losses, None, True, {}, self.run)
        weights = self._forward_step.weights(self.models[-1])
        weighted = {name: weights.get(name.partition("/")[0], 1.0) * mean for name, mean in losses.items()}
        return losses | {"loss": sum(weighted.values())}

    def generate(
        self, prompts: Sequence, max_new_tokens: int | Sequence[int] = 128, *, ema: bool = False, **options: Any
    ) -> Any:
        """What the model answers to each prompt between two steps: `MimoModel.generate` with whole weights.

        Collective over all ranks; data-parallel ranks bring prompts of their own, or none.

        Args:
            prompts, max_new_tokens, options: as `MimoModel.generate` takes them.
            ema: answer with the averages of the weights.

        Raises:
            ValueError: as `MimoModel.generate` and `ema_weights`, and `stream`: weights would be scattered before it
                ends.
        """
        if options.get("stream"):
            raise ValueError("Trainer.generate: expected stream=False, found True: answers come whole")
        with self.ema_weights() if ema else parameters_gathered(self.chunks, self.optimizer):
            return self.models[0].generate(prompts, max_new_tokens, **options) if len(prompts) else []

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within it the model has the averages of its weights, to evaluate, generate or export; it must not train.

        Collective over all ranks with `overlap_param_gather`.

        Raises:
            ValueError: there are none (`TrainerSettings.ema_decay`).

        Example:
            >>> with trainer.ema_weights():                                       # doctest: +SKIP
            ...     megatron_mimo.save_pretrained(trainer.models, "out")
        """
        if self.ema is None:
            raise ValueError("ema_weights: the run averages no weights, expected TrainerSettings(ema_decay=...)")
        with parameters_gathered(self.chunks, self.optimizer), self.ema.in_place():
            yield

    # Below: what a step needs ---------------------------------------------------------------

    def _step_data(self, data: StepData | DataSource) -> StepData:
        """What a step asks for its microbatches. A source begins where the loaded checkpoint's was."""
        self._source_names = data.source_names if isinstance(data, DataSource) else ()
        if not isinstance(data, DataSource):
            self._reader = None
            return data
        if self._data_state is not None:
            data.load_state_dict(self._data_state)
            self._data_state = None
        self._reader = Reader(data, self.run)
        return self._reader

    def _run(
        self, data: StepData, step: int, *, forward_only: bool, error: Exception | None = None
    ) -> list[dict[str, Tensor]]:
        """Runs the schedule over a step's microbatches; gives their reports on the last stage.

        An `error` of this rank before the step is raised on all of them.
        """
        reads = self.run.groups.tp.rank() == 0
        self._stages.enter(READING)
        batches = data(step, self.run.data_rank, self.run.layout.data_parallel_size) if reads else ()
        self._stages.enter(EVALUATING if forward_only else BETWEEN)
        self._microbatches, (batch_size, length) = agree_on_microbatches(
            batches, error, self.run, self.models[0].config
        )
        auxiliary.start_step(self.models[0].config)
        hook_schedule(self.chunks, self.optimizer.scale_loss, self._finalize)
        self._stages.enter(EVALUATING if forward_only else COMPUTING)
        schedule = partial(
            get_forward_backward_func(),
            forward_step_func=self._forward_step,
            # Every chunk of an interleaved pipeline goes through the same batches.
            data_iterator=[iter(batches) for _ in self.chunks] if len(self.chunks) > 1 else iter(batches),
            model=self.chunks,
            num_microbatches=self._microbatches,
            seq_length=length,
            micro_batch_size=batch_size,
            forward_only=forward_only,
        )
        logged = schedule() if self.graphs is None or forward_only else self.graphs(batches, schedule)
        if self.models[0].config.num_moe_experts is not None:
            release_graphs_of_experts(module for model in self.models for module in model.modules())
        return logged

    def _compare(self, losses: Mapping[str, float]) -> tuple[bool, bool]:
        """Whether an evaluation is the best so far and shall be kept, and whether patience is over; on all ranks."""
        found = {name: best.take(self.steps_done, losses) for name, best in self._best.items()}
        best, over = agreed([found.get(KEPT, False), self._patience_is_over()], self.run)
        return best, over

    def _patience_is_over(self) -> bool:
        early = self.settings.early_stopping
        return early is not None and self._best[EARLY].waited >= early.patience

    def _finalize(self, *given: Any, **named: Any) -> Any:
        self._stages.enter(REDUCING)
        return self._gradients.finalize(*given, **named)

    def _keep_counts(self, step: int, counts: Counts) -> None:
        self._counts = counts

    def _check_finite(self, found: Found, logged: list[dict[str, Tensor]]) -> None:
        """Ends the step on every rank before the optimizer runs, where a loss or a gradient is not finite."""
        # With fp16 a gradient that overflows is an everyday matter, which lowers the loss scale.
        if found.bad_losses or (found.bad_gradients and not self.optimizer.config.fp16):
            self._saver.wait()  # what is being written is the last good checkpoint
            newest = next(iter(newest_first(Path(self.settings.directory))), None) if self.settings.directory else None
            refuse(found, logged, self._gradients, self.steps_done, newest)


__getattr__ = names_of(__name__)
