"""Positions of what a sample adds where the model has several sections: as training lays the same sequence out.

Text counts on by one in every section; a written span, and one that is read again, follows its modality's rule.

Shapes: `k` sections, `R` positions of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_mimo.data.positions import SEQUENTIAL, Span, positions
from megatron_mimo.generation.spans import Reread, SpanRule


def written(rule: SpanRule) -> tuple[Span, ...]:
    """The span of `rule.rows` positions that a medium takes, beginning at 0; none where it counts on as text."""
    writing = rule.writing
    if writing.positions is None:
        return ()
    return (Span(0, rule.rows, writing.positions, writing.grid),)


def read_again(rule: SpanRule, again: Reread, ends: int) -> tuple[Span, ...]:
    """The span of what is read again, behind `ends` end tokens and what stands before it."""
    if rule.writing.positions is None:
        return ()
    return (Span(ends + len(again.before), again.rows, rule.writing.positions, again.grid),)


def run_of(spans: Sequence[Span], length: int, sections: int) -> tuple[Tensor, int]:
    """Int64 `[k, length]` of a run that begins at position 0, and the position of what follows it."""
    placed = positions(length + 1, spans, sections)[0]
    return placed[:, :length], int(placed[0, length])


def following(prompt: Tensor, delta: int, length: int, spans: Sequence[Span]) -> Tensor:
    """Int64 `[k, length]`: positions of a whole sequence.

    Args:
        prompt: `[k, S]`, its first.
        delta: how far the position of what follows the prompt is ahead of its place.
        length: of the sequence.
        spans: with a rule, behind the prompt; their places are in the sequence.
    """
    own = prompt.shape[1]
    later = run_of([replace(span, start=span.start - own) for span in spans], length - own, len(prompt))[0]
    return torch.cat([prompt, later + own + delta], dim=1)


def check_positions(rule: SpanRule, sections: int) -> None:
    """Refuses a rule of positions that training would not follow, or a grid of another number of positions.

    Raises:
        ValueError: naming what was expected.
    """
    writing = rule.writing
    if writing.positions is None:
        if writing.grid is not None:
            raise ValueError(f"Writing.grid: expected positions, a rule that reads it, found {writing.grid} alone")
        return
    if sections == 1:
        raise ValueError("Writing.positions: expected a model with mrope, found one whose positions count on")
    if rule.variable and writing.positions != SEQUENTIAL:
        raise ValueError("Writing.positions: expected spans of one length, found spans that vary")
    run_of(written(rule), rule.rows, sections)
    if writing.reread is not None:
        (span,) = read_again(rule, writing.reread, 0)
        run_of([span], span.start + span.length, sections)
