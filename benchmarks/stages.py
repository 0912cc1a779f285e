"""Device time of a training step by stage, from the profiler's kernel times.

Time of a stage is the sum of its kernels' own times, by the stage in which the host launched them:
wall-clock differences would mislead, because the encoder's launches hide behind whatever the device is
still busy with.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_mimo import MimoModel

STAGES = ("encoder", "projection", "language model", "outside")


def mark(stage: str) -> None:
    """Writes the time at which the host turns to a stage into the profile."""
    with torch.profiler.record_function(f"stage:{stage}"):
        pass


class Marks:
    """Marks the host's way through the stages, forward and backward, of a model with one encoder.

    Within it; the model's forward begins and ends "outside" unless its modules say otherwise.

    Args:
        model: whose modules are marked; other models may hold the same ones.
        modality, encoder: names of the encoder, which has one input projection.
    """

    def __init__(self, model: MimoModel, modality: str, encoder: str) -> None:
        submodule = model.modality_submodules[modality]
        self._around = ((submodule.encoders[encoder], "encoder"), (submodule.input_projections[0], "projection"))
        self._language_model = model.language_model

    def __enter__(self) -> Marks:
        self._handles = [self._language_model.register_forward_pre_hook(self._enter_language_model, with_kwargs=True)]
        for module, stage in self._around:
            self._handles += self._mark_around(module, stage)
        return self

    def __exit__(self, *raised) -> None:
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _mark_around(module: torch.nn.Module, stage: str) -> list:
        def leave(module, args, output) -> None:
            mark("outside")
            first = output[0] if isinstance(output, tuple) else output
            # Its gradient is there: what the host launches next is this module's backward.
            first.register_hook(lambda gradient: mark(stage))

        return [
            module.register_forward_pre_hook(lambda module, args: mark(stage)),
            module.register_forward_hook(leave),
        ]

    @staticmethod
    def _enter_language_model(module, args, keywords) -> None:
        keywords["decoder_input"].register_hook(lambda gradient: mark("outside"))
        mark("language model")


def kernel_times(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of kernels, copies and fills a step, by stage; call it within `Marks`."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            mark("outside")
            step()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return {stage: us / 1e3 / steps for stage, us in _by_stage(events).items()}


def _by_stage(events: list[dict]) -> dict[str, float]:
    """Microseconds on the device by the stage in which the host launched them."""
    turns = sorted(
        (event["ts"], event["name"].removeprefix("stage:"))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("stage:")
    )
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    times = dict.fromkeys(STAGES, 0.0)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            at = launched[event["args"]["correlation"]]
            turn = bisect_right(turns, at, key=lambda turn: turn[0])
            times[turns[turn - 1][1] if turn else "outside"] += event["dur"]
    return times
