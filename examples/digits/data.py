"""The data of the demo: handwritten digits and dial tones, and the sequences that mix them.

Six tasks over three modalities, one sequence each. `I` and `A` are read, `i` and `a` are generated:

    READ        I I I I  read 7                            image -> text
    HEAR        A A A A A A A A  hear 7                    tone  -> text
    DRAW        draw 7  i i i i                            text  -> image
    DIAL        dial 7  a a a a a a a a                    text  -> tone
    HEAR_DRAW   A A A A A A A A  draw  i i i i             tone  -> image
    NEXT        I I I I  next 7  i i i i  a a a a a a a a  image -> text, and the next digit, 8, as image and tone

The model that draws with codes has one task, DRAW with a generation token for each of 16 codes.

Shapes: `B` samples of the whole step, `n` those of them that use a modality.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from examples.digits.tones import dial_tones
from examples.digits.vq import GRID
from megatron_mimo.assemble import images_to_patches

# Handwritten digits ----------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Real digits: `images` `[n, 8, 8]` float32 in [-1, 1] (ink is 1), `labels` `[n]` int64."""

    images: Tensor
    labels: Tensor


def load_split() -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 digits as 1,437 to train on and 360 held out, classes in proportion."""
    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(data.target)
    train, held_out = train_test_split(torch.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


# Sequences of the model that reads, hears, draws and dials -----------------------------------

PATCH = 4
"""Side of a drawn patch: an image is 4 patches of 16 pixels."""
IMAGE_ROWS = 4
"""Positions of an image, read or drawn."""
AUDIO_ROWS = 8
"""Positions of a clip, heard or dialled."""
BAND = 64
"""Cosine coefficients of one dialled row: a band of 250 Hz."""
LENGTH = 20
"""Positions of every sequence: the longest takes 18, and 20 share out over 2 and 4 ranks."""

WORDS = [*"0123456789", "read", "hear", "draw", "dial", "next", "<pad>", "<image>", "<tone>", "<draw>", "<dial>"]
TOKEN = {word: index for index, word in enumerate(WORDS)}
VOCABULARY = 24
"""`WORDS` rounded up, to be shared out over tensor-parallel ranks."""

Task = IntEnum("Task", "READ HEAR DRAW DIAL HEAR_DRAW NEXT", start=0)
_DIGIT = -1  # the place of the digit in a template

_SEEN = ["<image>"] * IMAGE_ROWS
_HEARD = ["<tone>"] * AUDIO_ROWS
_DRAWN = ["<draw>"] * IMAGE_ROWS
_DIALLED = ["<dial>"] * AUDIO_ROWS
_TEMPLATES = {
    Task.READ: [*_SEEN, "read", _DIGIT],
    Task.HEAR: [*_HEARD, "hear", _DIGIT],
    Task.DRAW: ["draw", _DIGIT, *_DRAWN],
    Task.DIAL: ["dial", _DIGIT, *_DIALLED],
    Task.HEAR_DRAW: [*_HEARD, "draw", *_DRAWN],
    Task.NEXT: [*_SEEN, "next", _DIGIT, *_DRAWN, *_DIALLED],
}
_IDS = torch.tensor(
    [[TOKEN.get(word, _DIGIT) for word in (*_TEMPLATES[task], *["<pad>"] * LENGTH)[:LENGTH]] for task in Task]
)

READS_IMAGE = (Task.READ, Task.NEXT)
READS_TONE = (Task.HEAR, Task.HEAR_DRAW)
DRAWS = (Task.DRAW, Task.HEAR_DRAW, Task.NEXT)
DIALS = (Task.DIAL, Task.NEXT)

SHARES = {Task.READ: 2, Task.HEAR: 1, Task.DRAW: 2, Task.DIAL: 3, Task.HEAR_DRAW: 3, Task.NEXT: 5}
"""Of the tasks in a batch. What is generated takes longer to learn than what is recognised."""

TELLS_DIGIT = torch.zeros(VOCABULARY)
"""How much it counts, at each token, that the language model tells the digit."""
TELLS_DIGIT[[TOKEN["read"], TOKEN["hear"], TOKEN["next"]]] = 1
TELLS_DIGIT[TOKEN["<draw>"]] = 1 / IMAGE_ROWS
TELLS_DIGIT[TOKEN["<dial>"]] = 1 / AUDIO_ROWS

NEXT_LENGTH = len(_TEMPLATES[Task.NEXT])
"""Positions that NEXT takes."""
NEXT_PROMPT = IMAGE_ROWS + 1
"""Positions of NEXT that are asked with; the model says, draws and dials the others."""
_NEXT_DRAWS = NEXT_PROMPT  # place of the digit that is read, behind which the model begins to draw
_NEXT_DIALS = NEXT_PROMPT + IMAGE_ROWS  # place of the last drawn row, behind which it begins to dial


@dataclass(frozen=True)
class Samples:
    """Samples of any tasks, each with all that its task could ask for.

    Args:
        task: `[B]` int64.
        digit: `[B]` int64, told, read or heard.
        written: `[B]` int64, drawn and dialled: the same digit, and the next after it in NEXT.
        image: `[B, 8, 8]`, to be read.
        drawing: `[B, 8, 8]`, to be drawn.
        clip: `[B, CLIP]`, heard or to be dialled.
        image_time, audio_time: `[B]`, the flow's time draws.
        image_noise, audio_noise: `[B, rows, width]`, its noise draws.
    """

    task: Tensor
    digit: Tensor
    written: Tensor
    image: Tensor
    drawing: Tensor
    clip: Tensor
    image_time: Tensor
    image_noise: Tensor
    audio_time: Tensor
    audio_noise: Tensor

    def part(self, rank: int, size: int) -> "Samples":
        """The contiguous share of one of `size` data-parallel ranks."""
        return self._map(lambda value: value.chunk(size)[rank])

    def of(self, tasks: Sequence[Task]) -> "Samples":
        """The samples of some tasks, in order."""
        chosen = torch.isin(self.task, torch.tensor(tasks))
        return self._map(lambda value: value[chosen])

    def _map(self, change) -> "Samples":
        return Samples(*(change(getattr(self, field.name)) for field in fields(self)))


def draw_samples(digits: Digits, count: int, seed: int, step: int) -> Samples:
    """The samples of one training step, the same whatever ranks they are then shared out over.

    Most steps mix all six tasks; every eighth has no image, and every eighth no tone.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    left_out = {3: (*READS_IMAGE, *DRAWS), 7: (*READS_TONE, *DIALS)}.get(step % 8, ())
    shares = torch.tensor([0 if task in left_out else SHARES[task] for task in Task]).float()
    task = torch.multinomial(shares, count, replacement=True, generator=generator)
    chosen = torch.randint(len(digits.labels), (count,), generator=generator)
    digit, following = digits.labels[chosen], task == Task.NEXT
    written = torch.where(following, (digit + 1) % 10, digit)
    another = one_of_each(digits.labels, written, generator)
    return Samples(
        task=task,
        digit=digit,
        written=written,
        image=digits.images[chosen],
        drawing=digits.images[torch.where(following, another, chosen)],
        clip=dial_tones(written, generator),
        image_time=torch.rand(count, generator=generator),
        image_noise=torch.randn(count, IMAGE_ROWS, PATCH * PATCH, generator=generator),
        audio_time=torch.rand(count, generator=generator),
        audio_noise=torch.randn(count, AUDIO_ROWS, BAND, generator=generator),
    )


