"""The VQ-VAE of transformers' Janus as a codec of pictures that a `CodeTokenizer` wraps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mimo.hf.towers import Found, fresh, read, source

# Model type of the VQ-VAE alone, and of the whole model, in which it has a name.
_ALONE, _WHOLE = "janus_vqgan", "janus"
_NAME = "vqmodel"


@dataclass(frozen=True)
class ImageCodes:
    """What codes of pictures are.

    Args:
        codebook_size: how many there are.
        side: pixels of the square that one stands for.
    """

    codebook_size: int
    side: int

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of codes of a picture `size` (height, width).

        Raises:
            ValueError: squares do not fill it.
        """
        if size[0] % self.side or size[1] % self.side:
            raise ValueError(f"size: expected multiples of {self.side}, as the codec's squares are, found {list(size)}")
        return size[0] // self.side, size[1] // self.side


def image_codes(name_or_path: str | Path | None = None, *, config: Mapping[str, Any] | None = None) -> ImageCodes:
    """What codes an `HFImageCodec` of the same arguments has; no weight is read.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `HFImageCodec`.
    """
    return _told(_found(*source(name_or_path, config)).config)


class HFImageCodec(nn.Module):
    """Janus's VQ-VAE of transformers: pictures to codes and back, of any size that its squares fill.

    Args:
        name_or_path: of Janus, of which nothing else is read, or of its VQ-VAE alone: a directory, or a name on the
            hub.
        config: of the VQ-VAE, as `to_dict` gives it: builds it with fresh weights that are filled afterwards, and
            reads nothing. `save_pretrained` notes it.

    Attributes:
        codes: what its codes are.

    Raises:
        FileNotFoundError, ConnectionError: as `megatron_mimo.from_pretrained`.
        ValueError: another model, or tensors that are missing or surplus.

    Example:
        >>> codec = HFImageCodec("deepseek-community/Janus-Pro-1B")                       # doctest: +SKIP
        >>> tokenizer = CodeTokenizer(codec, grid=codec.codes.grid((384, 384)))           # doctest: +SKIP
    """

    def __init__(
        self, name_or_path: str | Path | None = None, *, config: Mapping[str, Any] | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        directory, own = source(name_or_path, config)
        found = _found(directory, own)
        self.codes = _told(found.config)
        self.model = fresh(found, None) if directory is None else read(found, directory, torch.float32)

    def encode(self, media: Tensor) -> Tensor:
        """Codes int64 `[n, height / side, width / side]` of pictures `[n, 3, height, width]` with values in [0, 1]."""
        rows, columns = self.codes.grid((media.shape[-2], media.shape[-1]))
        return self.model.encode(media * 2 - 1).image_tokens.reshape(media.shape[0], rows, columns)

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures `[n, 3, height, width]` of codes `[n, height / side, width / side]`; values about in [0, 1]."""
        # Janus compares pictures with entries as they are, and draws from entries of length 1.
        entries = F.normalize(self.model.quantize.embedding(tokens), dim=-1).permute(0, 3, 1, 2).contiguous()
        return (self.model.decoder(self.model.post_quant_conv(entries)) + 1) / 2


def own_config(config: Any) -> Any:
    """The VQ-VAE's configuration, in that of a whole Janus or its own."""
    return config.vq_config if config.model_type == _WHOLE else config


def _found(directory: Path | None, config: Any) -> Found:
    from transformers import JanusVQVAE

    if config.model_type not in (_ALONE, _WHOLE):
        raise ValueError(
            f"{directory or 'config'}: expected Janus or its VQ-VAE, found model_type {config.model_type!r}. Take a "
            "directory of one, or deepseek-community/Janus-Pro-1B."
        )
    return Found(JanusVQVAE, own_config(config), _NAME if config.model_type == _WHOLE else "")


def _told(config: Any) -> ImageCodes:
    return ImageCodes(int(config.num_embeddings), 2 ** (len(config.channel_multiplier) - 1))
