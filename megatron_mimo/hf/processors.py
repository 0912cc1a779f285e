"""The processor of a model that was put together: its tower's images and its language model's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mimo.hf.blueprint import Origin, Part

# Either holds what an image processor is made with.
_IMAGES = ("preprocessor_config.json", "processor_config.json")


def loaded(kind: Any, directory: Path | None, what: str) -> Any:
    """What a class of transformers makes of the files of a directory.

    Args:
        kind: such as `AutoTokenizer`.
        directory: of a model.
        what: it makes, for the message.

    Raises:
        ValueError: there are no files that it can be made of.
    """
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory}: expected {what} that transformers loads, found none. Copy its files there from the model it "
            f"came with ({' '.join(str(error).split())[:120]})."
        ) from error


def tokenizer_of(origin: Origin) -> Any:
    """The tokenizer of a model's directory, with the tokens that were added."""
    from transformers import AutoTokenizer

    tokenizer = loaded(AutoTokenizer, origin.directory, "a tokenizer")
    tokenizer.add_tokens(list(origin.tokens), special_tokens=True)
    return tokenizer


def llava_processor(origin: Origin, tower: Part, image_id: int) -> Any | None:
    """LLaVA's processor for a language model and a tower; None where the tower's directory says nothing of images.

    Args:
        origin: of the model.
        tower: one of its parts.
        image_id: id of the token that stands for an image.
    """
    from transformers import AutoImageProcessor, LlavaProcessor

    if tower.directory is None or not any((tower.directory / name).is_file() for name in _IMAGES):
        return None
    tokenizer = tokenizer_of(origin)
    return LlavaProcessor(
        image_processor=loaded(AutoImageProcessor, tower.directory, "an image processor"),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default" if tower.select == "patch" else "full",
        image_token=tokenizer.convert_ids_to_tokens(image_id),
        num_additional_image_tokens=int(tower.model_type == "clip_vision_model"),
        chat_template=tokenizer.chat_template,
    )
