"""Where a run's losses go: a line of JSON a step, and TensorBoard. A run that goes on leaves nothing twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.recipe import Loggers
from megatron_mimo.training import StepReport, Trainer
from megatron_mimo.training.trainer import StepData


class Logs:
    """The loggers of one stage.

    Args:
        directory: of the run.
        stage: its name.
        loggers: of the recipe.
        writes: whether this rank is the one that does.

    Attributes:
        board: of TensorBoard; None without one.

    Raises:
        Refused: TensorBoard is asked for and is not installed.
    """

    def __init__(self, directory: Path, stage: str, loggers: Loggers, *, writes: bool) -> None:
        self._file = directory / "log.jsonl" if loggers.lines and writes else None
        self._stage, self.board = stage, None
        if loggers.tensorboard and writes:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise Refused("loggers.tensorboard: pip install tensorboard, or leave it out") from error
            self.board = SummaryWriter(str(directory / "tensorboard" / stage))

    def goes_on_from(self, step: int) -> None:
        """Takes out what a run that was cut short wrote of this stage's steps after `step`."""
        if self._file is None or not self._file.exists():
            return
        kept = []
        for line in self._file.read_text("utf-8").splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # cut short itself
                continue
            if found["stage"] != self._stage or found["step"] <= step:
                kept.append(line)
        beside = self._file.with_name(f"writing_{self._file.name}")
        beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        beside.replace(self._file)

    def trained(self, report: StepReport) -> None:
        """A step's line: `step` counts those that are done."""
        beside = {"learning_rate": report.learning_rate, "gradient_norm": report.gradient_norm}
        self._write("train", report.step + 1, {**report.losses, **beside, "seconds": report.seconds})

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """An evaluation's line."""
        self._write("evaluation", step, losses)

    def close(self) -> None:
        """Writes what TensorBoard holds back."""
        if self.board is not None:
            self.board.close()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            line = json.dumps({"stage": self._stage, "kind": kind, "step": step, **values})
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        if self.board is not None:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(f"{kind}/{name}", value, step)


class LoggedTrainer(Trainer):
    """A trainer that tells `logs` of each step and each evaluation; otherwise as `Trainer`."""

    def __init__(self, *given: Any, logs: Logs, **named: Any) -> None:
        super().__init__(*given, **named)
        self._logs = logs

    def train_step(self, data: StepData) -> StepReport:
        """As `Trainer.train_step`."""
        report = super().train_step(data)
        self._logs.trained(report)
        return report

    def evaluate(self, data: StepData) -> dict[str, float]:
        """As `Trainer.evaluate`."""
        losses = super().evaluate(data)
        self._logs.evaluated(self.steps_done, losses)
        return losses
