"""Opened media -> what an encoder takes, and how many positions that fills.

A reader makes one medium ready for the model's encoder; sizes, grids and rows are known from then on, on the host.
Readers on image processors, feature extractors and whole processors of `transformers` are here; any callable that gives
a `Reading` is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megatron_mimo.data.media import Limits, Sound, Video
from megatron_mimo.data.messages import Kind, SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

Grid = tuple[int, int, int]
Inputs = Mapping[str, Mapping[str, Tensor]]
TEXT_OUTPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Names in a processor's output that belong to the text around a medium."""


@dataclass(frozen=True)
class Reading:
    """One medium ready for its encoder.

    Args:
        rows: positions that its rows fill.
        inputs: encoder -> keyword -> tensor with one item, or this item's patches, along dim 0.
        grids: `(t, h, w)` of each run of its positions, after merging; one run unless `tokens` holds text between.
        step: seconds between two `t`, or 1.
        tokens: the ids that stand for the medium, None at each of the `rows` positions; None: `rows` positions on end.
        cost: numbers that its encoder reads, to balance packs by.
    """

    rows: int
    inputs: Inputs
    grids: tuple[Grid, ...] = ()
    step: float = 1.0
    tokens: tuple[int | None, ...] | None = None
    cost: float = 0.0


class Reader(Protocol):
    """Makes opened media ready for an encoder.

    Attributes:
        rate: samples (sound) or frames (video) a second that it wants; unused for images.
        limits: of what is opened for it.
    """

    rate: float
    limits: Limits

    def __call__(self, medium: Image | Sound | Video) -> Reading:
        """The medium, ready."""


