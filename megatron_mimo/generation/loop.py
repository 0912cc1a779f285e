"""The loop of one call: which rows run next, what they read, and what becomes of the tokens that come out.

All counts that decide what runs are the host's own and alike on every rank. Rows of the cache belong to samples: one
each, and one more for a sample with a second prompt, which is fed whatever the first is fed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mimo.cached_attention import Step, bucketed
from megatron_mimo.generation.events import Draw, Event, Finished, Sample, Span, Token
from megatron_mimo.generation.graphs import Recorder, Rows
from megatron_mimo.generation.prefill import Embedder
from megatron_mimo.generation.prompts import Known, Request
from megatron_mimo.generation.results import Ended, GenerationOutput, TextPart
from megatron_mimo.generation.sampling import Sampler
from megatron_mimo.generation.spans import SpanRule
from megatron_mimo.generation.stage import Stage
from megatron_mimo.generation.switching import Writer


class Loop:
    """Serves the requests of one call on a borrowed model.

    Args:
        model: a `MimoModel`, borrowed.
        stage: its part on this rank.
        known: of the model.
        requests: prompt index -> request.
        state: the rows' buffers.
        slots: of each row of the cache.
        tokenizer: anything with `decode(ids)`, or None.
        returns: whether a prompt that fails when it is embedded ends alone.
        recorder: of steps that only say text; None runs them as they are.
    """

    def __init__(
        self,
        model: Any,
        stage: Stage,
        known: Known,
        requests: Mapping[int, Request],
        state: Rows,
        slots: int,
        tokenizer: Any,
        returns: bool,
        recorder: Recorder | None = None,
    ) -> None:
        self.model, self.stage, self.known, self.slots = model, stage, known, slots
        self.state, self._recorder = state, recorder
        self._tokenizer, self._returns, self._began = tokenizer, returns, time.perf_counter()
        self.samples: list[Sample] = []
        self._prompts: list[Request] = []
        for index, request in requests.items():
            twin = None if request.unconditional is None else len(self._prompts) + 1
            output = GenerationOutput(prompt_length=len(request.ids))
            sample = Sample(index, request, len(self._prompts), twin, output, sequence=list(request.ids))
            self.samples.append(sample)
            self._prompts += [request] if request.unconditional is None else [request, request.unconditional]
        self.rows = len(self._prompts)
        self.lengths = [len(request.ids) for request in self._prompts]
        self.deltas = [request.delta for request in self._prompts]
        owners = {row: sample for sample in self.samples for row in sample.rows}
        sampler = Sampler([owners[row].request.sampling for row in range(self.rows)], stage.device)
        self._sampler = state.begin(sampler, [owners[row].row for row in range(self.rows)])
        self._allowed: Tensor | None = None
        self._seen: Tensor | None = None
        self._restricted: dict[int, list[int]] = {}
        self._drawn: list[Draw] = []
        self._opened: list[Sample] = []
        self._switches = any(request.writes for request in requests.values())
        self.writer = Writer(self)

    def seconds(self) -> float:
        """Since the call began."""
        return time.perf_counter() - self._began

    def to_device(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers, or a tensor, of the host on the device, without waiting for it."""
        held = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
        if self.stage.device.type == "cpu":
            return held
        return held.pin_memory().to(self.stage.device, non_blocking=True)

    def events(self) -> Iterator[Event]:
        """What happens, in order, until every sample has ended."""
        yield from self._prefill()
        while not all(sample.done for sample in self.samples):
            waiting, self._drawn = self._drawn, []
            self._advance()
            for drawn in waiting:
                yield from self._read(drawn)
            opened, self._opened = self._opened, []
            yield from self.writer.write(opened)

    # Running ------------------------------------------------------------------------------------

    def _prefill(self) -> Iterator[Finished]:
        length = max(self.lengths)
        embedder = Embedder(self.model, self.stage, self.known, self._prompts)
        rows, errors = embedder.rows()
        for row, error in errors.items():
            sample = next(s for s in self.samples if row in s.rows)
            if not self._returns:
                raise ValueError(f"sample {sample.index}: {error}")
            if not sample.done:
                sample.output.error = ValueError(f"sample {sample.index}: {error}")
                yield self.end(sample, "error")
        hidden = self._read_prompts(rows, length, embedder.positions())
        if self.stage.last:
            final = self.to_device([own - 1 for own in self.lengths])
            self.state.last.copy_(hidden[final, torch.arange(self.rows, device=hidden.device)])
            self.state.before.copy_(self.state.last)
        alive = [sample for sample in self.samples if not sample.done]
        self.draw([sample for sample in alive if sample.request.opens is None])
        for sample in alive:
            if sample.request.opens is not None:
                self._open(sample, sample.request.writes[sample.request.opens])

    def _read_prompts(self, rows: Tensor | None, length: int, positions: Tensor | None) -> Any:
        """Hidden states of whole prompts, `[>= length, B, H]`, on the last stage.

        A session that reads as many positions for the second time, counted in buckets, records the pass.
        """

        def run(rows: Tensor | None, places: Tensor, positions: Tensor | None) -> Any:
            step = Step(places, places, places, bucketed(places.shape[1]), fresh=True)
            return self.stage.run(rows, step, self.rows, places.shape[1], positions)

        if self._recorder is not None and rows is not None:
            held = self.state.prompts(rows, positions, bucketed(length))
            if held is not None:
                key = ("prompts", *held.places.shape)
                self._recorder.run(key, lambda: held.hidden.copy_(run(held.rows, held.places, held.positions)), [])
                return held.hidden
        return run(rows, torch.arange(length, device=self.stage.device).expand(self.rows, -1), positions)

    def _advance(self) -> None:
        """One new position of each sample that has one to run: its last token, or the next row of its span."""
        speaking = [s for s in self.samples if not s.done and s.span is None and s.ready and s.room > s.flying]
        writing = [s for s in self.samples if s.span is not None and s.span.goes_on]
        active = speaking + writing
        if not active:
            return
        runs = {row for sample in active for row in sample.rows}
        idle = self.slots - 1
        slots = [self.lengths[row] if row in runs else idle for row in range(self.rows)]
        sees = [self.lengths[row] if row in runs else 0 for row in range(self.rows)]
        places = [self.lengths[row] + self.deltas[row] if row in runs else 0 for row in range(self.rows)]
        self.state.packed.copy_(self.to_device([slots, sees, places]))
        reach = self._reach(max(sees) + 1)
        self._remember(speaking)
        if not writing:
            self._number(speaking)
            self._say(reach)
        else:
            self._switch(writing, reach, self.writer.next_positions(writing, places))
        for row in runs:
            self.lengths[row] += 1
        if writing:
            self.draw(speaking + self.writer.stepped(writing))
        else:
            self._send(speaking)

    def _reach(self, length: int) -> int:
        """Slots that attention reads. Each number that comes up is recorded and compiled, so that there are few."""
        if self._recorder is None and self.stage.fused is None:
            return bucketed(length)
        return min(max(256, 1 << (length - 1).bit_length()), self.slots)

    def _say(self, reach: int) -> None:
        """A step in which every row that runs reads its token and draws the next."""

        def step() -> None:
            rows = None
            if self.stage.first:
                rows = self.stage.embed_tokens(self.state.ids[:, None], self.state.packed[2][:, None])
            ran = self._run(rows, reach)
            self._draw(ran)

        if self._recorder is None or self._sampler.penalises:
            step()
            return
        key = (reach, self._sampler.greedy, self._switches)
        self._recorder.run(key, step, self.state.changing)

    def _switch(self, writing: Sequence[Sample], reach: int, positions: Tensor | None) -> None:
        """A step in which some rows read what a decoder has drawn for them."""
        fed = self.writer.next_rows(writing)
        rows = None
        if self.stage.first:
            rows = self.stage.embed_tokens(self.state.ids[:, None], self.state.packed[2][:, None])
        if fed is not None and rows is not None:
            index, values = fed
            rows = rows.index_copy(1, index, values[None].to(rows.dtype))
        self._run(rows, reach, positions)

    def _run(self, rows: Tensor | None, reach: int, positions: Tensor | None = None) -> Tensor:
        """Runs the model on one position of each row; gives bool `[rows]`, which had one."""
        state = self.state
        slots, sees, places = (column[:, None] for column in state.packed)
        hidden = self.stage.run(rows, Step(slots, sees, places, reach), self.rows, 1, positions)
        ran = slots[:, 0] != self.slots - 1
        if self.stage.last:
            if self._switches:
                state.before.copy_(torch.where(ran[:, None], state.last, state.before))
            state.last.copy_(torch.where(ran[:, None], hidden[0], state.last))
        return ran

    # Drawing ------------------------------------------------------------------------------------

    def draw(self, samples: Sequence[Sample]) -> None:
        """Draws the next token of each of these from `last`; it is read after the next step has begun."""
        if not samples:
            return
        self._number(samples)
        mine = {sample.row for sample in samples}
        self._draw(self.to_device([row in mine for row in range(self.rows)], torch.bool))
        self._send(samples)

    def _number(self, samples: Sequence[Sample]) -> None:
        """Puts the number that each of these samples' draws reads into its place."""
        if self._sampler.greedy:
            return
        counts = [0] * self.rows
        for sample in samples:
            counts[sample.row] = sample.tokens + sample.flying
        self.state.uniforms.copy_(self.to_device(self._sampler.uniforms(counts).tolist(), torch.float64))

    def _draw(self, new: Tensor) -> None:
        """Draws for all rows; those of `new`, bool `[rows]`, and their second prompts' read it next."""
        state, drawn = self.state, torch.zeros_like(self.state.drawn)
        if self.stage.last:
            logits = self.stage.logits(state.last)
            size = logits.shape[-1]
            uniforms = None if self._sampler.greedy else state.uniforms
            found = self._sampler.draw(logits, self._allowed_in(size), uniforms, self._seen_in(size))
            drawn = torch.stack([column.double() for column in found])
        state.drawn.copy_(torch.stack(self.stage.agreed(*drawn.unbind())))
        said = state.drawn[0].long()[state.main]
        state.ids.copy_(torch.where(new[state.main], said, state.ids))

    def _send(self, samples: Sequence[Sample]) -> None:
        """Sends what was drawn for these samples on its way to the host."""
        for sample in samples:
            sample.flying, sample.ready = sample.flying + 1, True
        values, event = self.state.drawn, None
        if values.device.type == "cuda":
            held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            held.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            held = values.clone()
        self._drawn.append(Draw([(sample, sample.epoch) for sample in samples], held, event))

    def _allowed_in(self, size: int) -> Tensor:
        """Bool `[rows, V]`: what each row may say."""
        if self._allowed is None:
            sayable = torch.stack([self._sayable(row, size) for row in range(self.rows)])
            self._allowed = self.state.allow(self.to_device(sayable))
        return self._allowed

    def _sayable(self, row: int, size: int) -> Tensor:
        """Bool `[size]` on the host: what a row may say."""
        tokens = self._restricted.get(row)
        if tokens is None:
            return self.known.sayable(self._prompts[row].writes, size)
        allowed = torch.zeros(size, dtype=torch.bool)
        allowed[tokens] = True
        return allowed

    def restrict(self, sample: Sample, tokens: Sequence[int] | None) -> None:
        """From now on a sample may say these tokens alone; None for all that its request allows."""
        if tokens is None and self._restricted.pop(sample.row, None) is None:
            return
        if tokens is not None:
            self._restricted[sample.row] = list(tokens)
        if self._allowed is not None:
            size = self._allowed.shape[1]
            self._allowed[sample.row] = self.to_device(self._sayable(sample.row, size))

    def _seen_in(self, size: int) -> Tensor | None:
        """Bool `[rows, V]`, tokens of prompts and answers, where anybody penalises them."""
        if not self._sampler.penalises:
            return None
        if self._seen is None:
            seen = torch.zeros(self.rows, size, dtype=torch.bool)
            for row, request in enumerate(self._prompts):
                seen[row, [token for token in request.ids if 0 <= token < size]] = True
            self._seen = self.to_device(seen)
        return self._seen

    def _remember(self, speaking: Sequence[Sample]) -> None:
        """Marks tokens as said when they are read by the model; some that were drawn never are."""
        if self._seen is None:
            return
        said = self.to_device([row in {s.row for s in speaking} for row in range(self.rows)], torch.bool)
        index = torch.arange(self.rows, device=self.stage.device)
        self._seen[index, self.state.ids] |= said

    # Reading ------------------------------------------------------------------------------------

    def _read(self, drawn: Draw) -> Iterator[Event]:
        """Accepts tokens that have arrived, unless they were dropped meanwhile."""
        if drawn.event is not None:
            drawn.event.synchronize()
        columns = drawn.values.tolist()
        for sample, epoch in drawn.samples:
            if sample.done or sample.epoch != epoch:
                continue
            sample.flying -= 1
            token = int(columns[0][sample.row])
            if sample.span is not None and token == sample.span.rule.token:
                continue  # a span of variable length goes on
            if sample.span is not None:
                yield from self.writer.ended(sample)
                yield self.accept(sample, token, columns[1][sample.row], columns[2][sample.row])
                yield from self.writer.follow_end(sample, token)
            else:
                yield from self._said(sample, token, columns[1][sample.row], columns[2][sample.row])
            reason = None if sample.done or sample.span is not None else self._ending(sample, token)
            if reason is not None:
                yield self.end(sample, reason)

    def _said(self, sample: Sample, token: int, logprob: float, sampling_logprob: float) -> Iterator[Token]:
        """Text, or what opens a span."""
        rule = next((r for r in sample.request.writes.values() if r.opening == token), None)
        if rule is not None and rule.begin is None:
            self._open(sample, rule, labelled=True)
            return
        yield self.accept(sample, token, logprob, sampling_logprob)
        if rule is not None:
            self._open(sample, rule)

    def accept(self, sample: Sample, token: int, logprob: float, sampling_logprob: float) -> Token:
        """Adds a token to a sample's text."""
        if sample.text is None:
            sample.text, sample.logprobs, sample.said = TextPart(started=self.seconds()), [], ""
            sample.output.parts.append(sample.text)
        if not sample.tokens and not sample.output.first_token:
            sample.output.first_token = self.seconds()
        sample.text.ids.append(token)
        sample.learned.append(len(sample.sequence))
        sample.sequence.append(token)
        sample.logprobs.append((logprob, sampling_logprob))
        sample.used += 1
        sample.tokens += 1
        added = None
        if self._tokenizer is not None:
            text = self._tokenizer.decode(sample.text.ids)
            added, sample.said = text[len(sample.said) :], text
        return Token(sample.index, token, logprob, sampling_logprob, added)

    def _ending(self, sample: Sample, token: int) -> Ended | None:
        if token in sample.request.stop_ids:
            return "stop_id"
        if any(stop in sample.said for stop in sample.request.stop_strings):
            return "stop_string"
        return None if sample.room else "length"

    def close_text(self, sample: Sample) -> None:
        """Ends the text part in progress."""
        if sample.text is None:
            return
        part, pairs = sample.text, torch.tensor(sample.logprobs, dtype=torch.float32).reshape(-1, 2)
        part.logprobs, part.sampling_logprobs = pairs[:, 0].clone(), pairs[:, 1].clone()
        part.text = None if self._tokenizer is None else sample.said
        part.ended = self.seconds()
        sample.text = None

    def end(self, sample: Sample, reason: Ended) -> Finished:
        """Ends a sample."""
        self.close_text(sample)
        sample.output.reason, sample.output.seconds = reason, self.seconds()
        sample.span = None
        sample.drop_flying()
        return Finished(sample.index, sample.output)

    def _open(self, sample: Sample, rule: SpanRule, labelled: bool = False) -> None:
        """A sample has begun a span; whatever was drawn after it is dropped.

        `labelled`: its first position is read as text already, where there was room for that.
        """
        consumed = labelled and bool(sample.flying)
        sample.drop_flying()
        sample.span = Span(rule, labelled=consumed)
        self._opened.append(sample)
