"""How fast a run goes: tokens, rows of each modality, media items, operations, and their share of the peak."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping

import torch

from megatron_mimo.data.step import Counts
from megatron_mimo.training.speed import counts as names
from megatron_mimo.training.speed.flops import PartSize, stated_peak, step_flops

Rates = dict[str, float]

# What the log calls a modality's or an encoder's counts, by their kind.
_LOGGED = {names.READ: "tokens read", names.WRITTEN: "tokens written", names.ITEMS: "items"}


class Throughput:
    """Rates of the steps since the last report.

    A step's time is its own: evaluations and checkpoints between steps are not in it. A step of
    Megatron's waits for the device before it ends (it reads the gradient norm), so the host's clock
    tells it.

    Args:
        sizes: of the model's parts.
        peak: of all devices together in FLOP/s; None leaves the MFU out.
        report: called with the number of steps of the run so far and the rates since the last call.
        every: steps between reports.
    """

    def __init__(
        self,
        sizes: Mapping[str, PartSize],
        peak: float | None,
        report: Callable[[int, Rates], None],
        every: int,
    ) -> None:
        self._sizes, self._peak, self._report, self._every = sizes, peak, report, every
        self._summed: Counts = {}
        self._seconds = 0.0

    def add(self, steps: int, counts: Counts, seconds: float) -> None:
        """Takes note of a step, the `steps`-th of the run, and reports where it is time."""
        self._summed = {key: self._summed.get(key, 0.0) + count for key, count in counts.items()}
        self._seconds += seconds
        if steps % self._every == 0:
            self._report(steps, self.rates(self._seconds))
            self._summed, self._seconds = {}, 0.0

    def rates(self, seconds: float) -> Rates:
        """By name of the log, for what went through in `seconds`."""
        counts, rates = self._summed, {}
        rates["tokens/s"] = counts[names.POSITIONS] / seconds
        rates["samples/s"] = counts[names.SAMPLES] / seconds
        for (kind, *of), count in counts.items():
            if kind in _LOGGED:
                rates[f"{'/'.join(of)} {_LOGGED[kind]}/s"] = count / seconds
        flops = step_flops(self._sizes, counts)
        for part, operations in flops.items():
            rates[f"{part} TFLOP/s"] = operations / seconds / 1e12
        rates["TFLOP/s"] = sum(flops.values()) / seconds / 1e12
        if self._peak is not None:
            rates["MFU"] = sum(flops.values()) / seconds / self._peak
        return rates


def peak_of_all(devices: int, half_precision: bool, given_tflops: float | None = None) -> float | None:
    """Peak of all devices of a run in FLOP/s, None where nobody states it.

    Args:
        devices: how many.
        half_precision: whether the model computes in bfloat16 or float16, which the stated peaks are for.
        given_tflops: of one device, in place of its data sheet's.
    """
    if given_tflops is not None:
        return given_tflops * 1e12 * devices
    if not (half_precision and torch.cuda.is_available()):
        return None
    peak = stated_peak(torch.cuda.get_device_name())
    return None if peak is None else peak * devices


def log_to_megatron(args: Namespace) -> Callable[[int, Rates], None]:
    """A report to where `megatron.training` reports: the last rank's stdout, TensorBoard, W&B."""

    def report(step: int, rates: Rates) -> None:
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        line = " | ".join(f"{name}: {rate:.4g}" for name, rate in rates.items())
        print(f" throughput of iterations up to {step} | {line}", flush=True)
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for name, rate in rates.items():
            if writer:
                writer.add_scalar(f"throughput/{name}", rate, step)
            if wandb:
                wandb.log({f"throughput/{name}": rate}, step)

    return report if args.rank == args.world_size - 1 else _silent


def _silent(step: int, rates: Rates) -> None:
    """Every rank of the last stage keeps count, one tells."""
