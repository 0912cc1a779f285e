"""The model of a recipe: its parts, what is read and what is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from megatron_mimo.cli.nearest import unknown

Count = PositiveInt

#: Of decoders.
KINDS = ("flow", "flow_transformer", "codes")


class Strict(BaseModel):
    """Keys that it does not have are refused, with the nearest that it has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(unknown("key", str(key), cls.model_fields))
        return given


class Encoder(Strict):
    """What reads a modality.

    Args:
        name: a directory, or a name on the hub.
        as_it_is: transformers' own module in place of Megatron's layers; the only way for sound.
        frozen: of one as it is: takes no gradient in any stage, and keeps no activations.
        layer: of one as it is: whose states are taken; None for its output.
        select: of one as it is: "patch" leaves class and register tokens out.
    """

    name: str
    as_it_is: bool = False
    frozen: bool = False
    layer: int | None = None
    select: Literal["all", "patch"] = "all"

    @model_validator(mode="after")
    def _of_one_as_it_is(self) -> Self:
        if not self.as_it_is and (self.frozen or self.layer is not None or self.select != "all"):
            raise ValueError("frozen, layer and select are those of an encoder as_it_is; set as_it_is: true")
        return self


class Flow(Strict):
    """Writes images by rectified flow, patch by patch of pixels.

    Args:
        kind: "flow": the language model takes part at every step; "flow_transformer": it runs once, and the decoder's
            own attention at every step.
        size: height and width of the images, in pixels.
        patch: side of the square that a generation token stands for.
        channels: 3, or 1 for grey.
        hidden_width, depth, heads: of the decoder; heads are those of a "flow_transformer".
    """

    kind: Literal["flow", "flow_transformer"]
    size: tuple[Count, Count]
    patch: Count
    channels: Literal[1, 3] = 3
    hidden_width: Count = 1024
    depth: Count = 3
    heads: Count = 8

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.size[0] % self.patch or self.size[1] % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the size {list(self.size)}")
        return self

    @property
    def rows(self) -> int:
        """Generation tokens of an image."""
        return (self.size[0] // self.patch) * (self.size[1] // self.patch)


class Codes(Strict):
    """Writes images or sounds as codes of a frozen codec, one generation token after another.

    Args:
        kind: "codes".
        codec: of images Janus or its VQ-VAE, of sounds Mimi or EnCodec: a directory, or a name on the hub.
        size: of images: height and width in pixels.
        seconds: of sounds: length of a clip; a shorter one ends in silence.
        codebooks: of sounds: how many are taken; None for all.
        hidden_width: of a layer before the heads; None for none.
    """

    kind: Literal["codes"]
    codec: str
    size: tuple[Count, Count] | None = None
    seconds: PositiveFloat | None = None
    codebooks: Count | None = None
    hidden_width: Count | None = None

    @model_validator(mode="after")
    def _of_one_medium(self) -> Self:
        if (self.size is None) == (self.seconds is None):
            raise ValueError("expected size (of images) or seconds (of sounds), one of the two")
        if self.size is not None and self.codebooks is not None:
            raise ValueError("codebooks: expected none beside size, since codecs of images have one; leave it out")
        return self


class Modality(Strict):
    """How the model reads or writes one modality.

    Args:
        medium: which of the data's media are its; None: images for a name that begins with "image", else audio.
        reads: its encoder: a name, or more about it.
        token: at which the encoder's rows are placed, by default <image> or <sound>; one that the tokenizer lacks is
            added.
        writes: its decoder; None: it is read alone.
        generation_token: whose hidden states feed the decoder.
    """

    medium: Literal["image", "audio"] | None = None
    reads: Annotated[
        Encoder | None, BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)
    ] = None
    token: str | None = None
    writes: Annotated[Flow | Codes, Field(discriminator="kind")] | None = None
    generation_token: str = "<draw>"

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.reads is None and self.writes is None:
            raise ValueError("expected reads, writes or both, found neither")
        return self

    def medium_at(self, name: str) -> Literal["image", "audio"]:
        """Which of the data's media it is, by its name in the model."""
        return self.medium or ("image" if name.startswith("image") else "audio")


class Model(Strict):
    """The model: one that is whole, or one that is put together of parts.

    Args:
        source: of a whole one: a directory or a name on the hub.
        language_model: of one of parts: the same.
        modalities: of one of parts.
        dtype: of the weights; None for the files'.
        backend: what layers compute with; "auto" takes TransformerEngine where it is.
    """

    source: str | None = None
    language_model: str | None = None
    modalities: dict[str, Modality] = {}
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    backend: Literal["auto", "transformer_engine", "apex", "torch"] = "auto"

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.source is None) == (self.language_model is None):
            raise ValueError("expected source (a whole model) or language_model (of one put together), one of the two")
        if self.source is not None and self.modalities:
            raise ValueError("modalities go with language_model; a whole model (source) brings its own")
        for name, modality in self.modalities.items():
            writes, medium = modality.writes, modality.medium_at(name)
            if writes is not None and medium != ("image" if writes.size is not None else "audio"):
                raise ValueError(
                    f"modalities.{name}.writes: expected a decoder of {medium}, found one of another medium; give "
                    + ("size" if medium == "image" else "kind: codes with seconds")
                    + f", or set modalities.{name}.medium"
                )
        return self
