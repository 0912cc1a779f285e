"""Lines of JSON, TensorBoard and Weights & Biases."""

import json
import struct
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mimo.training import Began, Lines, Logger, StepReport, TensorBoard, Wandb


def report(step: int, loss: float, norm: float | None = 2.0) -> StepReport:
    return StepReport(step, {"loss": loss}, 0.1, norm, False, 0.5)


def tell(logger: Logger, *, first: int, last: int, factor: float, writes: bool = True) -> None:
    """A run of steps `first .. last - 1` whose loss is `factor` times the steps done, with an evaluation at its end."""
    logger.began(Began(first, last, writes))
    for step in range(first, last):
        logger.trained(report(step, factor * (step + 1)))
    logger.evaluated(last, {"loss": factor * last})
    logger.ended()


def test_lines_hold_each_step_once_though_a_run_was_cut_short_and_leave_other_stages(tmp_path: Path) -> None:
    file = tmp_path / "run" / "log.jsonl"
    tell(Lines(file, {"stage": "a"}), first=0, last=5, factor=9.0)
    tell(Lines(file, {"stage": "b"}), first=0, last=4, factor=1.0)
    with file.open("a") as broken:
        broken.write('{"stage": "b", "kind": "tr')
    tell(Lines(file, {"stage": "b"}), first=2, last=5, factor=10.0)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    told = [(one["stage"], one["step"], one["loss"]) for one in found if one["kind"] == "train"]
    assert told == [("a", n, 9.0 * n) for n in range(1, 6)] + [
        ("b", n, (1.0 if n <= 2 else 10.0) * n) for n in range(1, 6)
    ]
    assert [one["step"] for one in found if one["kind"] == "evaluation"] == [5, 5]
    assert found[0] == {
        "stage": "a", "kind": "train", "step": 1, "loss": 9.0, "learning_rate": 0.1, "gradient_norm": 2.0,
        "seconds": 0.5,
    }  # fmt: skip


def test_a_step_without_a_gradient_norm_has_none(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "log.jsonl")
    lines.began(Began(0, 1, True))
    lines.trained(report(0, 1.0, norm=None))
    assert "gradient_norm" not in json.loads((tmp_path / "log.jsonl").read_text())


def test_tensorboard_shows_each_step_once_though_a_run_was_cut_short(tmp_path: Path) -> None:
    tell(TensorBoard(tmp_path), first=0, last=4, factor=1.0)
    tell(TensorBoard(tmp_path), first=2, last=5, factor=10.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0} and len(events.Scalars("train/loss")) == 5
    assert [event.step for event in events.Scalars("evaluation/loss")] == [5]


def records(directory: Path) -> list:
    """What the offline run below `directory` holds: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    content, at, found, whole = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # a block's rest that holds no record
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


@pytest.mark.process
def test_wandb_writes_a_run_offline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell(Wandb(tmp_path, "captions", options={"name": "first"}), first=0, last=2, factor=1.0)
    until = time.monotonic() + 60
    while (found := records(tmp_path))[-1:] == [] or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < until, "wandb's own process has not written the run's end"
        time.sleep(0.1)
    (run,) = [each.run for each in found if each.WhichOneof("record_type") == "run"][-1:]
    assert (run.project, run.display_name) == ("captions", "first")
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each.history.item}
        for each in found
        if each.WhichOneof("record_type") == "history"
    ]
    told = [(one["step"], one["train/loss"]) for one in history if "train/loss" in one]
    assert told == [(1, 1.0), (2, 2.0)]
    assert [(one["step"], one["evaluation/loss"]) for one in history if "evaluation/loss" in one] == [(2, 2.0)]


def test_ranks_that_do_not_write_leave_nothing(tmp_path: Path) -> None:
    for logger in (Lines(tmp_path / "log.jsonl"), TensorBoard(tmp_path / "board"), Wandb(tmp_path, "captions")):
        tell(logger, first=0, last=2, factor=1.0, writes=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "module", "told"),
    [
        (lambda: TensorBoard("x"), "torch.utils.tensorboard", "TensorBoard: pip install tensorboard"),
        (lambda: Wandb("x", "p"), "wandb", r"Wandb: pip install 'megatron-mimo\[wandb\]'"),
    ],
)
def test_a_logger_whose_package_is_missing_says_what_to_install(make, module, told, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=told):
        make()


def test_a_mode_of_wandb_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the mode 'offline' or 'online', found 'disabled'"):
        Wandb("x", "captions", mode="disabled")


def test_tensorboard_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected a run in progress on the rank that writes"):
        TensorBoard(tmp_path).add_text("tag", "text", 0)
