"""What constructors refuse: sizes that are none, options that nobody knows, one thing said twice."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn


def at_least_one(owner: str, **sizes: int) -> None:
    """Refuses sizes that are no positive int.

    Raises:
        ValueError: naming the owner, the option and its value.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{owner}: {name} must be an int of at least 1, got {size!r}")


def one_of(owner: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses an option outside its allowed values.

    Raises:
        ValueError: naming the owner, the option, its value and the allowed ones.
    """
    if value not in allowed:
        raise ValueError(f"{owner}: {option} must be one of {list(allowed)}, got {value!r}")


def not_both(owner: str, **named: object) -> None:
    """Refuses settings beside the description that holds them; None is no setting.

    Raises:
        ValueError: naming the owner and the settings.
    """
    given = [name for name, value in named.items() if value is not None]
    if given:
        raise ValueError(f"{owner}: expected `targets` alone to describe the targets, found {given} beside it")


def finite(owner: str, **values: float) -> None:
    """Refuses numbers that are NaN, infinite or none.

    Raises:
        ValueError: naming the owner, the option and its value.
    """
    for name, value in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and math.isfinite(value)):
            raise ValueError(f"{owner}: {name} must be a finite number, got {value!r}")


def check_sample_options(decoder: nn.Module, options: Mapping[str, object], where: str) -> None:
    """Refuses options that a decoder's `sample` does not take.

    Args:
        decoder: whose signature says what it takes.
        options: by keyword.
        where: what they are, for the error.

    Raises:
        TypeError: naming the option and those that there are.
    """
    rows, *taken = inspect.signature(cast(Callable, decoder.sample)).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken):
        return
    known = [one.name for one in taken]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"{where} has {unknown}, which {type(decoder).__name__} does not take; its options beside {rows.name} are "
            f"{known}"
        )


def check_weight(weight: Tensor, where: str = "") -> None:
    """Refuses weights that mean nothing, on the CPU; elsewhere looking would wait for the device.

    Raises:
        ValueError: naming how many.
    """
    if weight.device.type != "cpu":
        return
    bad = ~((weight >= 0) & torch.isfinite(weight))  # of a NaN every comparison is false
    if bad.any():
        raise ValueError(
            f"{where}weight has {int(bad.sum())} elements of {weight.numel()} that are negative, infinite or NaN: the "
            "loss would grow without bound or be NaN. Give what does not count 0."
        )


def check_within(values: Tensor, name: str, low: float, high: float) -> None:
    """Refuses values outside a closed range, or NaN, on the CPU; elsewhere looking would wait for the device.

    Raises:
        ValueError: naming the range and the first of them.
    """
    if values.device.type != "cpu":
        return
    outside = ~((values >= low) & (values <= high))
    if outside.any():
        raise ValueError(f"{name} must lie in [{low}, {high}], found {values[outside][0].item()}")
