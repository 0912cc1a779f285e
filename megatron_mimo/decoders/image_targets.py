"""What a decoder of whole images learns to write: images or latents, with draws of noise by steps.

Shapes: `n` items (images), `C, h, w` of an image or latent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from megatron_mimo.assemble import patches_to_images
from megatron_mimo.decoders.arguments import check_within
from megatron_mimo.decoders.targets import TargetDescription, Targets
from megatron_mimo.decoders.tokenizers import LatentTokenizer
from megatron_mimo.draws import draws

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True, kw_only=True)
class ImageTargets(TargetDescription):
    """Whole images or latents, one a span of rows: `target` floating `[n, C, h, w]`; optionally `weight` `[n]` and the
    draws `step` int64 `[n]`, `noise` `[n, C, h, w]` and `drop` bool `[n]`, which are added otherwise.

    Args:
        sample_shape: `(C, h, w)`.
        rows_per_item: length of a span.
        steps: how many steps of noise there are to draw from.
        tokenizer: frozen VAE, or its spec, that makes latents of `media`.
    """

    optional: ClassVar[tuple[str, ...]] = ("weight", "step", "noise", "drop")

    sample_shape: tuple[int, int, int]
    rows_per_item: int
    steps: int
    tokenizer: LatentTokenizer | ModuleSpec | None = field(default=None, compare=False, repr=False)

    @property
    def rows_per_medium(self) -> int:
        """A span's rows."""
        return self.rows_per_item

    def check_value(self, value: Tensor, where: str) -> None:
        """Refuses what is no `[n, C, h, w]`."""
        if value.ndim != 4 or tuple(value.shape[1:]) != self.sample_shape:
            form = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"{where}: target must be [n, {form}], got {list(value.shape)}")

    def shapes(self, count: int, items: int, targets: Targets) -> dict[str, tuple[int, ...]]:
        """`weight`, `step` and `drop` `[n]`, `noise` as the images."""
        del targets
        return {"noise": (count, *self.sample_shape), **dict.fromkeys(("weight", "step", "drop"), (items,))}

    def check_beside(self, beside: Targets, where: str = "") -> None:
        """A `step` that the scheduler does not have is refused too."""
        super().check_beside(beside, where)
        if "step" in beside:
            check_within(beside["step"], f"{where}step", 0, self.steps - 1)

    def encoded(self, media: Tensor) -> Tensor:
        """Latents `[n, C, h, w]`."""
        return patches_to_images(super().encoded(media), self.sample_shape)

    def media_count(self, media: Tensor) -> int:
        """One target an image."""
        return media.shape[0]

    def drawn(self, tensors: dict[str, Tensor], items: int, stream: str) -> dict[str, Tensor]:
        """With `step` and `noise`."""
        clean = tensors["target"]
        if "step" not in tensors:
            with draws(f"{stream}/step"):
                tensors["step"] = torch.randint(self.steps, (items,), device=clean.device)
        if "noise" not in tensors:
            with draws(f"{stream}/noise"):
                tensors["noise"] = torch.randn(clean.shape, device=clean.device)
        return tensors
