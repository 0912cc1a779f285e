"""What makes samples of a recipe's conversations: its model's processor, or readers and writers a modality."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from megatron_mimo.cli.building import ENCODER, decoder_of, tokenizer_of
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.model_recipe import Codes, Encoder, Flow, Modality, Model
from megatron_mimo.cli.readers import described
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data import (
    PLAIN_TEMPLATE,
    ChatText,
    Handling,
    ImageReader,
    ImageWriter,
    SampleProcessor,
    SoundReader,
    SoundWriter,
)
from megatron_mimo.data.messages import Kind
from megatron_mimo.data.readers import Reader
from megatron_mimo.data.writers import Writer
from megatron_mimo.hf.blueprint import Origin
from megatron_mimo.hf.encoder import rows_of_sound
from megatron_mimo.hf.image_codec import ImageCodes
from megatron_mimo.hf.source import resolve
from megatron_mimo.pretrained import load_processor
from megatron_mimo.training.pretraining.packs import sample_processor


def processor_of(config: MimoModelConfig, model: Model | None, template: str | None = None) -> SampleProcessor:
    """What makes samples for a model.

    Args:
        config: of the model.
        model: of the recipe that put it together; None where there is none.
        template: a chat template in place of the model's own.

    Raises:
        Refused: an encoder whose inputs or rows are not known here.
        ValueError: as `load_processor`.
    """
    found = load_processor(config)
    tokenizer = getattr(found, "tokenizer", found)
    own = template or getattr(found, "chat_template", None) or tokenizer.chat_template or PLAIN_TEMPLATE
    parts = {} if model is None else described(model).modalities
    if found is not tokenizer and not any(one.writes for one in parts.values()):
        found.chat_template = own
        return sample_processor(found, config)
    handling = {cast(Kind, one.medium_at(name)): _handling(name, one, config) for name, one in parts.items()}
    return SampleProcessor(ChatText(tokenizer, template=own), handling)


def _handling(name: str, modality: Modality, config: MimoModelConfig) -> Handling:
    writer = None if modality.writes is None else _writer(name, modality.writes, config)
    reader = None
    if (reads := modality.reads) is not None:
        make = _image_reader if modality.medium_at(name) == "image" else _sound_reader
        reader = make(f"{name}.reads", reads, config.origin, f"{name}/encoders/{ENCODER}")
    return Handling.of(config, name, reader=cast(Reader | None, reader), writer=cast(Writer | None, writer))


def _writer(name: str, writes: Flow | Codes, config: MimoModelConfig) -> ImageWriter | SoundWriter:
    decoder = decoder_of(writes)
    if isinstance(writes, Flow):
        shape: dict[str, Any] = dict(channels=writes.channels, patch=writes.patch)
        return ImageWriter(decoder, size=writes.size, rows=writes.rows, span=(0.0, 1.0), **shape)
    told, grid = tokenizer_of(config, name)
    rows = math.prod(grid)
    if isinstance(told, ImageCodes):
        size = (grid[0] * told.side, grid[1] * told.side)
        return ImageWriter(decoder, size=size, rows=rows, span=(0.0, 1.0))
    return SoundWriter(decoder, samples=rows * told.samples_per_token, rate=told.sampling_rate, rows=rows)


def _image_reader(where: str, reads: Encoder, origin: object, path: str) -> ImageReader:
    from transformers import AutoConfig, AutoImageProcessor

    directory = resolve(reads.name)
    processor = _loaded(AutoImageProcessor, directory, where, "an image processor")
    part = origin.part(path) if isinstance(origin, Origin) else None
    select = reads.select if part is None else part.select
    whole = AutoConfig.from_pretrained(directory, local_files_only=True)
    own = getattr(whole, "vision_config", whole)
    side, patch = getattr(own, "image_size", None), getattr(own, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int):
        raise Refused(f"{where}: expected an encoder of images of one size, found {own.model_type!r} without one")
    size: dict[str, Any] = dict(getattr(processor, "crop_size", None) or processor.size)
    side = int(size.get("height", size.get("shortest_edge", side)))
    return ImageReader(processor, encoder=ENCODER, rows=(side // patch) ** 2 + _in_front(own, select))


def _in_front(config: Any, select: str) -> int:
    """Class and register tokens that an image's rows begin with."""
    if select == "patch" or config.model_type.startswith("siglip"):
        return 0
    return 1 + int(getattr(config, "num_register_tokens", 0))


def _sound_reader(where: str, reads: Encoder, origin: object, path: str) -> SoundReader:
    del origin, path
    from transformers import AutoConfig, AutoFeatureExtractor

    directory = resolve(reads.name)
    extractor = _loaded(AutoFeatureExtractor, directory, where, "a feature extractor")
    own = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    rows: Callable[[int], int] = partial(rows_of_sound, config=own)
    return SoundReader(extractor, rows=rows, encoder=ENCODER, options={"return_attention_mask": True})


def _loaded(kind: Any, directory: Path, where: str, what: str) -> Any:
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise Refused(f"{where}: expected {what} in {directory}, found none that loads ({error})") from error
