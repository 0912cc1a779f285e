"""The loss of one microbatch, scaled so that the step's gradient is that of the whole batch's loss.

    loss of the step = sum over terms k of  weight_k * (sum of k over the step) / (count of k over the step)

Each term has a denominator of its own, so Megatron's single division cannot make it. Here every
microbatch divides by the counts of the step, and multiplies by what Megatron will divide by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mimo.losses import LossTerm, total_loss
from megatron_mimo.output import MimoOutput, loss_terms


@dataclass(frozen=True)
class StepScale:
    """How the parts of one step add up.

    Megatron divides gradients by the tokens of the step with `calculate_per_token_loss`, and by the
    number of microbatches and of data- and context-parallel ranks without.

    Args:
        counts: loss term -> its count over all microbatches and ranks of the step.
        tokens: tokens of the step, as the microbatches report them to Megatron.
        parts: microbatches of the step times data- and context-parallel ranks.
        per_token: `calculate_per_token_loss` of the model's configuration.
    """

    counts: Mapping[str, float]
    tokens: float
    parts: int
    per_token: bool

    @property
    def factor(self) -> float:
        """What Megatron will divide this step's gradient by."""
        return max(self.tokens, 1.0) if self.per_token else float(self.parts)

    def divisors(self) -> dict[str, Tensor]:
        """The counts as float32 scalars on the CPU, which enter device arithmetic without a copy."""
        return {name: torch.tensor(count, dtype=torch.float32) for name, count in self.counts.items()}


@dataclass(frozen=True)
class ToldScale:
    """A step's numbers on the device, where a CUDA graph finds those of each step.

    Args:
        divisors: loss term -> its count over the step, float32 scalar.
        factor: what Megatron will divide the step's gradient by, float32 scalar.
        held: tokens that this rank reports of the microbatch, int32 scalar.
    """

    divisors: Mapping[str, Tensor]
    factor: Tensor
    held: Tensor


def numbers_of(scale: StepScale, held: Iterable[float], device: torch.device) -> Tensor:
    """float64 `[terms + 1 + microbatches]` on the device, there without waiting: what `told_of` takes apart.

    Args:
        scale: of the step.
        held: tokens that this rank reports of each microbatch.
        device: of the model.
    """
    numbers = [*scale.counts.values(), scale.factor, *held]
    host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def told_of(scale: StepScale, numbers: Tensor) -> list[ToldScale]:
    """A step's numbers for each of its microbatches, from `numbers_of`.

    Args:
        scale: whose terms they are.
        numbers: float64 `[terms + 1 + microbatches]`.
    """
    terms = len(scale.counts)
    told, held = numbers.float().unbind(), numbers[terms + 1 :].int().unbind()
    return [ToldScale(dict(zip(scale.counts, told[:terms], strict=True)), told[terms], each) for each in held]


def loss_func(
    outputs: Tensor | MimoOutput,
    *,
    loss_mask: Tensor | None,
    weights: Mapping[str, float],
    names: Iterable[str],
    scale: StepScale | None,
    held: int | None = None,
    further: Mapping[str, LossTerm] | None = None,
    reported: Mapping[str, LossTerm] | None = None,
    told: ToldScale | None = None,
    non_loss_data: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]] | Tensor | MimoOutput:
    """A microbatch's loss, as Megatron's schedules take it.

    Args:
        outputs, loss_mask: from `MimoModel.forward` on the last pipeline stage.
        weights: modality -> weight of its terms, 1 where it is not named.
        names: every loss term that any microbatch may have; reported as zeros where this one lacks it, and
            as 0 / 1 where the whole step does: Megatron's log divides every term, and one NaN would spoil
            the mean of an interval.
        scale: of the step; None in evaluation, where nothing is divided.
        held: tokens that this rank reports of the microbatch; None for those that the language loss looks at.
        further: terms beside the model's.
        reported: terms that are reported and are no part of the loss.
        told: the same numbers on the device, in place of the host's.
        non_loss_data: the schedule collects outputs: they come back as they are.

    Returns:
        `(loss, tokens, report)`: a float32 scalar with gradient; an int32 scalar, the tokens that this
        rank reports, 1 without `calculate_per_token_loss`; and by name of the log, `[sum, count]`
        float32, rank-local, which Megatron adds up over microbatches and ranks and then divides.
    """
    if non_loss_data:
        return outputs
    terms = loss_terms(outputs, loss_mask) | dict(further or {})
    tokens = _tokens(outputs, loss_mask)
    if scale is None:
        return total_loss(terms, weights), tokens, report(terms | dict(reported or {}), names)
    loss = total_loss(terms, weights, scale.divisors() if told is None else told.divisors)
    logged = report(terms | dict(reported or {}), names, scale.counts)
    logged["loss"] = torch.stack([loss.detach(), loss.new_full((), 1 / scale.parts)])
    if not scale.per_token:
        tokens = torch.ones_like(tokens)
    elif told is not None:
        tokens = told.held
    elif held is not None:
        tokens = torch.full_like(tokens, held)
    return loss * (scale.factor if told is None else told.factor), tokens, logged


def report(
    terms: Mapping[str, LossTerm], names: Iterable[str], counts: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """`"<term> loss"` -> `[sum, count]`, float32, detached, for every name.

    Args:
        terms: of a microbatch.
        names: of all terms; those that are not there read 0 / 0.
        counts: of the whole step; terms that it counts nothing of then read 0 / 1.
    """
    zero = next(iter(terms.values())).sum.new_zeros(())
    logged = {}
    for name in names:
        entry = terms.get(name)
        total, count = (zero, zero) if entry is None else (entry.sum.detach(), entry.count.float())
        if counts is not None and counts[name] == 0:
            count = torch.ones_like(zero)
        logged[f"{name} loss"] = torch.stack([total, count])
    return logged


def _tokens(outputs: Tensor | MimoOutput, loss_mask: Tensor | None) -> Tensor:
    """int32 scalar: positions of this rank's part that the language loss looks at."""
    if loss_mask is not None:
        return loss_mask.count_nonzero().to(torch.int32)
    language = outputs.language if isinstance(outputs, MimoOutput) else outputs
    return torch.full((), language.numel(), dtype=torch.int32, device=language.device)
