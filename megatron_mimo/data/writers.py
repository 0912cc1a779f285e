"""Opened media -> the targets of a decoder, and how many positions they are written at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from megatron_mimo.data.media import Limits, Sound, Video
from megatron_mimo.data.messages import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

Targets = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Writing:
    """One medium as targets.

    Args:
        rows: generation tokens that it is written at.
        targets: decoder -> keyword -> tensor with one item, or its rows, along dim 0.
        grid: `(t, h, w)` of its positions, where they have one.
        cost: numbers of its targets.
    """

    rows: int
    targets: Targets
    grid: tuple[int, int, int] | None = None
    cost: float = 0.0


class Writer(Protocol):
    """Makes targets of opened media; attributes as of `Reader`."""

    rate: float
    limits: Limits

    def __call__(self, medium: Image | Sound | Video) -> Writing:
        """The medium, as targets."""


class ImageWriter:
    """Images as targets `media` `[1, C, H, W]` float32, for a decoder that has a tokenizer of its own, or as patches.

    Args:
        decoder: its name in the modality.
        size: height and width; an image is scaled to cover it and cut at the middle.
        rows: generation tokens of an image.
        span: values that black and white become.
        channels: 3, or 1 for grey.
        grid: height and width of the positions, for position rules with a grid.
        patch: side of square patches, which become `target` `[rows, C * patch * patch]`, as
            `assemble.patches_to_images` takes them; None for `media`.
        limits: of what is opened.

    Raises:
        ValueError: a grid, or patches, of another number than `rows`.

    Example:
        >>> from PIL import Image
        >>> ImageWriter("codes", size=(4, 4), rows=16)(Image.new("RGB", (8, 4))).targets["codes"]["media"].shape
        torch.Size([1, 3, 4, 4])
    """

    rate = 0.0

    def __init__(
        self,
        decoder: str,
        *,
        size: tuple[int, int],
        rows: int,
        span: tuple[float, float] = (-1.0, 1.0),
        channels: int = 3,
        grid: tuple[int, int] | None = None,
        patch: int | None = None,
        limits: Limits = Limits(),
    ) -> None:
        if patch is not None and (
            size[0] % patch or size[1] % patch or (size[0] // patch) * (size[1] // patch) != rows
        ):
            raise ValueError(f"ImageWriter: squares of {patch} do not cut {size[0]} x {size[1]} into {rows} rows")
        if channels not in (1, 3):
            raise ValueError(f"ImageWriter: channels should be 1 or 3, found {channels}")
        if grid is not None and grid[0] * grid[1] != rows:
            raise ValueError(f"ImageWriter: a grid of {grid[0]} x {grid[1]} has not {rows} rows")
        self._decoder, self._size, self._rows, self._span = decoder, size, rows, span
        self._mode = "RGB" if channels == 3 else "L"
        self.grid = None if grid is None else (1, *grid)
        self._patch, self.limits = patch, limits

    def __call__(self, medium: Image) -> Writing:
        from PIL import ImageOps

        fitted = ImageOps.fit(medium, (self._size[1], self._size[0])).convert(self._mode)
        pixels = np.asarray(fitted, dtype=np.float32) / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        low, high = self._span
        media = torch.from_numpy(np.ascontiguousarray(pixels * (high - low) + low))[None]
        targets = {"media": media} if self._patch is None else {"target": self._patches(media[0])}
        return Writing(self._rows, {self._decoder: targets}, self.grid, float(media.numel()))

    def _patches(self, image: Tensor) -> Tensor:
        """`[rows, C * patch * patch]` of an image `[C, H, W]`: patches row by row, `(channel, y, x)` within one."""
        side = cast(int, self._patch)
        squares = image.unfold(1, side, side).unfold(2, side, side)  # [C, H / side, W / side, side, side]
        return squares.permute(1, 2, 0, 3, 4).reshape(self._rows, -1).contiguous()


class SoundWriter:
    """Clips of one length as targets `media` `[1, samples]` float32.

    Args:
        decoder: its name in the modality.
        samples: of a clip; a shorter one ends in silence, a longer one is refused.
        rate: samples a second.
        rows: generation tokens of a clip.
        limits: of what is opened.

    Attributes:
        seconds: of a clip at most.
    """

    def __init__(self, decoder: str, *, samples: int, rate: int, rows: int, limits: Limits = Limits()) -> None:
        self._decoder, self._samples, self._rows = decoder, samples, rows
        self.rate, self.limits = float(rate), limits
        self.seconds = samples / rate

    def __call__(self, medium: Sound) -> Writing:
        if len(medium.samples) > self._samples:
            raise SampleError(
                "too_large",
                f"audio: expected at most {self._samples} samples to write at {self.rate:g} a second, found "
                f"{len(medium.samples)}. Cut the clip.",
            )
        media = torch.zeros(1, self._samples)
        media[0, : len(medium.samples)] = torch.from_numpy(medium.samples)
        return Writing(self._rows, {self._decoder: {"media": media}}, None, float(media.numel()))
