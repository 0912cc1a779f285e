"""How one modality is written: hidden states -> output projection -> decoder -> loss or samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_mimo.decoders.arguments import check_sample_options
from megatron_mimo.decoders.base import Decoder, PositionRule
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.decoders.prepared import Prepared, Targets
from megatron_mimo.decoders.targets import TargetDescription
from megatron_mimo.idle import stand_in
from megatron_mimo.losses import LossTerm
from megatron_mimo.modality.encoding import check_nested, projected
from megatron_mimo.modality.fit import own_projections, per_module
from megatron_mimo.modality.seam import in_dtype_of
from megatron_mimo.modality.zeros import with_zeros


class Writing(nn.Module):
    """The writing half of a modality's submodules, on the pipeline stages that have any of it.

    Attributes:
        decoders: name -> `Decoder`; on the last stage.
        output_projections: none, one for all decoders, or one each in their order; on the last stage.
        generation_input: what the language model sees at the generation tokens, or None; on the first stage.
    """

    # `nn.ModuleDict` and `nn.ModuleList`, whose own types do not say what they hold.
    decoders: Mapping[str, Decoder]
    output_projections: Sequence[nn.Module]
    generation_input: GenerationInput | None

    def prepare(self, targets: Mapping[str, Targets], stream: str = "") -> dict[str, Prepared]:
        """Targets checked, counted, and completed with this microbatch's random draws, by decoder.

        Args:
            targets: decoder name -> its keyword targets.
            stream: prefix of the random stream, the modality's name.

        Returns:
            The targets that something on this stage reads: a decoder, or the generation input.

        Raises:
            TypeError: targets that are no mappings of tensors.
            ValueError: an unknown decoder, a keyword missing or unknown, or a shape that does not fit.
        """
        where = f"modality_targets[{stream!r}]"
        check_nested(where, targets, "decoder name -> its targets")
        prepared = {}
        for name, takes in self._readers([*targets], where).items():
            check_nested(f"{where}[{name!r}]", targets[name], "keyword -> value")
            if takes is not None:
                prepared[name] = takes.prepared(targets[name], f"{stream}/{name}")
        return prepared

    def rows_of(self, targets: Mapping[str, Targets], stream: str = "") -> dict[str, int]:
        """How many rows targets stand for, by decoder: `prepare` without what draws, or what runs a tokenizer.

        Args:
            targets, stream: as `prepare` takes them; the tensors may lie where no decoder is.

        Raises:
            TypeError, ValueError: as `prepare`.
        """
        where = f"modality_targets[{stream!r}]"
        check_nested(where, targets, "decoder name -> its targets")
        rows = {}
        for name, takes in self._readers([*targets], where).items():
            target = targets[name]
            check_nested(f"{where}[{name!r}]", target, "keyword -> value")
            if takes is None:
                continue
            rows[name] = takes.num_rows(target)
            if takes.targets is not None:
                beside = {key: target[key] for key in takes.targets.optional if key in target}
                takes.targets.check_beside(beside, f"targets of {stream}/{name}: ")
        return rows

    def prepare_shown(self, modality: str, given: Targets) -> Prepared | None:
        """Inputs of the generation input, shown without a loss, checked and counted; None on a stage without it.

        Args:
            modality, given: its name, for messages; keyword -> value.

        Raises:
            TypeError: no mapping of tensors.
            ValueError: the generation input reads none, or others.
        """
        check_nested(f"generation_inputs[{modality!r}]", given, "keyword -> value")
        feed = self.generation_input
        return None if feed is None else feed.prepared(given, modality)

    def generation_rows(self, given: Targets | None, num_rows: int, like: Tensor) -> Tensor:
        """Rows `[num_rows, H]` that the language model sees at the generation tokens.

        Args:
            given: targets that the generation input reads, prepared or not; None where it reads none.
            num_rows: `N`.
            like: any tensor whose last dim is `H`, with the rows' dtype and device.
        """
        feed = cast(GenerationInput, self.generation_input)  # without one the model asks for no rows
        if not num_rows:
            return stand_in([feed], like)
        return with_zeros(feed(given, num_rows).to(like.dtype), feed)

    def loss(
        self, hidden: Tensor, targets: Mapping[str, Targets], share: tuple[int, int] = (0, 1)
    ) -> dict[str, LossTerm]:
        """Loss term of every decoder, on every rank the same names; zero over zero without targets.

        Args:
            hidden: `[N, H]`, all rows of the data-parallel rank's microbatch.
            targets: decoder name -> its targets for all `N` rows, as `prepare` gave them. (A plain mapping is
                prepared by its decoder.)
            share: (rank, size) in the context-parallel group; each rank decodes its contiguous
                share of the items, and the terms add up over the group.
        """
        own = own_projections(self.output_projections, self.decoders)
        shared = [] if own or targets else list(self.output_projections)
        terms = {}
        for name, decoder in self.decoders.items():
            if name in targets:
                terms[name] = self._decoder_loss(name, hidden, targets[name], share)
            else:
                idle = stand_in([*shared, *own.get(name, ()), decoder], hidden).sum(dtype=torch.float32)
                terms[name] = LossTerm(idle, idle.new_zeros(()))
        return terms

    def _decoder_loss(self, name: str, hidden: Tensor, target: Targets, share: tuple[int, int]) -> LossTerm:
        decoder, (rank, size) = self.decoders[name], share
        items = hidden.shape[0] // decoder.rows_per_item  # in shares that differ by at most one
        start, stop = items * rank // size, items * (rank + 1) // size
        target = decoder.prepared(target)
        if size > 1:
            target = decoder.share(target, start, stop)
        mine = hidden[start * decoder.rows_per_item : stop * decoder.rows_per_item]
        term = decoder.loss(self.rows_for(name, mine), target)
        # A layer that this loss does not reach gets zeros, as one of an encoder does.
        return replace(term, sum=with_zeros(term.sum[None], decoder, given=hidden)[0])

    def rows_for(self, decoder: str, hidden: Tensor) -> Tensor:
        """Rows `[N, W]` that a decoder takes: hidden states through its output projection.

        Args:
            decoder: its name.
            hidden: `[N, H]` hidden states at the generation tokens, as in `ModalityOutput.hidden`.

        Returns:
            `[N, W]`, with gradient, in the decoder's dtype; `hidden` itself without a projection where that is its
            own. Equal on tensor- and context-parallel ranks if `hidden` is.

        Raises:
            ValueError: no such decoder.

        Example:
            >>> from megatron_mimo import ModalitySubmodules
            >>> from megatron_mimo.decoders import RegressionDecoder
            >>> images = ModalitySubmodules(decoders={"features": RegressionDecoder(width=4)},
            ...     output_projections=[nn.Linear(8, 4)])
            >>> images.rows_for("features", torch.zeros(3, 8)).shape
            torch.Size([3, 4])
        """
        decoder = self.decoder_name(decoder)
        projection = per_module(self.output_projections, self.decoders).get(decoder)
        rows = hidden if projection is None else projected(projection, hidden)
        return in_dtype_of(self.decoders[decoder], rows)

    def decode(
        self,
        hidden: Tensor,
        decoder: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Tensor:
        """A decoder's output for `hidden`, e.g. images or waveforms.

        Args:
            hidden: `[N, H]` hidden states at the generation tokens.
            decoder: which one; may be left out where there is only one.
            options: keyword options of the decoder's `sample`, e.g. steps or a temperature.
                `unconditional_rows`, hidden states `[N, H]` too, go through the same projection.

        Raises:
            TypeError: an option that its `sample` does not take.
            ValueError: no such decoder, or several and none named.
        """
        name = self.check_options(decoder, options)
        chosen: dict[str, Any] = dict(options or {})
        if chosen.get("unconditional_rows") is not None:
            chosen["unconditional_rows"] = self.rows_for(name, chosen["unconditional_rows"])
        return self.finish(self.decoders[name].sample(self.rows_for(name, hidden), **chosen), name)

    def check_options(self, decoder: str | None, options: Mapping[str, object] | None, where: str = "") -> str:
        """The name of a decoder, whose `sample` takes these options.

        Args:
            decoder: a name; may be None where there is only one.
            options: keyword options, or None.
            where: what named it, for the error.

        Raises:
            TypeError: an option that it does not take, or no mapping.
            ValueError: no such decoder, or several and none named.
        """
        name = self.decoder_name(decoder, where)
        of = f"{where or 'options'}[{name!r}]"
        check_nested(of, options or {}, "option -> value")
        check_sample_options(self.decoders[name], options or {}, of)
        return name

    def finish(self, samples: Tensor, decoder: str | None = None) -> Tensor:
        """Images, waveforms, ... of what a decoder's `sample` gave, rendered and assembled.

        Args:
            samples: of all rows, in their order.
            decoder: which one's; may be left out where there is only one.

        Raises:
            ValueError: no such decoder, or several and none named.
        """
        return self.assemble(self.decoders[self.decoder_name(decoder)].render(samples))

    def decoder_name(self, decoder: str | None, where: str = "") -> str:
        """The name of one decoder, which may be None where there is only one.

        Args:
            decoder: a name or None.
            where: what named it, for the error.

        Raises:
            ValueError: no such decoder, or several and none named.
        """
        if decoder is None and len(self.decoders) == 1:
            decoder = next(iter(self.decoders))
        if decoder is None or decoder not in self.decoders:
            named = f"{where} names decoder {decoder!r}, which" if where else f"decoder {decoder!r}"
            raise ValueError(f"{named} is not one of {sorted(self.decoders)}; name one of them")
        return decoder

    def assemble(self, samples: Tensor) -> Tensor:
        """The modality's own form of what a decoder sampled. Here: as it is."""
        return samples

    def span_of(self, decoder: str) -> int:
        """Rows that one item of a decoder takes, 1 where nothing on this stage knows."""
        described = self._described(decoder)
        return 1 if described is None else described.rows_per_item

    def medium_of(self, decoder: str) -> int:
        """Rows of one image or clip of a decoder, 1 where nothing on this stage knows.

        Where samples are patches or frames that `assemble` puts together, whole items of them that make
        whole images or clips.
        """
        described = self._described(decoder)
        if described is None:
            return 1
        if described.sampled_rows is None or self.spans_vary:
            return described.rows_per_medium
        given, width = described.sampled_rows
        return math.lcm(given, self.samples_per_medium(width)) // given * described.rows_per_item

    def samples_per_medium(self, width: int) -> int:
        """How many samples of `width` values `assemble` makes one image or clip of. Here: 1."""
        del width
        return 1

    @property
    def spans_vary(self) -> bool:
        """Whether the decoders on this stage write media of a variable number of rows, which an end token ends."""
        targets = [decoder.targets for decoder in self.decoders.values()]
        return any(one is not None and one.variable for one in targets)

    @property
    def rows_shown_together(self) -> int:
        """Generation tokens that the generation input fills together, 1 without one on this stage."""
        return 1 if self.generation_input is None else self.generation_input.rows_per_item

    @property
    def position_rule(self) -> PositionRule:
        """Which hidden states the decoders read: "own" or "predecessor"."""
        return next((decoder.position_rule for decoder in self.decoders.values()), "own")

    def _readers(self, names: Sequence[str], where: str) -> dict[str, Decoder | GenerationInput | None]:
        """Who reads each decoder's targets on this stage, if anything does; `where` names them in an error."""
        if self.decoders:
            for name in names:
                self.decoder_name(name, where)
        return {name: self._reader_of(name) for name in names}

    def _reader_of(self, name: str) -> Decoder | GenerationInput | None:
        """Who reads a decoder's targets on this stage: itself, or what feeds its positions."""
        if name in self.decoders:
            return self.decoders[name]
        feed = self.generation_input
        return feed if feed is not None and feed.reads(name) else None

    def _described(self, name: str) -> Decoder | TargetDescription | None:
        """What knows how many rows an item of a decoder takes: itself, or the description that the input has of it."""
        if name in self.decoders:
            return self.decoders[name]
        takes = self._reader_of(name)
        return None if takes is None else takes.targets
