"""Logits -> one token for each row, by rules that are each row's own, with noise from a counter.

A draw reads one number, which depends on the row's seed and on how many tokens it has drawn, and on nothing else: not
on its place in the batch, nor on the ranks. The token is where that number falls in the cumulative distribution.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MANTISSA = 53


@dataclass(frozen=True)
class Sampling:
    """How one sample's tokens are drawn. The rules apply in this order.

    Args:
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and answer (Keskar et
            al., arXiv 1909.05858, section 4.1); 1 is off.
        temperature: divides the logits; 0 takes the likeliest token, and the three below do nothing.
        top_k: keep this many likeliest tokens; None for all.
        top_p: of those, keep the likeliest that together reach this probability (Holtzman et al., arXiv 1904.09751,
            section 3.1), at least one; 1 is off.
        min_p: of those, keep tokens of at least this share of the likeliest's probability (Nguyen et al., arXiv
            2407.01082); 0 is off.
        seed: of this sample's draws.

    Raises:
        ValueError: a number out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "repetition_penalty": ("a number above 0", 0 < self.repetition_penalty < math.inf),
            "temperature": ("a finite number of at least 0", 0 <= self.temperature < math.inf),
            "top_k": ("an integer of at least 1, or None", self.top_k is None or _is_count(self.top_k)),
            "top_p": ("a number in (0, 1]", 0 < self.top_p <= 1),
            "min_p": ("a number in [0, 1]", 0 <= self.min_p <= 1),
            "seed": ("an integer", isinstance(self.seed, int) and not isinstance(self.seed, bool)),
        }
        for name, (wanted, fits) in ranges.items():
            if not fits:
                raise ValueError(f"{name}: expected {wanted}, found {getattr(self, name)!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def uniform(seed: int, *counter: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on its arguments alone.

    Example:
        >>> uniform(1, 0) == uniform(1, 0), uniform(1, 0) == uniform(1, 1)
        (True, False)
    """
    return (_digest(seed, *counter) >> (64 - _MANTISSA)) / 2**_MANTISSA


def generator_seed(seed: int, *counter: int) -> int:
    """A seed for torch's generators that depends on its arguments alone, in [0, 2**63)."""
    return _digest(seed, *counter) >> 1


def _digest(seed: int, *counter: int) -> int:
    packed = b"".join(struct.pack("<q", (number + 2**63) % 2**64 - 2**63) for number in (seed, *counter))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class Drawn(NamedTuple):
    """One token of each row.

    Attributes:
        ids: int64 `[B]`.
        logprobs: float32 `[B]`, log-probability in the model's own distribution: before temperature, penalty and
            whatever narrows the choice. What a training forward gives.
        sampling_logprobs: float32 `[B]`, log-probability in the distribution that the token was drawn from; 0 for
            greedy rows.
    """

    ids: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor


class Sampler:
    """Draws for a batch of rows, each with its own rules, without asking the device for anything.

    Args:
        rules: of each row.
        device: of the logits.
    """

    def __init__(self, rules: Sequence[Sampling], device: torch.device | str) -> None:
        self.rules, self._device = list(rules), device
        self.greedy = all(rule.temperature == 0 for rule in rules)
        self.penalises = any(rule.repetition_penalty != 1 for rule in rules)

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)[:, None]

        self._is_greedy = column([rule.temperature == 0 for rule in rules], torch.bool)
        self._temperature = column([rule.temperature or 1.0 for rule in rules])
        self._penalty = column([rule.repetition_penalty for rule in rules])
        self._top_k = column([2**62 if rule.top_k is None else rule.top_k for rule in rules], torch.int64)
        self._top_p = column([rule.top_p for rule in rules], torch.float64)
        self._min_p = column([rule.min_p for rule in rules], torch.float64)

    def take(self, other: Sampler) -> None:
        """Takes the rules of another sampler of as many rows into the buffers of this one."""
        self.rules, self.greedy, self.penalises = other.rules, other.greedy, other.penalises
        for name in ("_is_greedy", "_temperature", "_penalty", "_top_k", "_top_p", "_min_p"):
            getattr(self, name).copy_(getattr(other, name))

    def uniforms(self, counts: Sequence[int]) -> Tensor:
        """Float64 `[B]` on the CPU, the number that each row's draw reads.

        Args:
            counts: how many tokens each row has drawn.
        """
        return torch.tensor([uniform(rule.seed, count) for rule, count in zip(self.rules, counts)], dtype=torch.float64)

    def draw(self, logits: Tensor, allowed: Tensor, uniforms: Tensor | None, seen: Tensor | None = None) -> Drawn:
        """A token of each row.

        Args:
            logits: `[B, V]`, whole rows.
            allowed: bool `[V]` or `[B, V]`, tokens that may be drawn.
            uniforms: float64 `[B]` on the logits' device; None where all rows are greedy.
            seen: bool `[B, V]`, tokens in prompt and answer, where any row penalises them.
        """
        logits = logits.float()
        plain = logits
        if seen is not None:
            penalised = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
            logits = torch.where(seen, penalised, logits)
        logits = logits.masked_fill(~allowed, -torch.inf)
        likeliest = logits.argmax(dim=-1, keepdim=True)
        if self.greedy or uniforms is None:
            ids, sampled = likeliest, torch.zeros_like(likeliest, dtype=torch.float32)
        else:
            ids, sampled = self._drawn(logits / self._temperature, uniforms)
            ids = torch.where(self._is_greedy, likeliest, ids)
            sampled = torch.where(self._is_greedy, 0.0, sampled)
        own = plain.gather(1, ids) - plain.logsumexp(dim=-1, keepdim=True)
        return Drawn(ids[:, 0], own[:, 0], sampled[:, 0])

    def _drawn(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B, 1]` and the log-probability of each in what it was drawn from."""
        ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(ordered.shape[1], device=ordered.device)
        ordered = ordered.masked_fill(rank >= self._top_k, -torch.inf)
        # In double precision: the sum over a large vocabulary must not swallow its tail.
        probability = ordered.double().softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        kept = ((before < self._top_p) & (probability >= self._min_p * probability[:, :1])) | (rank == 0)
        probability = torch.where(kept, probability, 0.0)
        cumulative = probability.cumsum(dim=-1)
        total = cumulative[:, -1:]
        place = (cumulative <= uniforms[:, None] * total).sum(dim=-1, keepdim=True)
        # Rounding may leave the number at the very end.
        place = torch.minimum(place, (probability > 0).sum(dim=-1, keepdim=True) - 1)
        found = (probability.gather(1, place) / total).log()
        return tokens.gather(1, place), found.float()
