"""Frozen codecs between raw media and what decoders learn: VQ codes, or VAE latents.

A tokenizer is trained elsewhere. Here it never trains: its parameters take no gradient, it stays in
eval mode whatever mode its parent enters, and its two directions run outside autograd.

Shapes: `n` media items, `T` tokens an item.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from megatron_mimo.assemble import images_to_patches, patches_to_images
from megatron_mimo.compat.torch import KeepsDtype

if TYPE_CHECKING:  # Megatron takes seconds to import and is not needed where modules are given built
    from megatron.core.transformer.spec_utils import ModuleSpec


@runtime_checkable
class Codec(Protocol):
    """What a tokenizer wraps: media to codes or latents, and back."""

    def encode(self, media: Tensor) -> Tensor: ...

    def decode(self, tokens: Tensor) -> Tensor: ...


class Tokenizer(KeepsDtype, ABC):
    """A frozen module that turns media into rows of tokens and back.

    It keeps the dtype it was built in whatever its parent is cast to: a codec trained in float32 gives
    other codes in bfloat16. Media and rows are cast to that dtype on the way in, and floating outputs
    are float32, as decoders' targets are.

    Args:
        module: a `Codec`, or its spec.
        tokens_per_item: `T`.

    Raises:
        TypeError: the codec lacks one of the two methods.
    """

    def __init__(self, module: nn.Module | ModuleSpec, tokens_per_item: int) -> None:
        super().__init__()
        self.module = built(module)
        if not isinstance(self.module, Codec):
            raise TypeError(
                f"{type(self).__name__} needs a codec with encode(media) and decode(tokens); "
                f"{type(self.module).__name__} lacks one or both. Wrap it in a module that has them."
            )
        self.tokens_per_item = tokens_per_item
        self.requires_grad_(False)
        self.eval()

    @property
    def codec(self) -> Codec:
        """What is wrapped."""
        return cast(Codec, self.module)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a frozen codec's batch statistics and dropout must not move."""
        del mode
        return super().train(False)

    def as_codec(self, values: Tensor) -> Tensor:
        """Floating values in the dtype that the codec computes in; codes as they are."""
        own = (*self.module.parameters(), *self.module.buffers())
        floating = (tensor.dtype for tensor in own if tensor.is_floating_point())
        return values.to(next(floating, torch.float32)) if values.is_floating_point() else values

    @abstractmethod
    def encode(self, media: Tensor) -> Tensor:
        """Rows `[n * T, ...]` of media `[n, ...]`, item by item."""

    @abstractmethod
    def decode(self, rows: Tensor) -> Tensor:
        """Media `[n, ...]` of rows `[n * T, ...]`."""

    def check_items(self, rows: Tensor) -> int:
        """The number of items that rows make up.

        Raises:
            ValueError: no whole number of items.
        """
        if rows.shape[0] % self.tokens_per_item:
            raise ValueError(
                f"{rows.shape[0]} rows do not fill items of {self.tokens_per_item} tokens: the span "
                "of generation tokens does not fit the tokenizer's grid."
            )
        return rows.shape[0] // self.tokens_per_item


