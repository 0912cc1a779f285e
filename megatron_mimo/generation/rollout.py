"""Answers for reinforcement learning: several a prompt, their log-probabilities, and how far training's differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mimo.generation.engine import generate
from megatron_mimo.generation.results import GenerationOutput


@dataclass(frozen=True, eq=False)
class Gap:
    """How far sampling and training forward are apart, over all text tokens of a rollout.

    Attributes:
        mean, largest: of the absolute difference of log-probabilities before temperature.
        kl: mean of `ratio - 1 - log(ratio)` with `ratio` training over sampling, an estimate of their Kullback-Leibler
            divergence that is never negative (Schulman, "Approximating KL divergence", 2020).
        tokens: how many.
    """

    mean: float
    largest: float
    kl: float
    tokens: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """Answers to prompts, `N = prompts * answers` of them, side by side. On the CPU, equal on all TP and PP ranks.

    Attributes:
        outputs: the answers themselves, those of one prompt one after another.
        prompts: int64 `[N]`, which prompt each answers.
        ids: int64 `[N, T]`, its text tokens, padded behind with 0.
        mask: bool `[N, T]`, where there is a token.
        logprobs: float32 `[N, T]`, in the model's own distribution, before temperature; 0 in padding.
        sampling_logprobs: float32 `[N, T]`, in the distribution that was drawn from: the behaviour policy's.
        training_logprobs: float32 `[N, T]`, `logprobs` by one training forward.
        gap: between `logprobs` and `training_logprobs`.
    """

    outputs: list[GenerationOutput]
    prompts: Tensor
    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    training_logprobs: Tensor
    gap: Gap


def rollout(
    model: Any,
    prompts: Sequence[Any],
    answers: int = 1,
    max_new_tokens: int | Sequence[int] = 128,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    **options: Any,
) -> Rollout:
    """Answers to each prompt with what reinforcement learning needs to know of them.

    Args:
        model: a `MimoModel`, as for `generate`; it goes on training after it.
        prompts: as for `generate`.
        answers: to each prompt, each from a seed of its own.
        max_new_tokens: one for all, or one for each prompt.
        seed: of the draws; answer `k` to prompt `i` has the seed `seed + i * answers + k`.
        temperature: of the draws.
        options: further ones of `generate`.

    Raises:
        ValueError: as `generate`; fewer than one answer, or an option that a rollout has of its own.

    Example:
        >>> taken = rollout(model, prompts, answers=8, max_new_tokens=64)               # doctest: +SKIP
        >>> taken.gap.mean                                                              # doctest: +SKIP
    """
    if isinstance(answers, bool) or not isinstance(answers, int) or answers < 1:
        raise ValueError(f"answers: expected an integer of at least 1, found {answers!r}")
    own = sorted({"rescore", "stream", "on_error"} & options.keys())
    if own:
        raise ValueError(f"rollout: expected no {own}, which it sets itself")
    if isinstance(max_new_tokens, (list, tuple)):
        max_new_tokens = [limit for limit in max_new_tokens for _ in range(answers)]
    asked = [prompt for prompt in prompts for _ in range(answers)]
    outputs = generate(model, asked, max_new_tokens, seed=seed, temperature=temperature, rescore=True, **options)
    assert isinstance(outputs, list)
    said = [[t for part in output.parts if part.kind == "text" for t in part.ids] for output in outputs]
    length = max(map(len, said))
    ids = torch.zeros(len(outputs), length, dtype=torch.int64)
    mask = torch.zeros(len(outputs), length, dtype=torch.bool)
    names = ("logprobs", "sampling_logprobs", "rescored_logprobs")
    columns = {name: torch.zeros(len(outputs), length) for name in names}
    for row, (output, tokens) in enumerate(zip(outputs, said)):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = True
        for name, column in columns.items():
            column[row, : len(tokens)] = getattr(output, name)
    which = torch.arange(len(prompts)).repeat_interleave(answers)
    gap = gap_of(columns["logprobs"][mask], columns["rescored_logprobs"][mask])
    spoken, drawn, trained = (columns[name] for name in names)
    return Rollout(outputs, which, ids, mask, spoken, drawn, trained, gap)


def gap_of(sampling: Tensor, training: Tensor) -> Gap:
    """How far two log-probabilities of the same tokens are apart.

    Example:
        >>> gap_of(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5])).largest
        0.5
    """
    if not len(sampling):
        return Gap(0.0, 0.0, 0.0, 0)
    ratio = (training - sampling).double()
    kl = (ratio.exp() - 1 - ratio).mean()
    return Gap(float(ratio.abs().mean()), float(ratio.abs().max()), float(kl), len(sampling))
