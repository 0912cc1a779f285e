"""Text, images and tones, each read and written, by one small model. The data is made up as it is read.

A sample is a row of turns until the sequence is full:

    LOOK  I I I ... I  red circle left      image -> text
    DRAW  red circle left  i i ... i        text  -> image   (rectified flow, 16 patches together)
    HEAR  A A ... A    high soft            tone  -> text
    SING  high soft    a a ... a            text  -> tone    (regression, 8 frames)

The language model learns the words that end LOOK and HEAR; the decoders what DRAW and SING ask for.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.models.multimodal.llava_model import MultimodalProjector
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_mimo import (
    AudioModalitySubmodules,
    MimoModelConfig,
    VisionModalitySubmodules,
    specs,
)
from megatron_mimo.assemble import images_to_patches
from megatron_mimo.decoders import FlowTransformerDecoder, RegressionDecoder
from megatron_mimo.decoders.inputs import QueryInput
from megatron_mimo.training import backend_from_args, encoder_config_from_args, language_spec_from_args

# Data ------------------------------------------------------------------------------------

SIDE, PATCH = 16, 4
IMAGE_ROWS = (SIDE // PATCH) ** 2
FRAMES, FRAME = 8, 32
SAMPLES = 8192

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
SHAPES = ("circle", "square", "cross")
PLACES = {"left": (5, 8), "right": (11, 8), "top": (8, 5), "bottom": (8, 11)}
PITCHES = {"low": 2.0, "middle": 4.0, "high": 8.0}
LOUDNESSES = {"soft": 0.3, "loud": 1.0}

WORDS = [
    "<pad>", "<image>", "<tone>", "<draw>", "<sing>", "look", "draw", "hear", "sing",
    *COLOURS, *SHAPES, *PLACES, *PITCHES, *LOUDNESSES,
]  # fmt: skip
TOKEN = {word: index for index, word in enumerate(WORDS)}


def picture(colour: str, shape: str, place: str, generator: torch.Generator) -> Tensor:
    """`[3, SIDE, SIDE]` in about [-1, 1]: a coloured shape on black, with a little noise."""
    x, y = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy")
    dx, dy = (x - PLACES[place][0]).abs(), (y - PLACES[place][1]).abs()
    inside = {
        "circle": dx**2 + dy**2 <= 16,
        "square": torch.maximum(dx, dy) <= 3,
        "cross": (torch.minimum(dx, dy) <= 1) & (torch.maximum(dx, dy) <= 4),
    }[shape]
    pixels = torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], -1).float()
    return pixels + 0.05 * torch.randn(pixels.shape, generator=generator)


def tone(pitch: str, loudness: str) -> Tensor:
    """`[FRAMES, FRAME]`: a sine of so many periods, cut into frames."""
    time = torch.arange(FRAMES * FRAME) / (FRAMES * FRAME)
    wave = LOUDNESSES[loudness] * torch.sin(2 * torch.pi * PITCHES[pitch] * time)
    return wave.reshape(FRAMES, FRAME)


@dataclass
class Sample:
    """One sequence and its media, in the order of their tokens.

    Args:
        ids, learned: `[S]`: token ids, and 1 where a token is an answer to learn.
        seen: images `[3, SIDE, SIDE]` that are read; `drawn`: those that are to be written.
        heard: clips `[FRAMES, FRAME]` that are read; `sung`: those that are to be written.
    """

    ids: Tensor
    learned: Tensor
    seen: list[Tensor] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)
    heard: list[Tensor] = field(default_factory=list)
    sung: list[Tensor] = field(default_factory=list)


class Turns(Sequence):
    """Samples that depend on nothing but their index.

    Args:
        length: tokens of a sequence.
        offset: of the index; a range of its own for each split.
        size: number of samples.
    """

    def __init__(self, length: int, offset: int, size: int) -> None:
        self._length, self._offset, self._size = length, offset, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(self._offset + index)
        sample, ids, learned = Sample(torch.empty(0), torch.empty(0)), [], []
        while True:
            turn, answers = _turn(sample, generator, self._length - len(ids))
            if not turn:
                break
            ids += turn
            learned += answers
        room = self._length - len(ids)
        sample.ids = torch.tensor(ids + [TOKEN["<pad>"]] * room)
        sample.learned = torch.tensor(learned + [0] * room, dtype=torch.float32)
        return sample


def _turn(sample: Sample, generator: torch.Generator, room: int) -> tuple[list[int], list[int]]:
    """Token ids of the next turn and which of them are answers, none where it finds no room."""

    def one_of(choices: Sequence[str]) -> str:
        return list(choices)[int(torch.randint(len(choices), (), generator=generator))]

    kind = one_of(("look", "draw", "hear", "sing"))
    visual = kind in ("look", "draw")
    words = [one_of(options) for options in ((COLOURS, SHAPES, PLACES) if visual else (PITCHES, LOUDNESSES))]
    rows = IMAGE_ROWS if visual else FRAMES
    if 1 + rows + len(words) > room:
        return [], []
    media = picture(*words, generator) if visual else tone(*words)
    {"look": sample.seen, "draw": sample.drawn, "hear": sample.heard, "sing": sample.sung}[kind].append(media)
    said = [TOKEN[word] for word in words]
    mark = {"look": "<image>", "draw": "<draw>", "hear": "<tone>", "sing": "<sing>"}[kind]
    marks = [TOKEN[mark]] * rows
    if kind in ("look", "hear"):
        return [TOKEN[kind], *marks, *said], [0] * (1 + rows) + [1] * len(said)
    return [TOKEN[kind], *said, *marks], [0] * (1 + len(said) + rows)


def datasets(args: Namespace, samples: Sequence[int | None]) -> tuple[Turns, Turns, None]:
    """Turns to train and to validate on."""
    del samples  # the data is endless: an epoch is repeated as often as it takes
    return Turns(args.seq_length, 0, SAMPLES), Turns(args.seq_length, 10 * SAMPLES, SAMPLES), None


def collate(samples: Sequence[Sample]) -> dict[str, object]:
    """Keyword arguments of `MimoModel.forward`."""
    ids = torch.stack([sample.ids for sample in samples])
    answers = torch.stack([sample.learned for sample in samples])
    seen, drawn, heard, sung = (
        [media for sample in samples for media in getattr(sample, kind)] for kind in ("seen", "drawn", "heard", "sung")
    )
    inputs, targets = {}, {}
    if seen:
        inputs["images"] = {"vit": {"images": torch.stack(seen)}}
    if heard:
        inputs["tones"] = {"frames": {"input": torch.stack(heard)}}
    if drawn:
        targets["images"] = {"pixels": {"target": images_to_patches(torch.stack(drawn), PATCH)}}
    if sung:
        targets["tones"] = {"waves": {"target": torch.cat(sung)}}
    return {
        "input_ids": ids,
        "labels": ids.roll(-1, dims=1),
        "loss_mask": answers.roll(-1, dims=1),
        "modality_inputs": inputs,
        "modality_targets": targets,
    }


# Model -----------------------------------------------------------------------------------


def model_config(args: Namespace) -> MimoModelConfig:
    """The model; sizes of the language model are Megatron's arguments."""
    return MimoModelConfig(
        language_model=language_spec_from_args(args),
        modality_submodules={"images": image_spec(args), "tones": tone_spec(args)},
        special_token_ids={"images": TOKEN["<image>"], "tones": TOKEN["<tone>"]},
        generation_token_ids={"images": TOKEN["<draw>"], "tones": TOKEN["<sing>"]},
    )


