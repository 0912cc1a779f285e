"""One modality's encoders, projections and decoders, and what connects them to the language model."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, cast

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_mimo.config import check_part_name
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.idle import stand_in, with_idle
from megatron_mimo.modality.encoding import (
    ROWS_PER_ITEM,
    Asked,
    EncodedRows,
    EncoderKeywords,
    Inputs,
    combined,
    projected,
    run_encoder,
)
from megatron_mimo.modality.fit import check_reading, check_writing, own_projections
from megatron_mimo.modality.parts import stage_parts
from megatron_mimo.modality.writing import Writing
from megatron_mimo.sharded_state import sharded_state_dict


class ModalitySubmodules(Writing, ABC):
    """Everything between one modality's raw data and the language model's hidden width.

    Reading: `encode` runs each encoder that has inputs, flattens its output to rows, projects
    them to the language model's width and returns `[N, H]`. Writing: `loss` and `decode` take
    the `[N, H]` hidden states at the modality's generation tokens through an output projection
    to the decoders. Override `encode` or `decode` for anything special: `encode` may give its inputs any
    meaning, and `encode_items` tells how many rows each item gave where it should be known.

    Args:
        encoders: name -> module called with its keyword inputs. It returns `[B, s, h]`,
            `[n, h]`, `EncodedRows` of one of them, or a tuple or mapping whose first element is one. Where `[n, h]`
            holds several rows an item, `EncodedRows` or `rows_per_item` beside the inputs says how many, or a row too
            many in one sample and too few in the next goes unseen.
        decoders: name -> `Decoder`. All read by one position rule.
        input_projections: none, one for all encoders (their widths are equal), or one per
            encoder in the order of `encoders`.
        output_projections: none, one for all decoders, or one per decoder in their order.
        generation_input: what the language model sees at the generation tokens; None for the
            token's own embedding.
        combine: how rows of several encoders follow each other. `"concatenate"`: all of the
            first, then all of the second. `"interleave"`: item by item, for encoders that see the same
            images: all return `[n, s, h]` with equal n, or `EncodedRows` that tell as many items. None, too, is item
            by item, and says in the error of the first batch where that cannot be.

    Raises:
        ValueError: projections that match neither one nor each of their encoders or decoders,
            widths that do not fit together, decoders with different position rules, or modules
            set to sequence parallelism.

    Example:
        >>> import torch
        >>> images = ModalitySubmodules(encoders={"flatten": nn.Flatten(2)})
        >>> images({"flatten": {"input": torch.zeros(2, 4, 3, 3)}}).shape
        torch.Size([8, 9])
    """

    #: What users call an input -> what encoders of this modality may call it instead.
    input_aliases: ClassVar[Mapping[str, str]] = {}

    # `nn.ModuleDict` and `nn.ModuleList`, whose own types do not say what they hold.
    encoders: Mapping[str, nn.Module]
    input_projections: Sequence[nn.Module]

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
        for what, modules in {"an encoder": encoders, "a decoder": decoders}.items():
            for name in modules or ():
                check_part_name(what, name)
        self.encoders = cast(Any, nn.ModuleDict(encoders or {}))
        self.decoders = cast(Any, nn.ModuleDict(decoders or {}))
        self.input_projections = cast(Any, nn.ModuleList(input_projections or []))
        self.output_projections = cast(Any, nn.ModuleList(output_projections or []))
        self.generation_input = generation_input
        if combine not in ("concatenate", "interleave", None):
            raise ValueError(f"combine must be 'concatenate', 'interleave' or None, got {combine!r}")
        self.combine = combine
        check_reading(self.encoders, self.input_projections)
        check_writing(self.decoders, self.output_projections, generation_input)
        self._keywords = EncoderKeywords(self.encoders, self.input_aliases)

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
            pre_process: build encoders, input projections, and the generation input for its decoder's targets.
            post_process: build output projections and decoders.
            pg_collection: given to every module whose constructor takes it.
        """
        offered = {} if pg_collection is None else {"pg_collection": pg_collection}
        stage = dict(pre_process=pre_process, post_process=post_process)
        return cls(**stage_parts(spec.submodules or {}, **stage, offered=offered), **(spec.params or {}))

    # Reading ------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> Tensor:
        """`encode(inputs)`."""
        return self.encode(inputs)

    def encode(self, inputs: Inputs) -> Tensor:
        """Projected rows `[N, H]` of this modality, rank-local to the data-parallel rank.

        A subclass may override it and give its inputs any meaning.

        Args:
            inputs: encoder name -> its keyword inputs; encoders that are not named are skipped.

        Raises:
            TypeError, ValueError: inputs that no encoder takes, before any runs; outputs that do not go together.
        """
        asked = inputs if isinstance(inputs, Asked) else Asked(inputs, "inputs")
        asked.told = self._encode(asked)
        return asked.told.rows

    def encode_items(self, inputs: Inputs, where: str = "inputs") -> EncodedRows:
        """`encode(inputs)`, and how many rows each image or clip gave, which serves to name the right sample in an
        error.

        They are known of rows that the default `encode` made and that nobody changed. A subclass whose own `encode`
        knows them overrides this method too, and returns `EncodedRows(self.encode(inputs), rows_per_item)`.

        Args:
            inputs: as `encode` takes them.
            where: what an error calls them.
        """
        asked = Asked(inputs, where)
        return asked.about(self.encode(asked))

    def encode_nothing(self, like: Tensor) -> Tensor:
        """Rows `[0, H]` in place of `encode` for a batch that has no input of this modality.

        Its backward pass gives the trainable parameters zero gradients. The model calls it beside a subclass's
        own `encode` too.

        Args:
            like: any tensor whose last dim is `H`, with the rows' dtype and device.
        """
        writing = {"decoders", "output_projections", "generation_input"}
        return stand_in((part for name, part in self.named_children() if name not in writing), like)

    def _encode(self, asked: Asked) -> EncodedRows:
        self._keywords.check(asked)
        own = own_projections(self.input_projections, self.encoders)
        outputs, idle = {}, []
        for name, encoder in self.encoders.items():
            if name not in asked:
                idle.append(stand_in([encoder, *own.get(name, ())]))
                continue
            given = asked[name]
            counts = given.get(ROWS_PER_ITEM) if self._keywords.tells_rows(name) else None
            output = run_encoder(name, encoder, self._keywords.of(name, given), counts)
            for projection in own.get(name, ()):
                output = replace(output, rows=projected(projection, output.rows))
            outputs[name] = output
        whole = combined(outputs, self.combine)
        rows = whole.rows
        if len(self.input_projections) == 1:
            rows = projected(self.input_projections[0], rows)
        return EncodedRows(with_idle(rows.flatten(0, -2), idle), whole.rows_per_item, reaches_all=True)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        """Checkpoint form of all parameters, as `megatron.core.dist_checkpointing` takes it."""
        return sharded_state_dict(self, prefix, sharded_offsets, metadata)
