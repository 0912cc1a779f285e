"""Conversations with images, as a LLaVA's processor lays them out."""

from typing import Any

import megatron_mimo
from megatron_mimo import MimoModelConfig
from megatron_mimo.data import ChatText, Handling, ImageReader, SampleProcessor


def reading(config: MimoModelConfig) -> SampleProcessor:
    """Makes token ids and pixels of conversations, for a model of `config`."""
    processor = megatron_mimo.load_processor(config)
    images = Handling(
        "images",
        special=config.special_token_ids["images"],
        reader=ImageReader(processor.image_processor, rows=rows_of(processor)),
    )
    template = processor.chat_template or processor.tokenizer.chat_template
    # A template that knows images writes their token; in another they stand where their part stands.
    placeholders = {"image": processor.image_token} if processor.image_token in (template or "") else {}
    return SampleProcessor(
        ChatText(processor.tokenizer, template=template, placeholders=placeholders), {"image": images}
    )


def rows_of(processor: Any) -> int:
    """Positions that an image takes."""
    size = processor.image_processor.crop_size or processor.image_processor.size
    patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
    dropped = processor.vision_feature_select_strategy == "default"
    return patches + processor.num_additional_image_tokens - int(dropped)
