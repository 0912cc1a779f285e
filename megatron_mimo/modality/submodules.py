"""One modality's encoders, projections and decoders, and what connects them to the language model."""

from __future__ import annotations

import inspect
import math
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from torch import Tensor, nn

from megatron_mimo.assemble import frames_to_waveforms, patch_grid, patches_to_images
from megatron_mimo.build import build, constructor_parameters
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.inputs import GenerationInput
from megatron_mimo.idle import stand_in, with_idle
from megatron_mimo.losses import LossTerm
from megatron_mimo.modality.fit import input_width, output_width
from megatron_mimo.sharded_state import sharded_state_dict

Inputs = Mapping[str, Mapping[str, Tensor]]


class ModalitySubmodules(ABC, nn.Module):
    """Everything between one modality's raw data and the language model's hidden width.

    Reading: `encode` runs each encoder that has inputs, flattens its output to rows, projects
    them to the language model's width and returns `[N, H]`. Writing: `loss` and `decode` take
    the `[N, H]` hidden states at the modality's generation tokens through an output projection
    to the decoders. Override `encode` or `decode` for anything special.

    Args:
        encoders: name -> module called with its keyword inputs. It returns `[B, s, h]`,
            `[n, h]`, or a tuple or mapping whose first element is one of these.
        decoders: name -> `Decoder`. All read by one position rule.
        input_projections: none, one for all encoders (their widths are equal), or one per
            encoder in the order of `encoders`.
        output_projections: none, one for all decoders, or one per decoder in their order.
        generation_input: what the language model sees at the generation tokens; None for the
            token's own embedding.
        combine: how rows of several encoders follow each other. `"concatenate"`: all of the
            first, then all of the second. `"interleave"`: item by item (all return `[n, s, h]`
            with equal n), for encoders that see the same images. None concatenates, and refuses
            where several encoders return the same number of items, two or more, since that looks
            like the same images.

    Raises:
        ValueError: projections that match neither one nor each of their encoders or decoders,
            widths that do not fit together, decoders with different position rules, or modules
            set to sequence parallelism.

    Example:
        >>> images = VisionModalitySubmodules(encoders={"flatten": nn.Flatten(2)})
        >>> images.encode({"flatten": {"input": torch.zeros(2, 4, 3, 3)}}).shape
        torch.Size([8, 9])
    """

    #: What users call an input -> what encoders of this modality may call it instead.
    input_aliases: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, Decoder] | None = None,
        input_projections: Sequence[nn.Module] | None = None,
        output_projections: Sequence[nn.Module] | None = None,
        generation_input: GenerationInput | None = None,
        combine: Literal["concatenate", "interleave"] | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders or {})
        self.decoders = nn.ModuleDict(decoders or {})
        self.input_projections = nn.ModuleList(input_projections or [])
        self.output_projections = nn.ModuleList(output_projections or [])
        self.generation_input = generation_input
        if combine not in ("concatenate", "interleave", None):
            raise ValueError(f"combine must be 'concatenate', 'interleave' or None, got {combine!r}")
        self.combine = combine
        _check_count("input_projections", self.input_projections, "encoders", self.encoders)
        _check_count("output_projections", self.output_projections, "decoders", self.decoders)
        self._check_parts()
        self._accepted = {name: _keyword_names(module) for name, module in self.encoders.items()}

    @classmethod
    def from_spec(
        cls,
        spec: ModuleSpec,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection=None,
    ) -> Self:
        """The submodules that one pipeline stage needs.

        Args:
            spec: `params` go to the constructor, `submodules` name what to build.
            pre_process: build encoders, input projections and the generation input.
            post_process: build output projections and decoders.
            pg_collection: given to every module whose constructor takes it.
        """
        parts = spec.submodules or {}
        offered = {} if pg_collection is None else {"pg_collection": pg_collection}

        def built(key: str, wanted: bool):
            specs = parts.get(key) if wanted else None
            if isinstance(specs, Mapping):
                return {name: build(item, offered) for name, item in specs.items()}
            return [build(item, offered) for item in specs or ()]

        _check_generation_specs(parts)  # here, since one stage may build only one of the two
        feed = parts.get("generation_input") if pre_process else None
        return cls(
            encoders=built("encoders", pre_process) or None,
            decoders=built("decoders", post_process) or None,
            input_projections=built("input_projections", pre_process),
            output_projections=built("output_projections", post_process),
            **({} if feed is None else {"generation_input": build(feed, offered)}),
            **(spec.params or {}),
        )

    # Reading ------------------------------------------------------------------------------

    def encode(self, inputs: Inputs) -> Tensor:
        """Projected rows `[N, H]` of this modality, rank-local to the data-parallel rank.

        Args:
            inputs: encoder name -> its keyword inputs; encoders that are not named are skipped.
        """
        rows, _ = self._encode_items(inputs)
        return rows

    def encode_items(self, inputs: Inputs) -> tuple[Tensor, list[int] | None]:
        """`encode(inputs)`, and how many rows each image or clip gave, None where that is unknown.

        The counts serve to name the right sample in an error.
        """
        if self.encode_is_overridden:
            return self.encode(inputs), None
        return self._encode_items(inputs)

    def _encode_items(self, inputs: Inputs) -> tuple[Tensor, list[int] | None]:
        own = self._own(self.input_projections, self.encoders)
        outputs, idle = {}, []
        for name, encoder in self.encoders.items():
            if name not in inputs:
                idle.append(stand_in([encoder, *own.get(name, ())]))
                continue
            rows = self._run_encoder(name, inputs[name])
            for projection in own.get(name, ()):
                rows = _projected(projection(rows))
            outputs[name] = rows
        combined = self.combine_rows(outputs)
        if len(self.input_projections) == 1:
            combined = _projected(self.input_projections[0](combined))
        return with_idle(combined.flatten(0, -2), idle), self._rows_per_item(outputs)

    def _rows_per_item(self, outputs: Mapping[str, Tensor]) -> list[int] | None:
        if any(rows.dim() != 3 for rows in outputs.values()):
            return None
        shapes = [rows.shape for rows in outputs.values()]
        if self.combine == "interleave":
            return [sum(shape[1] for shape in shapes)] * shapes[0][0]
        return [length for count, length, _ in shapes for _ in range(count)]

    def encode_nothing(self, like: Tensor) -> Tensor:
        """Rows `[0, H]` in place of `encode` for a batch that has no input of this modality.

        Args:
            like: any tensor whose last dim is `H`, with the rows' dtype and device.
        """
        writing = {"decoders", "output_projections", "generation_input"}
        return stand_in((part for name, part in self.named_children() if name not in writing), like)

    def combine_rows(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """One `[N, h]` or `[n, s, h]` from the outputs of several encoders, in their order."""
        if len(outputs) == 1:
            return next(iter(outputs.values()))
        if self.combine is None:
            _check_not_the_same_items({name: rows.shape for name, rows in outputs.items()})
        if self.combine != "interleave":
            flat = {name: rows.flatten(0, -2) for name, rows in outputs.items()}
            _check_equal("width", {name: rows.shape[-1] for name, rows in flat.items()})
            return torch.cat(list(flat.values()))
        for name, rows in outputs.items():
            if rows.dim() != 3:
                raise ValueError(
                    f"encoder {name!r} returned {list(rows.shape)}; combine='interleave' needs "
                    "[n, s, h] from every encoder"
                )
        _check_equal("item count", {name: rows.shape[0] for name, rows in outputs.items()})
        _check_equal("width", {name: rows.shape[-1] for name, rows in outputs.items()})
        return torch.cat(list(outputs.values()), dim=1)

    def check_inputs(self, modality: str, inputs: Inputs) -> None:
        """Refuse inputs that no encoder of this modality takes.

        Raises:
            TypeError: inputs that are not mappings, or a keyword that the encoder lacks.
            ValueError: an unknown encoder.
        """
        _check_nested(f"modality_inputs[{modality!r}]", inputs, "encoder name -> its inputs")
        if self.encode_is_overridden:  # which gives its inputs their own meaning
            return
        for name, keywords in inputs.items():
            if name not in self.encoders:
                raise ValueError(
                    f"modality_inputs[{modality!r}] has inputs for encoder {name!r}, but the "
                    f"modality's encoders are {sorted(self.encoders)}"
                )
            where = f"modality_inputs[{modality!r}][{name!r}]"
            _check_nested(where, keywords, "keyword -> value")
            accepted = self._accepted[name]
            for keyword in self._keywords(name, keywords) if accepted is not None else ():
                if keyword not in accepted:
                    raise TypeError(
                        f"{where} has keyword {keyword!r}; "
                        f"{type(self.encoders[name]).__name__} takes {sorted(accepted)}"
                    )

    # Writing ------------------------------------------------------------------------------

    def prepare(self, targets: Inputs, stream: str = "") -> dict[str, Mapping[str, Tensor]]:
        """Targets completed with this microbatch's random draws, by decoder.

        Args:
            targets: decoder name -> its keyword targets.
            stream: prefix of the random stream, the modality's name.
        """
        prepared = {}
        for name, target in targets.items():
            takes = self._reader_of(name)
            prepared[name] = target if takes is None else takes.prepare(target, f"{stream}/{name}")
        return prepared

    def count_target_rows(self, targets: Inputs) -> dict[str, int]:
        """Generation tokens that each decoder's targets stand for, read from shapes."""
        counts = {}
        for name, target in targets.items():
            takes = self._reader_of(name)
            count = None if takes is None else takes.num_rows(target)
            if count is not None:
                counts[name] = count
        return counts

    def _reader_of(self, name: str) -> Decoder | GenerationInput | None:
        """Who reads a decoder's targets on this stage: itself, or what feeds its positions."""
        if name in self.decoders:
            return self.decoders[name]
        feed = self.generation_input
        return feed if feed is not None and feed.reads(name) else None

    def generation_rows(self, given: Mapping[str, Tensor] | None, num_rows: int, like: Tensor) -> Tensor:
        """Rows `[num_rows, H]` that the language model sees at the generation tokens.

        Args:
            given: keyword inputs of the generation input, None where it reads none.
            num_rows: `N`.
            like: any tensor whose last dim is `H`, with the rows' dtype and device.
        """
        if not num_rows:
            return stand_in([self.generation_input], like)
        return self.generation_input(given, num_rows)

    def count_generation_inputs(self, modality: str, given: Mapping[str, Tensor]) -> int | None:
        """Generation tokens that inputs of the generation input stand for, read from shapes; None on
        a pipeline stage without it.

        Raises:
            ValueError: it reads no inputs.
        """
        if self.generation_input is None:
            return None
        count = self.generation_input.num_rows(given)
        if count is None:
            raise ValueError(
                f"generation_inputs has {modality!r}, whose {type(self.generation_input).__name__} reads "
                "none. Leave it out."
            )
        return count

    def loss(self, hidden: Tensor, targets: Inputs, share: tuple[int, int] = (0, 1)) -> dict[str, LossTerm]:
        """Loss term of every decoder, on every rank the same names; zero over zero without targets.

        Args:
            hidden: `[N, H]`, all rows of the data-parallel rank's microbatch.
            targets: decoder name -> its prepared keyword targets, for all `N` rows.
            share: (rank, size) in the context-parallel group; each rank decodes its contiguous
                share of the items, and the terms add up over the group.
        """
        own = self._own(self.output_projections, self.decoders)
        shared = [] if own or targets else list(self.output_projections)
        terms = {}
        for name, decoder in self.decoders.items():
            if name in targets:
                terms[name] = self._decoder_loss(name, hidden, targets[name], share)
            else:
                idle = stand_in([*shared, *own.get(name, ()), decoder], hidden).sum(dtype=torch.float32)
                terms[name] = LossTerm(idle, idle.new_zeros(()))
        return terms

    def _decoder_loss(
        self, name: str, hidden: Tensor, target: Mapping[str, Tensor], share: tuple[int, int]
    ) -> LossTerm:
        decoder = self.decoders[name]
        start, stop = _share_of(hidden.shape[0] // decoder.rows_per_item, *share)
        if share[1] > 1:
            target = decoder.share(target, start, stop)
        mine = hidden[start * decoder.rows_per_item : stop * decoder.rows_per_item]
        return decoder.loss(self.rows_for(name, mine), target)

    def rows_for(self, decoder: str, hidden: Tensor) -> Tensor:
        """Rows `[N, W]` that a decoder takes: hidden states through its output projection.

        Args:
            decoder: its name.
            hidden: `[N, H]` hidden states at the generation tokens, as in `ModalityOutput.hidden`.

        Returns:
            `[N, W]`, with gradient, in the projection's dtype; `hidden` itself without a projection. Equal
            on tensor- and context-parallel ranks if `hidden` is.

        Raises:
            ValueError: no such decoder.

        Example:
            >>> from megatron_mimo.decoders import RegressionDecoder
            >>> images = VisionModalitySubmodules(decoders={"features": RegressionDecoder(width=4)},
            ...     output_projections=[nn.Linear(8, 4)])
            >>> images.rows_for("features", torch.zeros(3, 8)).shape
            torch.Size([3, 4])
        """
        decoder = self.decoder_name(decoder)
        projection = self._per_module(self.output_projections, self.decoders).get(decoder)
        return hidden if projection is None else _projected(projection(hidden))

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
            ValueError: no such decoder, or several and none named.
        """
        name, options = self.decoder_name(decoder), dict(options or {})
        if options.get("unconditional_rows") is not None:
            unconditional = options["unconditional_rows"]
            options["unconditional_rows"] = self.rows_for(name, unconditional)
        return self.finish(self.decoders[name].sample(self.rows_for(name, hidden), **options), name)

    def finish(self, samples: Tensor, decoder: str | None = None) -> Tensor:
        """Images, waveforms, ... of what a decoder's `sample` gave, rendered and assembled.

        Args:
            samples: of all rows, in their order.
            decoder: which one's; may be left out where there is only one.

        Raises:
            ValueError: no such decoder, or several and none named.
        """
        return self.assemble(self.decoders[self.decoder_name(decoder)].render(samples))

    def decoder_name(self, decoder: str | None) -> str:
        """The name of one decoder, which may be None where there is only one.

        Raises:
            ValueError: no such decoder, or several and none named.
        """
        if decoder is None and len(self.decoders) == 1:
            decoder = next(iter(self.decoders))
        if decoder not in self.decoders:
            raise ValueError(f"decoder {decoder!r} is not one of {sorted(self.decoders)}; name one of them")
        return decoder

    def assemble(self, samples: Tensor) -> Tensor:
        """The modality's own form of what a decoder sampled. Here: as it is."""
        return samples

    def check_targets(self, modality: str, targets: Inputs) -> None:
        """Refuse targets that no decoder of this modality takes (decoders are on the last stage).

        Raises:
            TypeError: targets that are not mappings.
            ValueError: an unknown decoder.
        """
        _check_nested(f"modality_targets[{modality!r}]", targets, "decoder name -> its targets")
        self.check_decoder_names(f"modality_targets[{modality!r}]", targets)
        for name, target in targets.items():
            _check_nested(f"modality_targets[{modality!r}][{name!r}]", target, "keyword -> value")

    def check_decoder_names(self, where: str, names: Iterable[str]) -> None:
        """Refuse names that are none of this modality's decoders.

        Raises:
            ValueError: naming `where`, the name and the decoders there are.
        """
        for name in names:
            if name not in self.decoders:
                raise ValueError(
                    f"{where} names decoder {name!r}, but the modality's decoders are {sorted(self.decoders)}"
                )

    def span_of(self, decoder: str) -> int:
        """Rows that one item of a decoder takes, 1 where the decoder is on another stage."""
        return self.decoders[decoder].rows_per_item if decoder in self.decoders else 1

    def medium_of(self, decoder: str) -> int:
        """Rows of one image or clip of a decoder, 1 where the decoder is on another stage.

        Where samples are patches or frames that `assemble` puts together, whole items of them that make
        whole images or clips.
        """
        if decoder not in self.decoders:
            return 1
        decoder = self.decoders[decoder]
        if decoder.sampled_rows is None:
            return decoder.rows_per_medium
        given, width = decoder.sampled_rows
        return math.lcm(given, self.samples_per_medium(width)) // given * decoder.rows_per_item

    def samples_per_medium(self, width: int) -> int:
        """How many samples of `width` values `assemble` makes one image or clip of. Here: 1."""
        del width
        return 1

    @property
    def rows_shown_together(self) -> int:
        """Generation tokens that the generation input fills together, 1 without one on this stage."""
        return 1 if self.generation_input is None else self.generation_input.rows_per_item

    @property
    def position_rule(self) -> str:
        """Which hidden states the decoders read: "own" or "predecessor"."""
        return next((decoder.position_rule for decoder in self.decoders.values()), "own")

    # Bookkeeping --------------------------------------------------------------------------

    def check_widths(self, modality: str, hidden_size: int) -> None:
        """Refuse projections whose known widths do not fit the language model's.

        Raises:
            ValueError: naming the modality, the projection and both widths.
        """
        readers = self.input_projections or list(self.encoders.values())
        for index, module in enumerate(readers):
            self._check_width(modality, "input_projections", index, "output", output_width(module), hidden_size)
        for index, module in enumerate(self.output_projections):
            self._check_width(modality, "output_projections", index, "input", input_width(module), hidden_size)
        if not self.output_projections:
            for name, decoder in self.decoders.items():
                if decoder.width != hidden_size:
                    raise ValueError(
                        f"modality {modality!r}: decoder {name!r} takes width {decoder.width}, "
                        f"the language model gives {hidden_size}; add an output projection"
                    )

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        """Checkpoint form of all parameters, as `megatron.core.dist_checkpointing` takes it."""
        return sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def _check_width(self, modality, key, index, side, found, hidden_size) -> None:
        if found is None or found == hidden_size:
            return
        what = f"{key}[{index}]" if getattr(self, key) else f"encoder {list(self.encoders)[index]!r}"
        raise ValueError(
            f"modality {modality!r}: {what} has {side} width {found}, the language model's hidden "
            f"size is {hidden_size}. Make them equal or add a projection."
        )

    def _check_parts(self) -> None:
        """Encoder -> input projection, output projection -> decoder, and what decoders read."""
        inputs = self._per_module(self.input_projections, self.encoders)
        for name, projection in inputs.items():
            _check_fit(
                f"encoder {name!r}",
                output_width(self.encoders[name]),
                "its input projection",
                input_width(projection),
            )
        outputs = self._per_module(self.output_projections, self.decoders)
        for name, projection in outputs.items():
            _check_fit(
                "the output projection",
                output_width(projection),
                f"decoder {name!r}",
                self.decoders[name].width,
            )
        for key in ("input_projections", "output_projections"):
            for index, module in enumerate(getattr(self, key)):
                _check_whole_rows(f"{key}[{index}]", module)
        for name, encoder in self.encoders.items():
            if isinstance(encoder, VisionModule):
                _check_whole_rows(f"encoder {name!r}", encoder)
        rules = {name: decoder.position_rule for name, decoder in self.decoders.items()}
        if len(set(rules.values())) > 1:
            raise ValueError(
                f"decoders of one modality must read the same positions, got {rules}. "
                "Give them one position_rule or put them in two modalities."
            )
        if self.decoders and self.generation_input is not None:
            self.generation_input.check_rule(self.position_rule)
            name = _only(self.decoders, self.generation_input.decoder)
            if name is not None:
                self.generation_input.check_agreement(vars(self.generation_input), name, vars(self.decoders[name]))

    @property
    def encode_is_overridden(self) -> bool:
        """Whether a subclass gives inputs a meaning of its own."""
        return type(self).encode is not ModalitySubmodules.encode

    @staticmethod
    def _per_module(projections: nn.ModuleList, modules: nn.ModuleDict) -> dict[str, nn.Module]:
        """The projection of each module: one for all, or one each."""
        if len(projections) == 1:
            return dict.fromkeys(modules, projections[0])
        return dict(zip(modules, projections))

    @staticmethod
    def _own(projections: nn.ModuleList, modules: nn.ModuleDict) -> dict[str, tuple[nn.Module]]:
        """The projection that a module shares with no other, where there are several."""
        if len(projections) < 2:
            return {}
        return {name: (projection,) for name, projection in zip(modules, projections)}

    def _keywords(self, encoder: str, keywords: Mapping[str, Tensor]) -> dict[str, Tensor]:
        accepted = self._accepted[encoder]
        if accepted is None:
            return dict(keywords)
        return {key if key in accepted else self.input_aliases.get(key, key): value for key, value in keywords.items()}

    def _run_encoder(self, name: str, keywords: Mapping[str, Tensor]) -> Tensor:
        """An encoder's rows; floating-point inputs are cast to what it computes in.

        Megatron's mixed-precision wrapper casts a model's weights and its positional inputs only.
        """
        encoder = self.encoders[name]
        weights = (p.dtype for p in encoder.parameters() if p.is_floating_point())
        dtype = next(weights, None)
        cast = {
            key: value.to(dtype)
            if dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in self._keywords(name, keywords).items()
        }
        return _rows(name, encoder(**cast))


def build_submodules(
    modality: str, spec: ModuleSpec, *, hidden_size: int, pre_process: bool, post_process: bool, pg_collection
) -> ModalitySubmodules:
    """One modality's submodules on one pipeline stage, their widths held against the language model's.

    Args:
        modality: its name, for messages.
        spec: of a `ModalitySubmodules`.
        hidden_size: `H` of the language model.
        pre_process, post_process: whether this stage is the first, the last.
        pg_collection: process groups; None for Megatron's global ones.

    Raises:
        TypeError: a spec of something else.
        ValueError: parts that do not fit together.
    """
    kind = get_module(spec)
    if not (isinstance(kind, type) and issubclass(kind, ModalitySubmodules)):
        raise TypeError(f"modality_submodules[{modality!r}] must be the spec of a ModalitySubmodules, got {kind}")
    submodule = kind.from_spec(spec, pre_process=pre_process, post_process=post_process, pg_collection=pg_collection)
    submodule.check_widths(modality, hidden_size)
    return submodule


class VisionModalitySubmodules(ModalitySubmodules):
    """Images: inputs may be called `pixel_values` or `images` whatever the encoder calls them.

    Args:
        image_shape: `(channels, height, width)` of decoded images. With it, `[N, D]` samples
            (one flattened square patch a row, `(channel, y, x)` within it, patches row by row)
            come back as `[n, channels, height, width]`. Samples that are images pass unchanged.
    """

    input_aliases: ClassVar[Mapping[str, str]] = {"pixel_values": "x", "images": "x"}

    def __init__(self, *args, image_shape: tuple[int, int, int] | None = None, **named) -> None:
        super().__init__(*args, **named)
        self.image_shape = image_shape

    def samples_per_medium(self, width: int) -> int:
        """Patches of `width` values in an image of `image_shape`.

        Raises:
            ValueError: no square patches of that many values fill it.
        """
        return 1 if self.image_shape is None else math.prod(patch_grid(width, self.image_shape))

    def assemble(self, samples: Tensor) -> Tensor:
        """Images `[n, C, height, width]` from patch rows `[N, D]`."""
        if self.image_shape is None or samples.dim() != 2:
            return samples
        return patches_to_images(samples, self.image_shape)


class AudioModalitySubmodules(ModalitySubmodules):
    """Audio: inputs may be called `input_features` whatever the encoder calls them.

    Args:
        frames_per_clip: with it, `[N, D]` samples (one frame of D waveform samples a row) come
            back as `[n, frames_per_clip * D]`. Other samples pass unchanged.
    """

    input_aliases: ClassVar[Mapping[str, str]] = {"input_features": "x", "waveforms": "x"}

    def __init__(self, *args, frames_per_clip: int | None = None, **named) -> None:
        super().__init__(*args, **named)
        self.frames_per_clip = frames_per_clip

    def samples_per_medium(self, width: int) -> int:
        """`frames_per_clip`, whatever the width of a frame."""
        return self.frames_per_clip or super().samples_per_medium(width)

    def assemble(self, samples: Tensor) -> Tensor:
        """Waveforms `[n, frames_per_clip * D]` from frame rows `[N, D]`."""
        if self.frames_per_clip is None or samples.dim() != 2:
            return samples
        return frames_to_waveforms(samples, self.frames_per_clip)


def _check_generation_specs(parts: Mapping[str, object]) -> None:
    """Refuse specs of a decoder and of the generation input that reads its targets which do not fit."""
    feed, decoders = parts.get("generation_input"), parts.get("decoders") or {}
    kind = None if feed is None else get_module(feed)
    if not (isinstance(kind, type) and issubclass(kind, GenerationInput)):
        return
    own = _settings(feed)
    name = _only(decoders, own.get("decoder"))
    if name is not None:
        kind.check_agreement(own, name, _settings(decoders[name]))


def _only(decoders: Iterable[str], named: str | None) -> str | None:
    """The decoder whose targets a generation input reads, None where each batch's targets say which."""
    names = [name for name in decoders if named in (None, name)]
    return names[0] if len(names) == 1 else None


def _settings(spec: ModuleSpec | type) -> dict[str, object]:
    """What a spec's constructor is given, and the defaults of the rest; None stands for unknown."""
    defaults = {key: p.default for key, p in constructor_parameters(spec).items() if p.default is not p.empty}
    given = {**defaults, **((spec.params or {}) if isinstance(spec, ModuleSpec) else {})}
    return {key: value for key, value in given.items() if value is not None}


def _rows(encoder: str, output: object) -> Tensor:
    """The `[n, s, h]` or `[n, h]` tensor in an encoder's output."""
    rows = output
    if isinstance(rows, Mapping):
        rows = tuple(rows.values())
    if isinstance(rows, tuple):
        rows = rows[0] if rows else None
    if not isinstance(rows, Tensor):
        raise TypeError(
            f"encoder {encoder!r} returned {type(output).__name__}; expected a tensor, or a tuple "
            "or mapping whose first element is one"
        )
    if rows.dim() not in (2, 3):
        raise ValueError(f"encoder {encoder!r} returned shape {list(rows.shape)}; expected [B, s, h] or [n, h]")
    return rows


def _projected(output: Tensor | tuple[Tensor, nn.Parameter | None]) -> Tensor:
    """Output of a projection; Megatron's linear layers may leave adding their bias to the caller."""
    if not isinstance(output, tuple):
        return output
    rows, bias = output
    return rows if bias is None else rows + bias


def _share_of(items: int, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of a rank's contiguous share; shares differ by at most one item."""
    return items * rank // size, items * (rank + 1) // size


def _keyword_names(module: nn.Module) -> frozenset[str] | None:
    """Keywords that a module's forward takes, None for any."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def _check_nested(where: str, value: object, form: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must map {form}, got {type(value).__name__}")


def _check_count(key: str, projections: nn.ModuleList, of: str, modules: nn.ModuleDict) -> None:
    if modules and len(projections) not in (0, 1, len(modules)):
        raise ValueError(
            f"{len(projections)} {key} for {len(modules)} {of} {sorted(modules)}; "
            f"give none, one for all, or one for each"
        )


def _check_equal(what: str, found: Mapping[str, int]) -> None:
    if len(set(found.values())) > 1:
        raise ValueError(
            f"encoders of one modality differ in {what}: {dict(found)}. One input projection for "
            "all needs equal widths; give one per encoder otherwise."
        )


def _check_whole_rows(what: str, module: nn.Module) -> None:
    if isinstance(module, MegatronModule) and module.config.sequence_parallel:
        raise ValueError(
            f"{what} ({type(module).__name__}) has sequence_parallel=True, but it is given whole rows "
            "on every tensor-parallel rank and would take them for shards. Set it to False in the "
            "configuration of encoders and projections; the language model may keep it."
        )


def _check_not_the_same_items(shapes: Mapping[str, torch.Size]) -> None:
    counts = {shape[0] for shape in shapes.values()}
    if len(counts) == 1 and max(counts) > 1 and all(len(shape) == 3 for shape in shapes.values()):
        raise ValueError(
            f"encoders {sorted(shapes)} each returned {counts.pop()} items. Say how their rows follow each "
            "other: combine='interleave' (item by item, the same images through each) or "
            "combine='concatenate' (all items of the first, then all of the second)."
        )


def _check_fit(giver: str, given: int | None, taker: str, taken: int | None) -> None:
    if given is not None and taken is not None and given != taken:
        raise ValueError(f"{giver} gives width {given}, but {taker} takes width {taken}")
