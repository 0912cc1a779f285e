"""Loggers: lines of JSON, TensorBoard, Weights & Biases. Each is a `Callback`, for `Trainer` and for `pretrain`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mimo.data.written import write_whole
from megatron_mimo.training.hooks import Began, Callback
from megatron_mimo.training.settings import StepReport

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

Values = dict[str, float]


class Logger(Callback):
    """A callback that writes numbers on one rank. A subclass says how: `start`, `write`, `close`."""

    _writes = False

    def began(self, run: Began) -> None:
        self._writes = run.writes
        if run.writes:
            self.start(run)

    def trained(self, report: StepReport) -> None:
        if self._writes:
            self.write("train", report.step + 1, values_of(report))

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        if self._writes:
            self.write("evaluation", step, dict(losses))

    def ended(self) -> None:
        if self._writes:
            self._writes = False
            self.close()

    def start(self, run: Began) -> None:
        """Opens what is written to. What lies there of steps after `run.step` is of a run that was cut short."""

    def write(self, kind: str, step: int, values: Values) -> None:
        """Writes numbers.

        Args:
            kind: "train" or "evaluation".
            step: how many steps the run has behind it.
            values: by name.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Ends the writing."""


def values_of(report: StepReport) -> Values:
    """A step's losses, learning rate, gradient norms (where there are any) and seconds, by name."""
    values = {**report.losses, "learning_rate": report.learning_rate}
    if report.gradient_norm is not None:
        values["gradient_norm"] = report.gradient_norm
    values |= {f"gradient_norm/{part}": norm for part, norm in report.part_norms.items()}
    return {**values, "seconds": report.seconds}


class Lines(Logger):
    """A file with a line of JSON for each step and each evaluation: `{"kind": "train", "step": 1, "loss": 2.5, ...}`.

    A run that goes on takes the lines of later steps out first, so that each step is there once.

    Args:
        file: to append to; its directory is made.
        beside: what each line says besides, such as a stage's name; other lines are left as they are.

    Example:
        >>> trainer = Trainer(config, run, settings, callbacks=[Lines("run/log.jsonl")])    # doctest: +SKIP
    """

    def __init__(self, file: Path | str, beside: Mapping[str, str] | None = None) -> None:
        self._file, self._beside = Path(file), dict(beside or {})

    def start(self, run: Began) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            return
        kept = []
        for line in self._file.read_text("utf-8").splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # cut short itself
                continue
            if any(found.get(name) != value for name, value in self._beside.items()) or found["step"] <= run.step:
                kept.append(line)
        write_whole(self._file, "".join(f"{line}\n" for line in kept))

    def write(self, kind: str, step: int, values: Values) -> None:
        line = json.dumps({**self._beside, "kind": kind, "step": step, **values})
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


class TensorBoard(Logger):
    """Scalars `train/loss`, `evaluation/loss`, ... of TensorBoard.

    Args:
        directory: of its events.

    Raises:
        ImportError: it is not installed.

    Example:
        >>> trainer = Trainer(config, run, settings, callbacks=[TensorBoard("run/tensorboard")])    # doctest: +SKIP
    """

    def __init__(self, directory: Path | str) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("TensorBoard: pip install tensorboard") from error
        self._directory = Path(directory)
        self._board: SummaryWriter | None = None

    def start(self, run: Began) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what was written of this step and later ones.
        purge_step = run.step + 1 if run.step else None
        self._board = SummaryWriter(str(self._directory), purge_step=purge_step)

    def write(self, kind: str, step: int, values: Values) -> None:
        for name, value in values.items():
            self._running().add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._running().close()
        self._board = None

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """Shows a text; with the next two it is a board for `Samples`, while a run goes on, on the rank that writes."""
        self._running().add_text(tag, text_string, global_step)

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int) -> None:
        """Shows an image `[C, H, W]` in [0, 1]."""
        self._running().add_image(tag, img_tensor, global_step)

    def add_audio(self, tag: str, snd_tensor: Tensor, global_step: int, sample_rate: int) -> None:
        """Plays a clip `[1, L]` in [-1, 1]."""
        self._running().add_audio(tag, snd_tensor, global_step, sample_rate)

    def _running(self) -> SummaryWriter:
        if self._board is None:
            raise RuntimeError("TensorBoard: expected a run in progress on the rank that writes, found none")
        return self._board


class Wandb(Logger):
    """A run of Weights & Biases with `train/loss`, `evaluation/loss`, ... over `step`.

    Args:
        directory: below which wandb writes its files.
        project: that the run is of.
        mode: "offline" writes files alone, for `wandb sync`; "online" sends too.
        options: further arguments of `wandb.init`, such as `name`, `config`, or `id` with `resume="allow"`.

    Raises:
        ImportError: wandb is not installed.
        ValueError: a mode that is none of these.

    Example:
        >>> trainer = Trainer(config, run, settings, callbacks=[Wandb("run", "captions")])    # doctest: +SKIP
    """

    def __init__(
        self,
        directory: Path | str,
        project: str,
        mode: str = "offline",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"Wandb: expected the mode 'offline' or 'online', found {mode!r}")
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ImportError("Wandb: pip install 'megatron-mimo[wandb]'") from error
        self._directory, self._project, self._mode, self._options = Path(directory), project, mode, dict(options or {})
        self._run: Any = None

    def start(self, run: Began) -> None:
        import wandb

        self._directory.mkdir(parents=True, exist_ok=True)
        given = {"dir": str(self._directory), "project": self._project, "mode": self._mode, **self._options}
        self._run = wandb.init(**given)
        # wandb's own counter only rises; a run that goes on begins below it.
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Values) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()