class CodeTokenizer(Tokenizer):
    """Discrete codes of a VQ codec.

    Args:
        module: codec, or its spec, with `encode(media [n, ...]) -> codes` int64 of `n * T` (or
            `n * T * codebooks`) entries, item by item, and `decode(codes [n, *grid]) -> media`.
        grid: shape of an item's codes as `decode` takes them, e.g. `(24, 24)`; its product is `T`.
        codebooks: codes a token has. Above 1 the codec's last dim is the codebook.

    Example:
        >>> class Thirds(nn.Module):
        ...     def encode(self, media):
        ...         return (media * 3).long().clamp(max=2)
        ...     def decode(self, codes):
        ...         return (codes + 0.5) / 3
        >>> tokenizer = CodeTokenizer(Thirds(), grid=(2, 2))
        >>> tokenizer.encode(torch.tensor([[[0.1, 0.5], [0.5, 0.9]]]))
        tensor([0, 1, 1, 2])
    """

    def __init__(self, module: nn.Module | ModuleSpec, *, grid: tuple[int, ...], codebooks: int = 1) -> None:
        super().__init__(module, tokens_per_item=math.prod(grid))
        self.grid = tuple(grid)
        self.codebooks = codebooks

    @torch.no_grad()
    def encode(self, media: Tensor) -> Tensor:
        """Codes `[n * T]`, or `[n * T, codebooks]`, int64, of media `[n, ...]`.

        Raises:
            ValueError: the codec gives another number of codes.
        """
        codes = self.codec.encode(self.as_codec(media))
        expected = media.shape[0] * self.tokens_per_item * self.codebooks
        if codes.numel() != expected:
            raise ValueError(
                f"{type(self.module).__name__} encodes media {list(media.shape)} to codes "
                f"{list(codes.shape)}; a grid {list(self.grid)} with {self.codebooks} codebooks needs "
                f"{expected} of them. Fit `grid` to the media's size."
            )
        codes = codes.reshape(-1, self.codebooks)
        return codes.squeeze(1) if self.codebooks == 1 else codes

    @torch.no_grad()
    def decode(self, rows: Tensor) -> Tensor:
        """Media `[n, ...]` of codes `[n * T]` or `[n * T, codebooks]`."""
        items = self.check_items(rows)
        media = self.codec.decode(rows.reshape(items, *self.grid, *rows.shape[1:]))
        return _float32(media)


class LatentTokenizer(Tokenizer):
    """Continuous latents of a VAE, cut into square patches.

    Args:
        module: codec, or its spec, with `encode(images [n, ...]) -> latents [n, C, h, w]` and
            `decode(latents) -> images`.
        latent_shape: `(C, h, w)`.
        patch: side of a patch; a token holds `C * patch * patch` values.
        shift, scale: latents are learned as `(latent - shift) * scale`, which should have about unit
            variance.

    Raises:
        ValueError: a patch that does not divide the latent's grid.

    Example:
        >>> class Halved(nn.Module):
        ...     def encode(self, images):
        ...         return nn.functional.avg_pool2d(images, 2)
        ...     def decode(self, latents):
        ...         return nn.functional.interpolate(latents, scale_factor=2)
        >>> tokenizer = LatentTokenizer(Halved(), latent_shape=(3, 4, 4), patch=2)
        >>> tokenizer.encode(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([20, 12])
    """

    def __init__(
        self,
        module: nn.Module | ModuleSpec,
        *,
        latent_shape: tuple[int, int, int],
        patch: int = 1,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        channels, height, width = latent_shape
        if height % patch or width % patch:
            raise ValueError(f"patch {patch} does not divide latents of {height} x {width}")
        super().__init__(module, tokens_per_item=(height // patch) * (width // patch))
        self.latent_shape = (channels, height, width)
        self.patch = patch
        self.shift = shift
        self.scale = scale

    @torch.no_grad()
    def encode(self, media: Tensor) -> Tensor:
        """Latent patches `[n * T, C * patch * patch]` of images `[n, ...]`.

        Raises:
            ValueError: the codec gives latents of another shape.
        """
        latents = self.codec.encode(self.as_codec(media)).float()
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"{type(self.module).__name__} encodes images {list(media.shape)} to latents "
                f"{list(latents.shape)}, expected [n, *{list(self.latent_shape)}]. Fit `latent_shape` "
                "to the images' size."
            )
        return images_to_patches((latents - self.shift) * self.scale, self.patch)

    @torch.no_grad()
    def decode(self, rows: Tensor) -> Tensor:
        """Images of latent patches `[n * T, C * patch * patch]`."""
        self.check_items(rows)
        latents = patches_to_images(rows.float(), self.latent_shape) / self.scale + self.shift
        return _float32(self.codec.decode(self.as_codec(latents)))


def _float32(media: Tensor) -> Tensor:
    return media.float() if media.is_floating_point() else media


def built(module: nn.Module | ModuleSpec) -> nn.Module:
    """The module itself, or the one that a spec describes.

    Example:
        >>> built(nn.Identity())
        Identity()
    """
    if isinstance(module, nn.Module):
        return module
    from megatron_mimo.build import build

    return build(module, {})