def image_spec(args: Namespace) -> ModuleSpec:
    """Images: read by a small vision transformer, written by a flow transformer over all patches."""
    vision = encoder_config_from_args(args, num_layers=2, hidden_size=128, num_attention_heads=4)
    projection = encoder_config_from_args(
        args,
        num_layers=1,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,  # not used, but checked
    )
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"image_shape": (3, SIDE, SIDE)},
        submodules={
            "encoders": {
                "vit": specs.clip_vit_spec(
                    vision, backend_from_args(args), patch_dim=PATCH, img_h=SIDE, img_w=SIDE, add_class_token=False
                )
            },
            "input_projections": [
                ModuleSpec(
                    module=MultimodalProjector,
                    params=dict(
                        config=projection,
                        submodules=specs.projection_spec(projection, backend_from_args(args)).submodules,
                        projector_type="mlp",
                        input_size=vision.hidden_size,
                    ),
                )
            ],
            "generation_input": _queries(args, IMAGE_ROWS),
            "decoders": {
                "pixels": ModuleSpec(
                    module=FlowTransformerDecoder,
                    params=dict(
                        width=args.hidden_size,
                        target_width=3 * PATCH * PATCH,
                        rows_per_item=IMAGE_ROWS,
                        targets_per_item=IMAGE_ROWS,
                        hidden_width=128,
                        depth=2,
                        heads=4,
                    ),
                )
            },
        },
    )


def tone_spec(args: Namespace) -> ModuleSpec:
    """Tones: read frame by frame, written frame by frame."""
    return ModuleSpec(
        module=AudioModalitySubmodules,
        params={"frames_per_clip": FRAMES},
        submodules={
            "encoders": {
                "frames": ModuleSpec(module=nn.Linear, params=dict(in_features=FRAME, out_features=args.hidden_size))
            },
            "generation_input": _queries(args, FRAMES),
            "decoders": {
                "waves": ModuleSpec(
                    module=RegressionDecoder,
                    params=dict(width=args.hidden_size, target_width=FRAME, hidden_width=args.hidden_size),
                )
            },
        },
    )


def _queries(args: Namespace, rows: int) -> ModuleSpec:
    return ModuleSpec(module=QueryInput, params=dict(hidden_size=args.hidden_size, rows_per_item=rows))
