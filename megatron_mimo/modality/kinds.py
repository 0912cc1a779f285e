"""Images and audio: what their inputs may be called, and how samples become whole images and clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from megatron_mimo.assemble import frames_to_waveforms, patch_grid, patches_to_images
from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.modality.submodules import ModalitySubmodules


class VisionModalitySubmodules(ModalitySubmodules):
    """Images: inputs may be called `pixel_values` or `images` whatever the encoder calls them.

    Args:
        encoders, decoders, input_projections, output_projections, generation_input, combine: see
            `ModalitySubmodules`.
        image_shape: `(channels, height, width)` of decoded images. With it, `[N, D]` samples
            (one flattened square patch a row, `(channel, y, x)` within it, patches row by row)
            come back as `[n, channels, height, width]`. Samples that are images pass unchanged.
    """

    input_aliases: ClassVar[Mapping[str, str]] = {"pixel_values": "x", "images": "x"}

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, Decoder] | None = None,
        input_projections: Sequence[nn.Module] | None = None,
        output_projections: Sequence[nn.Module] | None = None,
        generation_input: GenerationInput | None = None,
        combine: Literal["concatenate", "interleave"] | None = None,
        *,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(encoders, decoders, input_projections, output_projections, generation_input, combine)
        self.image_shape = image_shape

    def samples_per_medium(self, width: int) -> int:
        """Patches of `width` values in an image of `image_shape`.

        Raises:
            ValueError: no square patches of that many values fill it.
        """
        return 1 if self.image_shape is None else math.prod(patch_grid(width, self.image_shape))

    def assemble(self, samples: Tensor) -> Tensor:
        """Images `[n, C, height, width]` from patch rows `[N, D]`."""
        if self.image_shape is None or samples.dim() != 2:
            return samples
        return patches_to_images(samples, self.image_shape)


class AudioModalitySubmodules(ModalitySubmodules):
    """Audio: inputs may be called `input_features` whatever the encoder calls them.

    Args:
        encoders, decoders, input_projections, output_projections, generation_input, combine: see
            `ModalitySubmodules`.
        frames_per_clip: with it, `[N, D]` samples (one frame of D waveform samples a row) come
            back as `[n, frames_per_clip * D]`. Other samples pass unchanged.
    """

    input_aliases: ClassVar[Mapping[str, str]] = {"input_features": "x", "waveforms": "x"}

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, Decoder] | None = None,
        input_projections: Sequence[nn.Module] | None = None,
        output_projections: Sequence[nn.Module] | None = None,
        generation_input: GenerationInput | None = None,
        combine: Literal["concatenate", "interleave"] | None = None,
        *,
        frames_per_clip: int | None = None,
    ) -> None:
        super().__init__(encoders, decoders, input_projections, output_projections, generation_input, combine)
        self.frames_per_clip = frames_per_clip

    def samples_per_medium(self, width: int) -> int:
        """`frames_per_clip`, whatever the width of a frame."""
        return self.frames_per_clip or super().samples_per_medium(width)

    def assemble(self, samples: Tensor) -> Tensor:
        """Waveforms `[n, frames_per_clip * D]` from frame rows `[N, D]`."""
        if self.frames_per_clip is None or samples.dim() != 2:
            return samples
        return frames_to_waveforms(samples, self.frames_per_clip)
