"""Images <-> patch rows and waveforms <-> frame rows, each the inverse of the other."""

from __future__ import annotations

import math

from torch import Tensor


def images_to_patches(images: Tensor, patch: int) -> Tensor:
    """`[n * rows * columns, C * patch * patch]` patch rows of `[n, C, height, width]` images.

    Patches go row by row within an image, values `(channel, y, x)` within a patch.

    Raises:
        ValueError: a height or width that `patch` does not divide.

    Example:
        >>> import torch
        >>> images_to_patches(torch.zeros(5, 3, 8, 6), 2).shape
        torch.Size([60, 12])
    """
    n, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patch size {patch} does not divide images of {height} x {width}")
    grid = images.reshape(n, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch * patch)


def patches_to_images(patches: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """`[n, C, height, width]` images from the `[N, C * p * p]` rows of `images_to_patches`.

    Raises:
        ValueError: rows that are no square patches of such an image, or a number of rows that
            is not a whole number of images.

    Example:
        >>> import torch
        >>> images = torch.rand(5, 3, 8, 6)
        >>> torch.equal(patches_to_images(images_to_patches(images, 2), (3, 8, 6)), images)
        True
    """
    channels, height, width = image_shape
    count, values = patches.shape
    rows, columns = patch_grid(values, image_shape)
    patch = height // rows
    if count % (rows * columns):
        raise ValueError(
            f"{count} patch rows do not fill images of {rows} x {columns} = {rows * columns} "
            "patches; the span of generation tokens does not fit the image grid"
        )
    grid = patches.reshape(-1, rows, columns, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


def patch_grid(values: int, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns of square patches of `values` values each in an image `(C, height, width)`.

    Raises:
        ValueError: no such patch fills the image.

    Example:
        >>> patch_grid(12, (3, 8, 6))
        (4, 3)
    """
    channels, height, width = image_shape
    patch = math.isqrt(values // channels)
    if not patch or channels * patch * patch != values or height % patch or width % patch:
        raise ValueError(f"rows of {values} values are no square patches of an image {list(image_shape)}")
    return height // patch, width // patch


def waveforms_to_frames(waveforms: Tensor, frame: int) -> Tensor:
    """`[n * length / frame, frame]` rows of `[n, length]` waveforms, without overlap.

    Raises:
        ValueError: a length that `frame` does not divide.

    Example:
        >>> import torch
        >>> waveforms_to_frames(torch.zeros(3, 80), 20).shape
        torch.Size([12, 20])
    """
    if waveforms.shape[1] % frame:
        raise ValueError(f"frame {frame} does not divide waveforms of {waveforms.shape[1]} samples")
    return waveforms.reshape(-1, frame)


def frames_to_waveforms(frames: Tensor, frames_per_clip: int) -> Tensor:
    """`[n, frames_per_clip * frame]` waveforms from the rows of `waveforms_to_frames`.

    Raises:
        ValueError: a number of rows that is not a whole number of clips.

    Example:
        >>> import torch
        >>> frames_to_waveforms(torch.zeros(12, 20), 4).shape
        torch.Size([3, 80])
    """
    if frames.shape[0] % frames_per_clip:
        raise ValueError(
            f"{frames.shape[0]} frames do not fill clips of {frames_per_clip}; the span of "
            "generation tokens does not fit the clip"
        )
    return frames.reshape(-1, frames_per_clip * frames.shape[1])
