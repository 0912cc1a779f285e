"""What decoders draw for a span's rows, each sample from a seed of its own, and what the language model sees of it.

Shapes: `b` samples that write together, `R` rows of a span, `M` targets of it, `H` hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mimo.decoders.discrete import DiscreteDecoder
from megatron_mimo.decoders.guidance import guided
from megatron_mimo.decoders.rectified_flow import RectifiedFlowDecoder, integrate
from megatron_mimo.generation.events import Sample
from megatron_mimo.generation.sampling import Sampler, Sampling, generator_seed, uniform
from megatron_mimo.generation.spans import SpanRule
from megatron_mimo.generation.stage import Stage


class Drawing:
    """Calls a model's decoders, on the last stage, and its generation inputs, on the first.

    Args:
        model: a `MimoModel`.
        stage: its part on this rank.
    """

    def __init__(self, model: Any, stage: Stage) -> None:
        self._model, self._stage = model, stage
        self._samplers: dict[tuple[str, int], Sampler] = {}

    # First stage --------------------------------------------------------------------------------

    @property
    def _like(self) -> Tensor:
        return self._model.language_model.embedding.word_embeddings.weight

    def queries(self, rule: SpanRule, count: int) -> Tensor:
        """Rows `[count, H]` that do not depend on what is drawn."""
        return self._model.modality_submodules[rule.modality].generation_rows(None, count, self._like)

    def fed(self, rule: SpanRule, drawn: Tensor, count: int) -> Tensor:
        """Rows `[count, H]` that show what was drawn for as many positions."""
        submodule = self._model.modality_submodules[rule.modality]
        return submodule.generation_rows(self.shown(rule, drawn), count, self._like)

    def shown(self, rule: SpanRule, drawn: Tensor) -> dict[str, Tensor]:
        """What was drawn, as the modality's generation input takes it; of a flow its end, at time 0."""
        feed = self._model.modality_submodules[rule.modality].generation_input
        if rule.style == "flow":
            return {"x": drawn, "time": drawn.new_zeros(len(drawn) // feed.rows_per_item)}
        (keyword,) = feed.blank(1)
        return {keyword: drawn}

    def noised(self, rule: SpanRule, x: Tensor, time: Tensor) -> Tensor:
        """Rows `[b * R, H]` that show a solver's state `[b * R, D]`."""
        submodule = self._model.modality_submodules[rule.modality]
        items = len(x) // submodule.generation_input.rows_per_item
        return submodule.generation_rows({"x": x, "time": time.expand(items)}, len(x), self._like)

    # Last stage ---------------------------------------------------------------------------------

    def next(self, rule: SpanRule, group: Sequence[Sample], states: Tensor | None, contrast: Tensor | None) -> Tensor:
        """What is drawn for the next row of each of these samples, `[b, ...]`, from states `[b, H]`."""
        submodule = self._model.modality_submodules[rule.modality]
        rows = submodule.rows_for(rule.decoder, states)
        null = None if contrast is None else submodule.rows_for(rule.decoder, contrast)
        decoder = submodule.decoders[rule.decoder]
        if type(decoder).sample is DiscreteDecoder.sample:
            return self._codes(rule, decoder, rows, null, group)
        return torch.cat(
            [
                self._sampled(
                    rule, decoder, rows[i : i + 1], None if null is None else null[i : i + 1], sample,
                    len(sample.writing.drawn),
                )
                for i, sample in enumerate(group)
            ]
        )  # fmt: skip

    def whole(self, rule: SpanRule, samples: Sequence[Sample], states: Tensor) -> Iterator[Tensor]:
        """What is drawn for each sample's whole span, from states `[rows, R, H]`, mains first.

        Rectified flows are integrated side by side, each from its own sample's noise.
        """
        submodule = self._model.modality_submodules[rule.modality]
        decoder = submodule.decoders[rule.decoder]
        if type(decoder).sample is RectifiedFlowDecoder.sample:
            yield from self._flows(rule, decoder, samples, states)
            return
        for place, sample in enumerate(samples):
            rows = submodule.rows_for(rule.decoder, states[place])
            null = None
            if sample.twin is not None:
                null = submodule.rows_for(rule.decoder, states[len(samples) + place])
            yield self._sampled(rule, decoder, rows, null, sample, 0)

    def _flows(
        self, rule: SpanRule, decoder: RectifiedFlowDecoder, samples: Sequence[Sample], states: Tensor
    ) -> Iterator[Tensor]:
        submodule = self._model.modality_submodules[rule.modality]
        options: dict[str, Any] = dict(rule.writing.options)
        if samples[0].twin is not None and rule.guidance != 1:
            twins = states[len(samples) :].flatten(0, 1)
            options["unconditional_rows"] = submodule.rows_for(rule.decoder, twins)
        rows = submodule.rows_for(rule.decoder, states[: len(samples)].flatten(0, 1))
        targets = rule.rows // decoder.rows_per_item * decoder.targets_per_item
        drawn = decoder.sample(rows, noise=self._noise(samples, targets, decoder.target_width), **options)
        yield from drawn.split(targets)

    def _noise(self, samples: Sequence[Sample], rows: int, width: int) -> Tensor:
        """Noise `[b * rows, width]`, each sample's from its own seed."""
        device = self._stage.device
        return torch.cat([torch.randn(rows, width, generator=self._generator(s, 0), device=device) for s in samples])

    def _sampled(
        self, rule: SpanRule, decoder: Any, rows: Tensor, null: Tensor | None, sample: Sample, place: int
    ) -> Tensor:
        options: dict[str, Any] = dict(rule.writing.options)
        takes = inspect.signature(decoder.sample).parameters
        if null is not None and rule.guidance != 1:
            options["unconditional_rows"] = null
        if "generator" in takes:
            options["generator"] = self._generator(sample, place)
        return decoder.sample(rows, **options)

    def _generator(self, sample: Sample, place: int) -> torch.Generator:
        seed = generator_seed(sample.request.sampling.seed, 1, sample.media, place)
        return torch.Generator(self._stage.device).manual_seed(seed)

    def _codes(
        self, rule: SpanRule, decoder: DiscreteDecoder, rows: Tensor, null: Tensor | None, group: Sequence[Sample]
    ) -> Tensor:
        """Codes `[b]` or `[b, K]` of all samples at once, by numbers from their own counters."""
        logits = decoder.logits(rows)
        if rule.guidance != 1:
            contrast = decoder.condition_dropout.unconditional(rows, null)
            logits = tuple(guided(*pair, rule.guidance) for pair in zip(logits, decoder.logits(contrast)))
        sampler = self._sampler(rule, len(group))
        codes = []
        for book, of_book in enumerate(logits):
            numbers = None
            if not sampler.greedy:
                numbers = torch.tensor(
                    [uniform(s.request.sampling.seed, 1, s.media, len(s.writing.drawn), book) for s in group],
                    dtype=torch.float64,
                ).to(of_book.device, non_blocking=True)
            everything = torch.ones(of_book.shape[1], dtype=torch.bool, device=of_book.device)
            codes.append(sampler.draw(of_book, everything, numbers).ids)
        return torch.stack(codes, dim=1) if len(codes) > 1 else codes[0]

    def _sampler(self, rule: SpanRule, count: int) -> Sampler:
        key = (rule.modality, count)
        if key not in self._samplers:
            named = {name: rule.writing.options.get(name) for name in ("temperature", "top_k", "top_p")}
            given: dict[str, Any] = {"temperature": 1.0} | {k: v for k, v in named.items() if v is not None}
            self._samplers[key] = Sampler([Sampling(**given)] * count, self._stage.device)
        return self._samplers[key]

    def velocity(self, rule: SpanRule, samples: Sequence[Sample], states: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The flow's velocity `[b * R, D]` at `x`, from states `[rows, R, H]`, mains first."""
        submodule = self._model.modality_submodules[rule.modality]
        decoder = submodule.decoders[rule.decoder]
        rows = submodule.rows_for(rule.decoder, states[: len(samples)].flatten(0, 1))
        found = decoder.velocity(rows, x, time)
        if rule.guidance == 1:
            return found
        null = None
        if samples[0].twin is not None:
            null = submodule.rows_for(rule.decoder, states[len(samples) :].flatten(0, 1))
        null = decoder.condition_dropout.unconditional(rows, null)
        return guided(found, decoder.velocity(null, x, time), rule.guidance)

    # Every stage --------------------------------------------------------------------------------

    def integrated(
        self, rule: SpanRule, samples: Sequence[Sample], velocity: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Targets `[b * R, D]` of a flow, float32, from each sample's own noise."""
        noise = self._noise(samples, rule.rows, rule.width)
        given = {name: rule.writing.options[name] for name in ("solver", "shift") if name in rule.writing.options}
        return integrate(velocity, noise, steps=rule.writing.options.get("steps", 25), **given)
