"""Spans that decoders write: query rows in one pass, codes or vectors one by one, flow in the loop.

Shapes: `b` samples that write together, `R` rows of a span, `H` hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mimo.cached_attention import Step, bucketed
from megatron_mimo.data.positions import Span as Placed
from megatron_mimo.generation.drawing import Drawing
from megatron_mimo.generation.events import Finished, Medium, Sample, Span
from megatron_mimo.generation.placing import read_again, run_of, written
from megatron_mimo.generation.results import MediaPart
from megatron_mimo.generation.spans import SpanRule

if TYPE_CHECKING:
    from megatron_mimo.generation.loop import Loop


class Writer:
    """Writes the spans of a loop's samples.

    Args:
        loop: whose cache, states and samples they are.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop, self._stage, self._model = loop, loop.stage, loop.model
        self._drawing = Drawing(loop.model, loop.stage)
        self._full: list[Sample] = []

    def write(self, opened: Sequence[Sample]) -> Iterator[Medium | Finished]:
        """Begins the spans that were opened, and writes whole those that are not written one by one.

        Yields:
            Media that are ready, and samples that have no room left.
        """
        full, self._full = self._full, []
        for sample in full:
            yield from self._close(sample, torch.cat(sample.writing.drawn))
            yield from self._after(sample)
        together = []
        for sample in opened:
            span = sample.writing
            self._begin(sample, span)
            needed = span.rule.rows
            if span.rule.variable:
                needed = 1 if span.rule.end is None else 2
            if sample.room < needed:
                yield self._loop.end(sample, "length")
            elif span.rule.style != "one_by_one":
                together.append(sample)
            elif span.rule.variable and span.rule.end is not None:
                self._loop.restrict(sample, [span.rule.token, span.rule.end])
        for samples in groups_of(together):
            written = self._pass(samples) if samples[0].writing.rule.style == "pass" else self._flow(samples)
            for sample, drawn in zip(samples, written):
                sample.used += sample.writing.rule.rows
                sample.sequence += [sample.writing.rule.token] * sample.writing.rule.rows
                yield from self._close(sample, drawn)
                yield from self._after(sample)

    def _begin(self, sample: Sample, span: Span) -> None:
        loop = self._loop
        loop.close_text(sample)
        span.waits, span.started = False, loop.seconds()
        if span.labelled:
            self._take_back(sample)

    def _take_back(self, sample: Sample) -> None:
        """The sample's last position has not been: its slots are free and its states those before."""
        loop = self._loop
        for row in sample.rows:
            loop.lengths[row] -= 1
        rows = loop.to_device(list(sample.rows))
        loop.state.last.index_copy_(0, rows, loop.state.before[rows])

    def _close(self, sample: Sample, drawn: Tensor) -> Iterator[Medium]:
        """Makes a medium of what was drawn for a span's rows, and ends the span."""
        span, loop = sample.writing, self._loop
        rule = span.rule
        value = None
        if self._stage.last:
            value = self._model.modality_submodules[rule.modality].finish(drawn, rule.decoder)
        value = self._stage.shared(value).cpu()
        value = value[0] if value.dim() > 1 and value.shape[0] == 1 else value
        ids = [rule.token] * (len(span.drawn) or rule.rows)
        part = MediaPart(rule.kind, rule.modality, rule.decoder, ids, value, drawn.cpu(), span.started, loop.seconds())
        sample.output.parts.append(part)
        sample.shown.append((rule, drawn))
        sample.media += 1
        sample.span = None
        loop.restrict(sample, None)
        yield Medium(sample.index, part)

    def _after(self, sample: Sample) -> Iterator[Finished]:
        """What follows a span that ended by its count: what is read again, then text."""
        rule, part = sample.shown[-1][0], sample.output.parts[-1]
        assert isinstance(part, MediaPart)
        if rule.writing.reread is not None:
            ends = () if rule.end is None else (rule.end,)
            yield from self._read_again(sample, rule, part, ends)
        if not sample.done and not sample.room:
            yield self._loop.end(sample, "length")
        if not sample.done:
            self._loop.draw([sample])

    # One by one ---------------------------------------------------------------------------------

    def next_rows(self, writing: Sequence[Sample]) -> tuple[Tensor, Tensor] | None:
        """Draws the next row of each of these spans from its state.

        Returns:
            Rows of the cache `[n]` and what the language model reads there `[n, H]`; None where nothing is written
            one by one, and behind the first stage.
        """
        index: list[int] = []
        values = []
        for group in groups_of(writing):
            rule = group[0].writing.rule
            drawn = None
            if self._stage.last:
                drawn = self._drawing.next(rule, group, self._states(group), self._states(group, twins=True))
            drawn = self._stage.shared(drawn)
            for place, sample in enumerate(group):
                sample.writing.drawn.append(drawn[place : place + 1])
            if self._stage.first:
                fed = self._drawing.fed(rule, drawn, len(group))
                index += rows_of(group)
                values.append(fed.repeat(len(group[0].rows), 1))
        return (self._loop.to_device(index), torch.cat(values)) if index else None

    def stepped(self, writing: Sequence[Sample]) -> list[Sample]:
        """Those of these samples, whose rows the model has just read, that say whether they go on."""
        asked = []
        for sample in writing:
            span = sample.writing
            rule = span.rule
            sample.used += 1
            sample.sequence.append(rule.token)
            span.full = len(span.drawn) == rule.rows
            if rule.variable and rule.end is not None:
                span.full = span.full or sample.room == 1  # which the end token takes
                if span.full:
                    self._loop.restrict(sample, [rule.end])
                asked.append(sample)
                continue
            if span.full:
                self._place(sample, written(rule), rule.rows, len(sample.sequence) - rule.rows)
            span.full = span.full or not sample.room
            if span.full:
                self._full.append(sample)
        return asked

    def ended(self, sample: Sample) -> Iterator[Medium]:
        """A span of variable length has ended by its end token; a row that was begun since has not been."""
        span = sample.writing
        if sample.flying:
            self._take_back(sample)
            span.drawn.pop()
            sample.sequence.pop()
            sample.used -= 1
        sample.drop_flying()
        yield from self._close(sample, torch.cat(span.drawn))

    def follow_end(self, sample: Sample, token: int) -> Iterator[Finished]:
        """What follows the end token of a span of variable length, which is accepted and not read by the model yet."""
        rule, part = sample.shown[-1][0], next(p for p in reversed(sample.output.parts) if isinstance(p, MediaPart))
        if rule.writing.reread is not None:
            yield from self._read_again(sample, rule, part, (token,), counted=1)
            if not sample.done and not sample.room:
                yield self._loop.end(sample, "length")
            if not sample.done:
                self._loop.draw([sample])
            return
        rows = self._loop.to_device(list(sample.rows))
        self._loop.state.ids.index_fill_(0, rows, token)
        sample.ready = True

    # In one pass, and at every solver step -------------------------------------------------------

    def _pass(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Writes the spans of samples of one modality; gives what was drawn for each, `[M, ...]`."""
        rule = samples[0].writing.rule
        length, rows, step = rule.rows, rows_of(samples), self._step(samples)
        fed = None
        if self._stage.first and rule.fed:
            fed = self._drawing.queries(rule, len(rows) * length).view(len(rows), length, -1).transpose(0, 1)
        elif self._stage.first:
            ids = torch.full((len(rows), length), rule.token, device=self._stage.device)
            fed = self._stage.embed_tokens(ids, step.positions)
        hidden = self._stage.run(fed, step, len(rows), length, self._positions(rows, written(rule), length))
        drawn: list[Tensor | None] = [None] * len(samples)
        if self._stage.last:
            states = self._read_states(rule, samples, hidden)
            drawn = list(self._drawing.whole(rule, samples, states))
        self._keep(samples, hidden)
        return [self._stage.shared(one) for one in drawn]

    def _flow(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Draws by a flow that the language model sees at every solver step; the same slots are written each time."""
        rule, rows, step = samples[0].writing.rule, rows_of(samples), self._step(samples)
        copies, positions = len(samples[0].rows), self._positions(rows, written(rule), rule.rows)

        def run(x: Tensor, time: Tensor) -> Tensor | None:
            fed = None
            if self._stage.first:
                fed = self._drawing.noised(rule, x, time).view(len(samples), rule.rows, -1).transpose(0, 1)
                fed = fed.repeat(1, copies, 1)
            return self._stage.run(fed, step, len(rows), rule.rows, positions)

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            hidden = run(x, time)
            found = None
            if hidden is not None:
                found = self._drawing.velocity(rule, samples, self._read_states(rule, samples, hidden), x, time)
            return self._stage.shared(found)

        final = self._drawing.integrated(rule, samples, velocity)
        hidden = run(final, final.new_zeros(()))  # what later positions see
        self._keep(samples, hidden)
        return list(final.view(len(samples), rule.rows, -1).unbind())

    def _step(self, samples: Sequence[Sample], length: int | None = None, whole: bool | None = None) -> Step:
        """The next positions of these samples' rows, mains first."""
        loop, rows = self._loop, rows_of(samples)
        if length is None:
            length, whole = samples[0].writing.rule.rows, samples[0].writing.rule.writing.whole
        starts = loop.to_device([[loop.lengths[row], loop.deltas[row]] for row in rows])
        slots = starts[:, :1] + torch.arange(length, device=self._stage.device)
        sees = slots[:, -1:].expand_as(slots) if whole else slots
        reach = bucketed(max(loop.lengths[row] for row in rows) + length)
        return Step(slots, sees, slots + starts[:, 1:], reach, rows=loop.to_device(rows))

    def _positions(self, rows: Sequence[int], spans: Sequence[Placed], length: int) -> Tensor | None:
        """Int64 `[k, rows, length]` of a run that these rows add; None where it counts on as text."""
        if not spans:
            return None
        loop = self._loop
        run = run_of(spans, length, loop.known.sections)[0]
        return loop.to_device(
            [[[at + loop.lengths[r] + loop.deltas[r] for at in one] for r in rows] for one in run.tolist()]
        )

    def _place(self, sample: Sample, spans: Sequence[Placed], length: int, start: int) -> None:
        """A run that began at `start` of the sample's sequence stays: what follows it stands where its rule says."""
        if not spans:
            return
        sample.placed += [replace(span, start=span.start + start) for span in spans]
        for row in sample.rows:
            self._loop.deltas[row] += run_of(spans, length, self._loop.known.sections)[1] - length

    def next_positions(self, writing: Sequence[Sample], places: Sequence[int]) -> Tensor | None:
        """Int64 `[k, rows, 1]` of a step in which these write a row each; None where all count on.

        `places`: of every row, by counting.
        """
        if all(sample.writing.rule.writing.positions is None for sample in writing):
            return None
        sections = self._loop.known.sections
        held = torch.tensor(places).expand(sections, -1).clone()
        for sample in writing:
            rule, done = sample.writing.rule, len(sample.writing.drawn)
            ahead = run_of(written(rule), rule.rows, sections)[0][:, done] - done
            for row in sample.rows:
                held[:, row] += ahead
        return self._loop.to_device(held.tolist())[..., None]

    def _read_states(self, rule: SpanRule, samples: Sequence[Sample], hidden: Tensor) -> Tensor:
        """States `[rows, R, H]` that decoders read, mains first: at the positions, or at those before."""
        if not rule.own:
            before = self._loop.state.last[self._loop.to_device(rows_of(samples))]
            hidden = torch.cat([before[None], hidden[:-1]])
        return hidden.transpose(0, 1)

    def _keep(self, samples: Sequence[Sample], hidden: Tensor | None, length: int | None = None) -> None:
        """Positions of a step over these samples stay; text goes on from the last."""
        loop, rows = self._loop, rows_of(samples)
        for row in rows:
            loop.lengths[row] += samples[0].writing.rule.rows if length is None else length
        if length is None:
            for sample in samples:
                self._place(sample, written(sample.writing.rule), sample.writing.rule.rows, len(sample.sequence))
        if hidden is not None:
            index = loop.to_device(rows)
            loop.state.last.index_copy_(0, index, hidden[-1])
            loop.state.before.index_copy_(0, index, hidden[-1])

    def _states(self, group: Sequence[Sample], twins: bool = False) -> Tensor | None:
        """States `[b, H]` that these samples' next rows are drawn from; None where they have no second prompts."""
        if twins and group[0].twin is None:
            return None
        rows = [sample.twin if twins else sample.row for sample in group]
        return self._loop.state.last[self._loop.to_device(rows)]

    # What is read again -------------------------------------------------------------------------

    def _read_again(
        self, sample: Sample, rule: SpanRule, part: MediaPart, ends: Sequence[int], counted: int = 0
    ) -> Iterator[Finished]:
        """Has the model read a medium that it wrote, behind the end tokens that were not read yet.

        `counted`: how many of these are in the sample's counts already.
        """
        again, loop = rule.writing.reread, self._loop
        assert again is not None
        token = loop.known.special[rule.modality]
        ids = [*ends, *again.before, *[token] * again.rows, *again.after]
        if sample.room < len(ids) - counted:
            yield loop.end(sample, "length")
            return
        inputs = {rule.modality: again.inputs(part.value)}
        fed = None
        if self._stage.first:
            batch = torch.tensor([ids], device=self._stage.device)
            start = loop.lengths[sample.row] + loop.deltas[sample.row]
            places = torch.arange(start, start + len(ids), device=self._stage.device)[None]
            step_positions = None
            if loop.known.sections > 1:
                step_positions = places.expand(loop.known.sections, 1, -1)  # embedding reads none of them
            elif loop.known.learned:
                step_positions = places
            fed = self._model.embed(batch, step_positions, inputs).repeat(1, len(sample.rows), 1)
            self._model.finish_checks()
        spans = read_again(rule, again, len(ends))
        positions = self._positions(sample.rows, spans, len(ids))
        hidden = self._stage.run(fed, self._step([sample], len(ids), False), len(sample.rows), len(ids), positions)
        self._keep([sample], hidden, len(ids))
        self._place(sample, spans, len(ids), len(sample.sequence) - counted)
        sample.used += len(ids) - counted
        sample.sequence += ids[counted:]
        sample.read.append(inputs)


def groups_of(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that write one modality, with second prompts or without, side by side."""
    groups: dict[tuple[str, bool], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.writing.rule.modality, sample.twin is None), []).append(sample)
    return list(groups.values())


def rows_of(samples: Sequence[Sample]) -> list[int]:
    """Rows of the cache: all main ones, then those of second prompts."""
    return [s.row for s in samples] + [s.twin for s in samples if s.twin is not None]
