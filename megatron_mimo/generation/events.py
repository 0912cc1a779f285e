"""What happens in a call, as it is streamed, and where each sample stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from megatron_mimo.data.positions import Span as Placed
from megatron_mimo.generation.prompts import Request
from megatron_mimo.generation.results import GenerationOutput, MediaPart, TextPart
from megatron_mimo.generation.spans import SpanRule


class Token(NamedTuple):
    """A text token of a sample.

    Attributes:
        sample: index of its prompt.
        id: of the token.
        logprob: before temperature.
        sampling_logprob: in the distribution that it was drawn from.
        text: what it adds to the text; None without a tokenizer.
    """

    sample: int
    id: int
    logprob: float
    sampling_logprob: float
    text: str | None


class Medium(NamedTuple):
    """A medium that a sample has written."""

    sample: int
    part: MediaPart


class Finished(NamedTuple):
    """A sample that has ended."""

    sample: int
    output: GenerationOutput


Event = Token | Medium | Finished


@dataclass(eq=False)
class Span:
    """A span that a sample writes.

    Attributes:
        rule: how.
        labelled: whether its first position was read as text already, and has to be written anew.
        drawn: what was drawn for each of its rows so far, `[1, ...]`; one by one alone.
        waits: it is opened and nothing has run.
        started: seconds since the call began.
    """

    rule: SpanRule
    labelled: bool = False
    drawn: list[Tensor] = field(default_factory=list)
    waits: bool = True
    started: float = 0.0

    @property
    def goes_on(self) -> bool:
        """Whether its next row joins the common step."""
        return self.rule.style == "one_by_one" and not self.waits and not self.full

    full: bool = False


@dataclass(eq=False)
class Sample:
    """Where one sample stands.

    Attributes:
        index: of its prompt.
        request: what is asked.
        row, twin: its rows of the cache; `twin` follows its second prompt, None without one.
        output: what it has given so far.
        used: positions of its limit that are taken.
        tokens: text tokens that were accepted, which count its draws.
        flying: tokens that were drawn and are not read yet.
        ready: whether its last token is there to be read by the model.
        epoch: grows when what is flying is to be dropped.
        media: spans that it has written.
        span: the one that is being written.
        text, logprobs, said: the text part in progress.
        sequence: ids of the prompt and of all that followed.
        learned: places of its text tokens in `sequence`.
        shown: what written spans show the language model, in order.
        read: what was read again, as `modality_inputs`.
        placed: spans of `sequence` behind the prompt whose positions follow a rule.
    """

    index: int
    request: Request
    row: int
    twin: int | None
    output: GenerationOutput
    used: int = 0
    tokens: int = 0
    flying: int = 0
    ready: bool = False
    epoch: int = 0
    media: int = 0
    span: Span | None = None
    text: TextPart | None = None
    logprobs: list[tuple[float, float]] = field(default_factory=list)
    said: str = ""
    sequence: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    shown: list[tuple[SpanRule, Tensor]] = field(default_factory=list)
    read: list[Mapping[str, Any]] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.output.reason is not None

    @property
    def rows(self) -> tuple[int, ...]:
        """Its rows of the cache."""
        return (self.row,) if self.twin is None else (self.row, self.twin)

    @property
    def room(self) -> int:
        """Positions that it may still add."""
        return self.request.limit - self.used

    @property
    def writing(self) -> Span:
        """The span that is being written."""
        assert self.span is not None
        return self.span

    def drop_flying(self) -> None:
        """Tokens that were drawn and not read count no more."""
        self.epoch, self.flying, self.ready = self.epoch + 1, 0, False


class Draw(NamedTuple):
    """Tokens on their way to the host.

    Attributes:
        samples: whose, each with its epoch.
        values: float64 `[3, rows]` on the CPU: ids, log-probabilities, and those drawn from.
        event: when they have arrived; None where they have.
    """

    samples: list[tuple[Sample, int]]
    values: Tensor
    event: Any
