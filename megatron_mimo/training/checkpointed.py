"""What a `Trainer` writes to checkpoints and reads of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mimo.data.progress import State
from megatron_mimo.launch import Run
from megatron_mimo.model import MimoModel
from megatron_mimo.training.agreement import agree, error_of
from megatron_mimo.training.best import Best
from megatron_mimo.training.checkpoints import saving
from megatron_mimo.training.checkpoints.parts import LoadReport, load_parts
from megatron_mimo.training.checkpoints.trained import Trained
from megatron_mimo.training.checkpoints.writing import Saver
from megatron_mimo.training.chunks import parameters_gathered
from megatron_mimo.training.ema import Ema
from megatron_mimo.training.finite import check_weights
from megatron_mimo.training.masters import Masters
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.settings import TrainerSettings
from megatron_mimo.training.sources import Reader
from megatron_mimo.training.stop import Pace
from megatron_mimo.training.watch import BETWEEN, SAVING, Stages


class Checkpointed:
    """The half of a `Trainer` that saves and loads.

    Attributes:
        run, settings: of the trainer.
        models, chunks: this rank's, bare and as Megatron wraps them.
        optimizer, schedule: of their parameters.
        steps_done: that the run has behind it.
    """

    run: Run
    settings: TrainerSettings
    models: list[MimoModel]
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    steps_done: int
    _best: dict[str, Best]
    _masters: Masters
    _saver: Saver
    _trained: Trained
    _stages: Stages
    _pace: Pace
    ema: Ema | None
    _reader: Reader | None
    _data_state: State | None

    def save(self, *, background: bool = False, losses: Mapping[str, float] | None = None) -> Path | None:
        """Writes a checkpoint of this moment to `settings.directory` and gives its path; None without one. Collective.

        Args:
            background: write while the run goes on, for the same layout but for data parallelism; otherwise for any.
            losses: of an evaluation at this step, by which the best checkpoint is known.

        Raises:
            FloatingPointError: on every rank, where a weight that trains is NaN or infinite.
            OSError: on every rank, where one of them could not write. The checkpoints before it stay.
        """
        if (directory := self.settings.directory) is None:
            return None
        self._stages.enter(SAVING)
        agree(error_of(self._masters.follow), self.run)
        with parameters_gathered(self.chunks, self.optimizer):
            agree(error_of(lambda: check_weights(self.models)), self.run)
            path = saving.save(
                Path(directory), self.steps_done, self.models, self.optimizer, self.schedule, self.run, self._trained,
                self._reader.state() if self._reader is not None else self._data_state,
                saver=self._saver, background=background, losses=losses,
                evaluations={name: best.state_dict() for name, best in self._best.items()}, ema=self.ema,
            )  # fmt: skip
        self._stages.enter(BETWEEN)
        self._pace.ended()
        return path

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
            if self.ema is not None:
                self.ema.restart()
        elif (loaded := saving.load(path, *own, directory=self.settings.directory, ema=self.ema)) is not None:
            self.steps_done, self._reader, self._data_state = loaded.step, None, loaded.data
            for name, best in self._best.items():
                best.load_state_dict(loaded.evaluations.get(name, {}))
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

    def load_parts(self, path: Path | str, parts: Sequence[str] | None = None, *, ema: bool = False) -> LoadReport:
        """Reads the weights that a checkpoint has of this model, and gives what became of each.

        Such as a language model's into a model of several modalities. Optimizer and step stay. Collective.

        Args:
            path: of a checkpoint, of this loop, of Megatron's, or of a language model that was trained by itself.
            parts: to load, as `TrainingControl` names them; None for all that there are.
            ema: the averages of weights that have one there (`TrainerSettings.ema_decay`), in their place.

        Raises:
            FileNotFoundError: there is no checkpoint at `path`.
            ValueError: a part that the model does not have; a checkpoint that is not whole or would run something; a
                weight of another size; none of these parts. Nothing has changed then.

        Example:
            >>> print(trainer.load_parts("pretrained/iter_0001000", ["language_model"]))    # doctest: +SKIP
        """
        config = self.models[0].mimo_config
        chosen = None if parts is None else TrainingControl(frozen=parts).frozen_prefixes(config)
        report = load_parts(Path(path), self.models, chosen, ema=ema)
        if self.ema is not None:
            self.ema.restart()
        self._masters.sync()
        return report
