"""Spans of media in a sample -> position ids of every token, by a rule a modality.

Positions are made on the host, in the collator, where grids are numbers: `[k, S]` for rotary embeddings with k
sections, restarted in every sample of a pack. Text counts on by one in every section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Span:
    """A run of positions with a rule of its own.

    Args:
        start: of the run in its sample.
        length: of the run.
        rule: what positions it gets.
        grid: `(t, h, w)` of the run after merging; None where it has no grid.
        step: seconds between two `t`.
        sounds: of a video with its sound: for each position whether it is one of the sound's.
    """

    start: int
    length: int
    rule: PositionRule
    grid: Grid | None = None
    step: float = 1.0
    sounds: tuple[bool, ...] | None = None


class PositionRule(Protocol):
    """Positions of a span, and where the text after it goes on."""

    def __call__(self, span: Span, start: int, sections: int) -> tuple[Tensor, int]:
        """int64 `[sections, span.length]`, and the position of what follows.

        Args:
            span: the run.
            start: the position that a text token in its place would have.
            sections: k.
        """


@dataclass(frozen=True)
class Sequential:
    """Counts on as text does (LLaVA, Janus, Emu3, Chameleon)."""

    def __call__(self, span: Span, start: int, sections: int) -> tuple[Tensor, int]:
        return (start + torch.arange(span.length)).expand(sections, -1), start + span.length


SEQUENTIAL = Sequential()


@dataclass(frozen=True)
class Constant:
    """All of a medium's tokens share one position (BAGEL)."""

    def __call__(self, span: Span, start: int, sections: int) -> tuple[Tensor, int]:
        return torch.full((sections, span.length), start), start + 1


@dataclass(frozen=True)
class GridPositions:
    """Time, row and column of the grid, in three sections (Qwen2-VL and its family).

    Args:
        per_second: positions that a second takes along time; 0 counts `t` itself.
        past_time: whether what follows stands after the last time too, or after rows and columns alone. Models of
            `transformers` count rows and columns; Qwen-Omni counts all three.

    Example:
        >>> rule = GridPositions()
        >>> rule(Span(0, 4, rule, grid=(1, 2, 2)), 5, 3)
        (tensor([[5, 5, 5, 5],
                [5, 5, 6, 6],
                [5, 6, 5, 6]]), 7)
    """

    per_second: float = 0.0
    past_time: bool = False

    def __call__(self, span: Span, start: int, sections: int) -> tuple[Tensor, int]:
        if sections != 3:
            raise ValueError(f"GridPositions: expected 3 sections (time, row, column), found {sections}")
        if span.grid is None or span.grid[0] * span.grid[1] * span.grid[2] != span.length:
            raise ValueError(f"GridPositions: a span of {span.length} positions does not fit the grid {span.grid}")
        t, h, w = span.grid
        interval = span.step * self.per_second if self.per_second else 1.0
        times = (torch.arange(t) * interval).long()
        axes = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
        taken = max(h, w, int(times[-1]) + 1) if self.past_time else max(h, w)
        return torch.stack(axes).reshape(3, -1) + start, start + taken


@dataclass(frozen=True)
class TimeAligned:
    """A video with its sound, their tokens in order of time, both beginning at one position (Qwen-Omni).

    The video's tokens take the positions of its grid, the sound's count on by one, whatever stands between them.

    Args:
        video: rule of the video's tokens.
    """

    video: GridPositions = GridPositions(per_second=25.0, past_time=True)

    def __call__(self, span: Span, start: int, sections: int) -> tuple[Tensor, int]:
        if span.sounds is None or len(span.sounds) != span.length:
            raise ValueError("TimeAligned: the span must say of each position whether it is the sound's (Span.sounds)")
        heard = torch.tensor(span.sounds)
        shown = int((~heard).sum())
        seen, _ = self.video(Span(0, shown, self.video, span.grid, span.step), start, sections)
        positions = torch.empty(sections, span.length, dtype=torch.long)
        positions[:, ~heard] = seen
        positions[:, heard] = start + torch.arange(span.length - shown)
        # As the model does it: what follows stands after the token that is last in order, not after the largest.
        return positions, int(positions[:, -1].max()) + 1


def positions(length: int, spans: Sequence[Span] = (), sections: int = 1) -> tuple[Tensor, int]:
    """Positions of one sample, and how far generation is ahead of counting.

    Args:
        length: tokens of the sample, S.
        spans: in order, without overlap.
        sections: k, of the rotary embedding.

    Returns:
        int64 `[k, S]`, and the delta: the position of token `S + i` that is generated is `S + i + delta`.

    Raises:
        ValueError: spans that overlap or leave the sample.

    Example:
        >>> image = Span(1, 2, Constant())
        >>> positions(5, [image])
        (tensor([[0, 1, 1, 2, 3]]), -1)
    """
    pieces, at, following = [], 0, 0
    for index, span in enumerate(spans):
        if span.start < at or span.start + span.length > length:
            raise ValueError(
                f"span {index} runs from {span.start} to {span.start + span.length}: expected it after {at} and within "
                f"the sample's {length} tokens"
            )
        pieces.append((following + torch.arange(span.start - at)).expand(sections, -1))
        following += span.start - at
        placed, following = span.rule(span, following, sections)
        pieces.append(placed)
        at = span.start + span.length
    pieces.append((following + torch.arange(length - at)).expand(sections, -1))
    together = torch.cat(pieces, dim=1)
    return together, (int(together.max()) + 1 if length else 0) - length