def one_of_each(labels: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """For each digit of `wanted` `[B]` the place of one among `labels` `[n]` that is the same, drawn evenly."""
    order, counts = labels.argsort(stable=True), labels.bincount(minlength=10)
    place = (torch.rand(len(wanted), generator=generator) * counts[wanted]).long()
    return order[counts.cumsum(0)[wanted] - counts[wanted] + place]


def sequences(task: Task | Tensor, digit: Tensor) -> Tensor:
    """Token ids `[B, LENGTH]` about digits `[B]`, of one task or of tasks `[B]`."""
    ids = _IDS[task]
    return torch.where(ids == _DIGIT, digit[:, None], ids)


def training_batch(samples: Samples) -> dict:
    """Keyword arguments of `MimoModel.forward` for samples, with the targets of all losses.

    The language model learns the digit that answers READ and HEAR, and to name the digit at every position
    that it draws or dials: the decoder then finds it there. Each media item names its digit once in all.
    In NEXT it also learns to begin: to draw behind the digit that it read, and to dial behind its drawing.
    """
    ids = sequences(samples.task, samples.digit)
    read, drawn, dialled = samples.of(READS_IMAGE), samples.of(DRAWS), samples.of(DIALS)
    # Noise on what is read stands in for more handwriting: a reader alone gets 0.982 of held-out digits right
    # with it and 0.973 without (means of 6 seeds).
    seen = read.image + 0.4 * read.image_noise.reshape(read.image.shape)
    told = torch.isin(ids, torch.tensor([TOKEN["<draw>"], TOKEN["<dial>"]]))
    labels = torch.where(told, samples.written[:, None], samples.digit[:, None])
    counts, following = TELLS_DIGIT[ids], samples.task == Task.NEXT
    for place, token in ((_NEXT_DRAWS, "<draw>"), (_NEXT_DIALS, "<dial>")):
        labels[following, place], counts[following, place] = TOKEN[token], 1
    return {
        "input_ids": ids,
        "labels": labels,
        "loss_mask": counts,
        "modality_inputs": model_inputs(seen, samples.of(READS_TONE).clip),
        "modality_targets": {
            "images": {
                "pixels": {
                    "target": images_to_patches(drawn.drawing[:, None], PATCH),
                    "time": drawn.image_time,
                    "noise": drawn.image_noise.flatten(0, 1),
                }
            },
            "audio": {
                "bands": {
                    "media": dialled.clip,
                    "time": dialled.audio_time,
                    "noise": dialled.audio_noise.flatten(0, 1),
                }
            },
        },
    }


def model_inputs(images: Tensor, clips: Tensor) -> dict:
    """`modality_inputs` of the images `[n, 8, 8]` and clips `[n, CLIP]` of a batch."""
    inputs = {}
    if len(images):
        inputs["images"] = {"eye": {"images": images[:, None]}}
    if len(clips):
        inputs["audio"] = {"ear": {"waveforms": clips}}
    return inputs


# Sequences of the model that draws with codes ------------------------------------------------

CODE_ROWS = math.prod(GRID)
"""Positions of an image in codes."""
CODE_LENGTH = 2 + CODE_ROWS
"""Positions of every sequence: "draw", the digit, and its codes."""


def code_sequences(digit: Tensor) -> Tensor:
    """Token ids `[B, CODE_LENGTH]` that ask for drawings of digits `[B]`, one code at a position."""
    ids = torch.full((len(digit), CODE_LENGTH), TOKEN["<draw>"])
    ids[:, 0] = TOKEN["draw"]
    ids[:, 1] = digit
    return ids


def otherwise_written(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images `[n, 8, 8]`, each turned by up to 10 degrees, scaled by up to 10 % and moved by up to half a pixel."""
    turn, wide, high, right, down = 2 * torch.rand(5, len(images), generator=generator) - 1
    angle = math.radians(10) * turn
    across = torch.stack([angle.cos(), -angle.sin(), right / 8], 1) * (1 + 0.1 * wide)[:, None]
    along = torch.stack([angle.sin(), angle.cos(), down / 8], 1) * (1 + 0.1 * high)[:, None]
    grid = F.affine_grid(torch.stack([across, along], 1), [len(images), 1, 8, 8], align_corners=False)
    ink = F.grid_sample(images[:, None] + 1, grid, align_corners=False)  # nothing, which is 0, lies outside
    return ink[:, 0] - 1


def code_batch(digits: Digits, count: int, seed: int, step: int, rank: int = 0, size: int = 1) -> dict:
    """Keyword arguments of `MimoModel.forward` for one rank's share of `count` digits to draw with codes.

    The images are targets as they are; the decoder's tokenizer makes codes of them. There is no text to learn.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    chosen = torch.randint(len(digits.labels), (count,), generator=generator)
    images = otherwise_written(digits.images[chosen], generator).chunk(size)[rank]
    ids = code_sequences(digits.labels[chosen].chunk(size)[rank])
    return {
        "input_ids": ids,
        "labels": ids,
        "loss_mask": torch.zeros(ids.shape),
        "modality_targets": {"images": {"codes": {"media": images[:, None]}}},
    }
