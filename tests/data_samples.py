"""Tokenisers, media and files that the tests of data make on the spot."""

import io
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_mimo.data.chat import PLAIN_TEMPLATE, ChatText
from megatron_mimo.data.loading import PackedData, ReadingOptions
from megatron_mimo.data.media import Limits
from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.progress import joined_states
from megatron_mimo.data.readers import Reading
from megatron_mimo.data.samples import Handling, SampleProcessor
from megatron_mimo.data.sources import JsonLines
from megatron_mimo.data.writers import ImageWriter, Writing
from tests import tiny

SPECIAL = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
SPECIAL += ["<draw>", "<boi>", "<eoi>", "<|audio_pad|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that knows images and videos, and marks no answers."""


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words, with special tokens as Qwen's models have them."""
    machine = Tokenizer(models.BPE())
    machine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    machine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    machine.train_from_iterator(["user assistant system Draw a cat Here it is What is in the picture"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=machine, pad_token="<pad>", eos_token="<|im_end|>")
    made.add_special_tokens({"extra_special_tokens": SPECIAL[1:]})
    made.chat_template = template
    return made


def ids(made: PreTrainedTokenizerFast) -> dict[str, int]:
    """The id of every special token."""
    return {token: made.convert_tokens_to_ids(token) for token in SPECIAL}


class Patches:
    """Reads an image as one row for every 8 x 8 pixels."""

    rate, limits = 0.0, Limits()

    def __call__(self, medium: Image.Image) -> Reading:
        h, w = -(-medium.height // 8), -(-medium.width // 8)
        pixels = torch.from_numpy(np.asarray(medium.resize((8 * w, 8 * h)), dtype=np.float32))
        patches = pixels.reshape(h, 8, w, 8, 3).permute(0, 2, 1, 3, 4).reshape(h * w, -1)
        return Reading(h * w, {"tower": {"patches": patches}}, ((1, h, w),), cost=float(patches.numel()))


def processor(template: str | None = PLAIN_TEMPLATE, *, sections: int = 1, **changes) -> SampleProcessor:
    """Reads images by patches and writes them as four rows."""
    made = tokenizer(template)
    known = ids(made)
    images = dict(
        modality="images",
        special=known["<|image_pad|>"],
        generation=known["<draw>"],
        reader=Patches(),
        writer=ImageWriter("pixels", size=(4, 4), rows=4),
    )
    placeholders = {"image": "<|image_pad|>"} if template == CHATML else None
    return SampleProcessor(
        ChatText(made, placeholders=placeholders), {"image": Handling(**{**images, **changes})}, sections=sections
    )


def png(width: int = 16, height: int = 16, seed: int = 0) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float = 0.1, rate: int = 16000) -> bytes:
    """A tone."""
    samples = (np.sin(np.arange(int(seconds * rate)) * 0.1) * 10000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return file.getvalue()


def lines(path: Path, records: list) -> Path:
    """A file of JSON lines; bytes among the records are written as they are."""
    rows = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def user(*parts: object) -> dict:
    """A user's turn."""
    return {"role": "user", "content": list(parts)}


def assistant(*parts: object) -> dict:
    """An assistant's turn."""
    return {"role": "assistant", "content": list(parts)}


def text(words: str, **more: object) -> dict:
    """A text part."""
    return {"type": "text", "text": words, **more}


def image(name: str, **more: object) -> dict:
    """An image part."""
    return {"type": "image", "image": name, **more}


class TinyRows:
    """Reads an image as two rows of the tiny models' encoder, and writes it as three of their decoder."""

    rate, limits = 0.0, Limits()

    def __init__(self, written: bool) -> None:
        self._written = written

    def __call__(self, medium: Image.Image) -> Reading | Writing:
        pixels = torch.from_numpy(np.asarray(medium, dtype=np.float32)).flatten() / 255
        if self._written:
            return Writing(3, {"pixels": {"pixels": pixels[: 3 * tiny.PIXELS].view(3, -1)}})
        return Reading(2, {"patches": {"x": pixels[: 2 * tiny.PIXELS].view(1, 2, -1)}})


def tiny_processor(**changes) -> SampleProcessor:
    """Samples for the models of `tests.tiny`."""
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "<end>", *"abcdefghijklmnopqrstuvwxyz"])}
    machine = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    machine.pre_tokenizer = pre_tokenizers.Whitespace()
    words_alone = PreTrainedTokenizerFast(tokenizer_object=machine, pad_token="<pad>", eos_token="<end>")
    images = Handling(
        "images",
        special=tiny.READ,
        generation=tiny.WRITE,
        reader=TinyRows(written=False),
        writer=TinyRows(written=True),
        **changes,
    )
    return SampleProcessor(ChatText(words_alone, template=PLAIN_TEMPLATE), {"image": images})


def tiny_records(folder: Path, count: int = 40) -> Path:
    """Conversations of a few letters, with an image to read, to write, or none."""
    records = []
    for index in range(count):
        (folder / f"{index}.png").write_bytes(png(4, 4, index))
        asked = [text("a b c d e f g"[: 1 + 2 * (index % 7)])] + ([image(f"{index}.png")] if index % 3 == 0 else [])
        said = [text("h i j"[: 1 + 2 * (index % 3)])] + ([image(f"{index}.png")] if index % 3 == 1 else [])
        records.append({"messages": [user(*asked), assistant(*said)]})
    return lines(folder / "train.jsonl", records)


def tiny_data(path: Path, rank: int = 0, size: int = 1, workers: int = 0, **changes) -> PackedData:
    """Packs of 32 tokens for the models of `tests.tiny`."""
    shape = PackShape(length=32, multiple=2, buffer=6)
    options = ReadingOptions(workers=workers)
    return PackedData([JsonLines(path)], tiny_processor(**changes), shape, rank=rank, size=size, options=options)


def seen_by_other_ranks(made: Callable[..., Any], first: int, then: int) -> list[int]:
    """Positions in an epoch that `first` ranks begin, and `then` ranks end from the state of those.

    Args:
        made: gives the data of a rank, by `rank` and `size`.
        first, then: numbers of ranks.
    """
    ranks = [made(rank=rank, size=first) for rank in range(first)]
    seen: list[int] = []
    for turns, data in enumerate(ranks, start=2):  # ranks are not equally far
        for _ in range(turns):
            seen += next(data).positions
    state = json.loads(json.dumps(joined_states([data.state_dict() for data in ranks])))
    for rank in range(then):
        data = made(rank=rank, size=then)
        data.load_state_dict(state)
        for pack in data:
            seen += pack.positions
    return seen