class ImageReader:
    """Reads images with an image processor of `transformers`.

    Args:
        processor: such as `CLIPImageProcessor`, with `return_tensors="pt"`.
        encoder: the encoder's name in the modality.
        rows: positions of one image or tile; None: the grid's cells over the square of `merge`.
        merge: cells along each side that the model merges into one row.
        keywords: the processor's name of a tensor -> the encoder's; None passes all on as they are.
        max_pixels: a larger image is shrunk to as many before the processor sees it.
        limits: of what is opened.
        dtype: that workers give the pixels, such as the encoder's: bfloat16 halves what is sent and copied. None: the
            processor's.

    Raises:
        ValueError: neither `rows` nor a processor that gives `image_grid_thw`.
    """

    rate = 0.0

    def __init__(
        self,
        processor: Any,
        *,
        encoder: str = "tower",
        rows: int | None = None,
        merge: int = 1,
        keywords: Mapping[str, str] | None = None,
        max_pixels: int | None = None,
        limits: Limits = Limits(),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._processor, self._encoder, self._rows, self._merge = processor, encoder, rows, merge
        self._keywords, self._max_pixels, self.limits, self._dtype = keywords, max_pixels, limits, dtype

    def __call__(self, medium: Image) -> Reading:
        image = shrunk(medium, self._max_pixels)
        output = self._processor(images=[image], return_tensors="pt")
        grid = output.get("image_grid_thw")
        if grid is not None:
            grids: tuple[Grid, ...] = (_merged(grid[0].tolist(), self._merge),)
            rows = grids[0][0] * grids[0][1] * grids[0][2]
        elif self._rows is not None:
            first = output["pixel_values"]
            rows, grids = self._rows * (first.shape[0] if first.dim() == 4 else first.shape[1]), ()
        else:
            raise ValueError(
                f"{type(self._processor).__name__} gives no image_grid_thw: say how many rows an image has (rows=...)"
            )
        tensors = {name: self._cast(torch.as_tensor(value)) for name, value in output.items()}
        return _reading(self._encoder, tensors, self._keywords, rows, grids)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


class SoundReader:
    """Reads sounds of unequal length with a feature extractor of `transformers`, or as samples.

    Args:
        extractor: such as `WhisperFeatureExtractor`; None: the samples themselves are the input `waveforms`.
        rows: frames of the features (the last dim), or samples -> positions of the clip. Where the extractor gives an
            `attention_mask`, frames or samples that are no padding.
        encoder: the encoder's name in the modality.
        keywords: as of `ImageReader`.
        rate: samples a second; None: the extractor's.
        limits: of what is opened.
        options: keyword arguments of the extractor, such as `padding="do_not_pad"`.
    """

    def __init__(
        self,
        extractor: Any = None,
        *,
        rows: Callable[[int], int],
        encoder: str = "tower",
        keywords: Mapping[str, str] | None = None,
        rate: int | None = None,
        limits: Limits = Limits(),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if extractor is None and rate is None:
            raise ValueError("SoundReader without an extractor needs a rate, in samples a second")
        self._extractor, self._rows, self._encoder, self._keywords = extractor, rows, encoder, keywords
        self.rate = float(rate if rate is not None else extractor.sampling_rate)
        self.limits, self._options = limits, dict(options or {})

    def __call__(self, medium: Sound) -> Reading:
        if self._extractor is None:
            output = {"waveforms": torch.from_numpy(medium.samples)[None]}
        else:
            given = self._extractor(medium.samples, sampling_rate=int(self.rate), return_tensors="pt", **self._options)
            output = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        mask = output.get("attention_mask")
        rows = self._rows(next(iter(output.values())).shape[-1] if mask is None else int(mask.sum()))
        if rows < 1:
            raise SampleError(
                "media", f"a sound of {len(medium.samples)} samples is too short for one row of the encoder"
            )
        return _reading(self._encoder, output, self._keywords, rows, ())


class ProcessorReader:
    """Reads media as a whole processor of `transformers` does: what it writes for a placeholder stands in the ids.

    Row breaks, timestamps and tiles are the processor's own, so any model that has one works, by name or directory:
    `ProcessorReader(AutoProcessor.from_pretrained(name), "image")`.

    Args:
        processor: with a tokenizer.
        kind: image, audio or video.
        encoder: the encoder's name in the modality.
        keywords: as of `ImageReader`.
        max_pixels: a larger image is shrunk to as many before the processor sees it.
        rate: frames (video) or samples (audio) a second; None: the processor's own, or 2 frames.
        limits: of what is opened.

    Raises:
        ValueError: the processor has no placeholder for that kind.
    """

    def __init__(
        self,
        processor: Any,
        kind: Kind,
        *,
        encoder: str = "tower",
        keywords: Mapping[str, str] | None = None,
        max_pixels: int | None = None,
        rate: float | None = None,
        limits: Limits = Limits(),
    ) -> None:
        self._processor, self._kind, self._encoder, self._keywords = processor, kind, encoder, keywords
        self._max_pixels, self.limits = max_pixels, limits
        self.placeholder = placeholder_of(processor, kind)
        self.token_id = processor.tokenizer.convert_tokens_to_ids(self.placeholder)
        self.rate = float(rate if rate is not None else _rate_of(processor, kind))

    def __call__(self, medium: Image | Sound | Video) -> Reading:
        given = self._processor(
            text=[self.placeholder], add_special_tokens=False, return_tensors="pt", **self._arguments(medium)
        )
        ids = given["input_ids"][0].tolist()
        tokens = tuple(None if id == self.token_id else id for id in ids)
        rows = tokens.count(None)
        if rows < 1:
            raise SampleError("media", f"the processor left no position to the {self._kind}")
        output = {
            name: value for name, value in given.items() if isinstance(value, Tensor) and name not in TEXT_OUTPUTS
        }
        grids = self._grids(output, tokens)
        step = float(given["second_per_grid_ts"][0]) if "second_per_grid_ts" in given else 1.0
        return _reading(self._encoder, output, self._keywords, rows, grids, step, tokens)

    def _arguments(self, medium: Image | Sound | Video) -> dict[str, Any]:
        if isinstance(medium, Sound):
            return {"audio": [medium.samples], "sampling_rate": medium.rate}
        if isinstance(medium, Video):
            frames = torch.from_numpy(medium.frames).permute(0, 3, 1, 2)
            count = len(frames)
            metadata = {
                "total_num_frames": count,
                "fps": medium.rate,
                "duration": count / medium.rate,
                "frames_indices": list(range(count)),
            }
            return {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False, "fps": medium.rate}
        return {"images": [shrunk(medium, self._max_pixels)]}

    def _grids(self, output: Mapping[str, Tensor], tokens: Sequence[int | None]) -> tuple[Grid, ...]:
        grid = output.get(f"{self._kind}_grid_thw")
        if grid is None:
            return ()
        part = self._processor.video_processor if self._kind == "video" else self._processor.image_processor
        t, h, w = _merged(grid[0].tolist(), part.merge_size)
        runs = sum(token is None and (at == 0 or tokens[at - 1] is not None) for at, token in enumerate(tokens))
        # Some models write a timestamp before each frame; every frame is then a run of its own.
        return ((t, h, w),) if runs == 1 else ((1, h, w),) * runs


def placeholder_of(processor: Any, kind: Kind) -> str:
    """The text that a processor of `transformers` takes as the place of one medium.

    Raises:
        ValueError: it has none for that kind.
    """
    placeholder = vars(processor).get(f"{kind}_token")
    if placeholder is None:
        raise ValueError(f"{type(processor).__name__} has no {kind}_token: it reads no {kind}")
    return str(placeholder)


def shrunk(image: Image, max_pixels: int | None) -> Image:
    """The image with at most `max_pixels` pixels, in its own proportions."""
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    scale = sqrt(max_pixels / (image.width * image.height))
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def _merged(grid: Sequence[int], merge: int) -> Grid:
    return int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge


def _rate_of(processor: Any, kind: Kind) -> float:
    if kind == "audio":
        return float(processor.feature_extractor.sampling_rate)
    return 2.0


def _reading(
    encoder: str,
    output: Mapping[str, Any],
    keywords: Mapping[str, str] | None,
    rows: int,
    grids: tuple[Grid, ...],
    step: float = 1.0,
    tokens: tuple[int | None, ...] | None = None,
) -> Reading:
    named = {name: name for name in output} if keywords is None else keywords
    tensors = {named[name]: torch.as_tensor(value) for name, value in output.items() if name in named}
    cost = float(sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()))
    return Reading(rows, {encoder: tensors}, grids, step, tokens, cost)
