"""A small training loop on Megatron's parts, for a laptop, a notebook or a few GPUs.

The same few lines train on every layout: one process, tensor, sequence, pipeline, context, expert and
data parallelism. For long runs on many machines there is `megatron.training.pretrain`
(`examples/pretrain_mimo.py`), which uses the same forward step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mimo.batch import Batch
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.progress import State
from megatron_mimo.data.step import Counts
from megatron_mimo.launch import Run, exit_on_error
from megatron_mimo.layout import check_layout, check_sequence_length
from megatron_mimo.modality.marks import check_orthogonalized
from megatron_mimo.moved import names_of
from megatron_mimo.pretrained import Source
from megatron_mimo.training import auxiliary
from megatron_mimo.training.agreement import check_list, means
from megatron_mimo.training.checkpoints import saving
from megatron_mimo.training.checkpoints.directories import CheckpointSettings
from megatron_mimo.training.checkpoints.parts import LoadReport, load_parts
from megatron_mimo.training.checkpoints.writing import Saver
from megatron_mimo.training.chunks import (
    build_chunks,
    hook_schedule,
    parameters_gathered,
    wrap_chunks,
)
from megatron_mimo.training.course import schedule_of, with_precision_of
from megatron_mimo.training.forward import ForwardStep
from megatron_mimo.training.masters import Masters
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.progress import Progress
from megatron_mimo.training.settings import History, StepReport, TrainerSettings, due
from megatron_mimo.training.showing import Samples
from megatron_mimo.training.sources import DataSource, Reader
from megatron_mimo.training.speed.counts import term
from megatron_mimo.training.stop import StopRequest

#: `(step, rank, size) -> microbatches`: what one of `size` data-parallel ranks trains on in a step. A
#: pure function: every pipeline stage asks for itself, and a resumed run asks again. Each microbatch
#: holds keyword arguments of `MimoModel.forward`, on the CPU.
StepData = Callable[[int, int, int], Sequence[Batch]]


class Trainer:
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
    ) -> None:
        self.samples = samples
        self.run, self.settings, self.control = run, settings, control or TrainingControl()
        check_layout(run.layout, config)
        self.control.check(config)
        self.models = build_chunks(config, run, self.control, pretrained)
        ddp = ddp or DistributedDataParallelConfig()
        optimizer = with_precision_of(self.models[0], optimizer or OptimizerConfig(lr=1e-3), ddp)
        for model in self.models:
            check_orthogonalized(model.modality_submodules, model.config, optimizer.optimizer)
        self.chunks = wrap_chunks(self.models, run, ddp)
        self.optimizer = get_megatron_optimizer(
            optimizer,
            self.chunks,
            config_overrides=self.control.overrides(optimizer, config),
            use_gloo_process_groups=False,
            pg_collection=run.groups,
        )
        self._masters = Masters(self.models, self.optimizer)
        self.schedule = schedule_of(self.optimizer, optimizer, settings)
        hook_schedule(self.chunks, self.optimizer.scale_loss)
        self.steps_done = 0
        self._microbatches = 1
        self._forward_step = ForwardStep(
            microbatches=lambda: self._microbatches,
            step=lambda: self.steps_done,
            seed=settings.seed,
            on_step=self._keep_counts,
        )
        self._counts: Counts = {}
        self._saver = Saver(checkpoints)
        self._trained = saving.Trained.by(self.control, config, optimizer.use_distributed_optimizer)
        self._reader: Reader | None = None
        self._data_state: State | None = None  # of the checkpoint, until a source takes it

    def train(self, data: StepData | DataSource, evaluation: StepData | None = None) -> History:
        """Trains to `settings.steps`, from where the trainer stands.

        On several ranks an exception on one of them ends the job at once, and a SIGTERM to one
        saves a checkpoint (where there is a directory) at the end of the current step.

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
        settings, history, data = self.settings, History(), self._step_data(data)
        shown = settings.progress and self.run.rank == self.run.world_size - 1
        with exit_on_error(), StopRequest(self.run.device) as stop, Progress(settings.steps, shown) as bar:
            while self.steps_done < settings.steps and not history.stopped:
                report = self.train_step(data)
                history.steps.append(report)
                bar.show(self.steps_done, report.losses, report.seconds)
                ended = self.steps_done == settings.steps
                if evaluation is not None and (ended or due(self.steps_done, settings.evaluate_every)):
                    history.evaluations[self.steps_done] = self.evaluate(evaluation)
                    if self.samples is not None:
                        self.samples.take(self.generate, self.steps_done, self.run)
                history.stopped = stop.received()
                if ended or history.stopped:
                    self.save(losses=history.evaluations.get(self.steps_done))
                elif due(self.steps_done, settings.save_every):
                    background = self._saver.settings.background
                    self.save(background=background, losses=history.evaluations.get(self.steps_done))
                else:
                    self._saver.poll()
        return history

    def train_step(self, data: StepData) -> StepReport:
        """One optimizer step on `data` of step `steps_done`. Collective over all ranks.

        Raises:
            ValueError: a half-precision weight changed by other means than `load_state_dict`; see `sync_weights`.
        """
        started = time.perf_counter()
        self._masters.follow()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        auxiliary.start_step(self.models[0].config)
        logged = self._run(data, self.steps_done, forward_only=False)
        succeeded, norm, _ = self.optimizer.step()
        losses, norm, succeeded = self._agree(logged, norm, succeeded, self._counts)
        losses |= auxiliary.reported(self.models[0].config, self.run, self._microbatches)
        learning_rate = self.schedule.get_lr({})  # of a group that says nothing of its own
        if succeeded:
            self.schedule.step(increment=1)
        self.steps_done += 1
        seconds = time.perf_counter() - started
        return StepReport(self.steps_done - 1, losses, learning_rate, norm, not succeeded, seconds)

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
            for chunk in self.chunks:
                chunk.train()
        losses, _, _ = self._agree(logged, None, True, {})
        weights = self.models[-1].loss_weights
        weighted = {name: weights.get(name.partition("/")[0], 1.0) * mean for name, mean in losses.items()}
        return losses | {"loss": sum(weighted.values())}

    def generate(self, prompts: Sequence, max_new_tokens: int | Sequence[int] = 128, **options: Any) -> Any:
        """What the model answers to each prompt between two steps: `MimoModel.generate` with whole weights.

        Collective over all ranks; data-parallel ranks bring prompts of their own, or none.

        Raises:
            ValueError: as `MimoModel.generate`, and `stream`: weights would be scattered before it ends.
        """
        if options.get("stream"):
            raise ValueError("Trainer.generate: expected stream=False, found True: answers come whole")
        with parameters_gathered(self.chunks, self.optimizer):
            return self.models[0].generate(prompts, max_new_tokens, **options) if len(prompts) else []

    def save(self, *, background: bool = False, losses: Mapping[str, float] | None = None) -> Path | None:
        """Writes a checkpoint of this moment to `settings.directory` and gives its path; None without one. Collective.

        Args:
            background: write while the run goes on, for the same layout but for data parallelism; otherwise for any.
            losses: of an evaluation at this step, by which the best checkpoint is known.

        Raises:
            OSError: on every rank, where one of them could not write. The checkpoints before it stay.
        """
        if (directory := self.settings.directory) is None:
            return None
        self._masters.follow()
        with parameters_gathered(self.chunks, self.optimizer):
            return saving.save(
                Path(directory), self.steps_done, self.models, self.optimizer, self.schedule, self.run, self._trained,
                self._reader.state() if self._reader is not None else self._data_state,
                saver=self._saver, background=background, losses=losses,
            )  # fmt: skip

    def load(self, path: Path | str | None = None, *, weights_only: bool = False) -> int:
        """Goes on from a checkpoint, and gives the number of steps that the run has behind it.

        The learning rate follows this trainer's settings: with more `steps` a run goes on where one of
        that length would stand. Collective over all ranks.

        Args:
            path: of the checkpoint; None for the newest whole one in `settings.directory`, if there is any.
            weights_only: load the model's weights, and leave optimizer and step as they are: a run of its
                own begins with them, such as the second stage of a training whose first one froze parts.

        Raises:
            FileNotFoundError: there is no complete checkpoint at `path`.
            ValueError: loading it would run what the file says, it is not whole, or of another model. Or other
                parts or embedding rows trained in the checkpoint's run, or its `use_distributed_optimizer` was
                another, so its optimizer state is not this run's. Nothing has changed then.

        Example:
            >>> trainer.load("aligned/step_00001000", weights_only=True)              # doctest: +SKIP
        """
        self._saver.wait()
        own = (self.models, self.optimizer, self.schedule, self.run, self._trained)
        if weights_only:
            saving.load_weights(path, self.models, self.optimizer, self.run, directory=self.settings.directory)
        elif (loaded := saving.load(path, *own, directory=self.settings.directory)) is not None:
            self.steps_done, self._reader, self._data_state = loaded.step, None, loaded.data
        return self.steps_done

    def sync_weights(self) -> None:
        """Takes weights that other code changed into the optimizer's float32 copies (bf16 and fp16).

        `load_state_dict` of the model or of any module in it needs no call. Not collective: every rank that holds the
        weight changes it and calls this.

        Example:
            >>> trainer.models[0].language_model.output_layer.weight.data.mul_(0.5)   # doctest: +SKIP
            >>> trainer.sync_weights()                                                # doctest: +SKIP
        """
        self._masters.sync()

    def load_parts(self, path: Path | str, parts: Sequence[str] | None = None) -> LoadReport:
        """Reads the weights that a checkpoint has of this model, and gives what became of each.

        Such as a language model's into a model of several modalities. Optimizer and step stay. Collective.

        Args:
            path: of a checkpoint, of this loop, of Megatron's, or of a language model that was trained by itself.
            parts: to load, as `TrainingControl` names them; None for all that there are.

        Raises:
            FileNotFoundError: there is no checkpoint at `path`.
            ValueError: a part that the model does not have; a checkpoint that is not whole or would run something; a
                weight of another size; none of these parts. Nothing has changed then.

        Example:
            >>> print(trainer.load_parts("pretrained/iter_0001000", ["language_model"]))    # doctest: +SKIP
        """
        config = self.models[0].mimo_config
        chosen = None if parts is None else TrainingControl(frozen=parts).frozen_prefixes(config)
        report = load_parts(Path(path), self.models, chosen)
        self.optimizer.reload_model_params()  # its own float32 copies of half-precision weights
        return report

    # Below: what a step needs ---------------------------------------------------------------

    def _step_data(self, data: StepData | DataSource) -> StepData:
        """What a step asks for its microbatches. A source begins where the loaded checkpoint's was."""
        if not isinstance(data, DataSource):
            self._reader = None
            return data
        if self._data_state is not None:
            data.load_state_dict(self._data_state)
            self._data_state = None
        self._reader = Reader(data, self.run)
        return self._reader

    def _run(self, data: StepData, step: int, *, forward_only: bool) -> list[dict[str, Tensor]]:
        """Runs the schedule over a step's microbatches; gives their reports on the last stage."""
        reads = self.run.groups.tp.rank() == 0
        batches = data(step, self.run.data_rank, self.run.layout.data_parallel_size) if reads else ()
        check_list(batches)
        self._microbatches, (batch_size, length) = self._shape(batches)
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            # Every chunk of an interleaved pipeline goes through the same batches.
            data_iterator=[iter(batches) for _ in self.chunks] if len(self.chunks) > 1 else iter(batches),
            model=self.chunks,
            num_microbatches=self._microbatches,
            seq_length=length,
            micro_batch_size=batch_size,
            forward_only=forward_only,
        )

    def _shape(self, batches: Sequence[Batch]) -> tuple[int, tuple[int, int]]:
        """Number of microbatches and `(B, S)`, told by the rank that reads to its tensor-parallel group."""
        group = self.run.groups.tp
        shapes = [cast(tuple[int, int], tuple(batch["input_ids"].shape)) for batch in batches]
        if group.rank() == 0:
            self._check_shapes(shapes)
        message = [(len(shapes), shapes[0])] if shapes else [(0, (0, 0))]
        if group.size() > 1:
            dist.broadcast_object_list(message, group=group, group_src=0)
        return message[0]

    def _check_shapes(self, shapes: Sequence[tuple[int, int]]) -> None:
        if not shapes:
            raise ValueError("a step has no microbatch: the data must give at least one for every step")
        config = self.models[0].config
        one_shape = self.run.layout.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths
        if one_shape and len(set(shapes)) > 1:
            raise ValueError(
                f"microbatches of shapes {sorted(set(shapes))}: pipeline stages exchange hidden "
                "states of one shape. Pad them alike, or set TransformerConfig.variable_seq_lengths."
            )
        for _, length in set(shapes):
            check_sequence_length(length, self.run.layout, config)

    def _keep_counts(self, step: int, counts: Counts) -> None:
        self._counts = counts

    def _agree(
        self,
        logged: list[dict[str, Tensor]],
        norm: float | None,
        succeeded: bool,
        counts: Counts,
    ) -> tuple[dict[str, float], float | None, bool]:
        """Losses, gradient norm and success as all ranks shall know them.

        Terms that `counts`, those of the whole step, has nothing of are left out.
        """
        groups = self.run.groups
        losses = means(logged, groups.dp_cp) if logged else {}
        losses = {name: mean for name, mean in losses.items() if counts.get(term(name)) != 0}
        if groups.pp.size() > 1:
            message = [losses]
            dist.broadcast_object_list(message, group=groups.pp, group_src=groups.pp.size() - 1)
            losses = message[0]
        if groups.mp.size() > 1:
            # A stage where everything is frozen has no norm and cannot fail.
            stages: list = [None] * groups.mp.size()
            dist.all_gather_object(stages, (norm, bool(succeeded)), group=groups.mp)
            norm = max((one for one, _ in stages if one is not None), default=None)
            succeeded = all(one for _, one in stages)
        return losses, norm, bool(succeeded)


__getattr__ = names_of(__name__)
