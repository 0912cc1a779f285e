"""EnCodec and Mimi of transformers as codecs that a `CodeTokenizer` wraps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.hf.files import open_checkpoint
from megatron_mimo.hf.towers import source

_KINDS = ("encodec", "mimi")


@dataclass(frozen=True)
class SoundCodes:
    """What codes of sounds are.

    Args:
        codebooks: that are taken.
        codebook_size: codes of each.
        sampling_rate: of the sounds, samples a second.
        samples_per_token: of a sound, which fill one frame of codes.
    """

    codebooks: int
    codebook_size: int
    sampling_rate: int
    samples_per_token: int


def sound_codes(
    name_or_path: str | Path | None = None, codebooks: int | None = None, *, config: Mapping[str, Any] | None = None
) -> SoundCodes:
    """What codes an `HFCodec` of the same arguments has; no weight is read.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `HFCodec`.
    """
    directory, own = source(name_or_path, config)
    _check(directory or "config", own)
    return _told(own, codebooks)


class HFCodec(nn.Module):
    """An audio codec of transformers: sounds to codes and back.

    Args:
        name_or_path: of EnCodec (one chunk, without loudness, as the 24 kHz model) or Mimi: a directory, or a name on
            the hub.
        codebooks: how many of the codec's residual codebooks to take; None for all.
        config: of the model, as `to_dict` gives it: builds it with fresh weights that are filled afterwards, and reads
            nothing. `save_pretrained` notes it.

    Attributes:
        codebooks: that are taken.
        codebook_size: codes of each.
        sampling_rate: of the sounds, samples a second.
        samples_per_token: of a sound, which fill one frame of codes.

    Raises:
        FileNotFoundError, ConnectionError: as `megatron_mimo.from_pretrained`.
        ValueError: another model, codes that alone do not make the sound, or more codebooks than there are.

    Example:
        >>> codec = HFCodec("kyutai/mimi", codebooks=8)                                          # doctest: +SKIP
        >>> tokenizer = CodeTokenizer(codec, grid=(codec.tokens(24000),), codebooks=8)           # doctest: +SKIP
    """

    def __init__(
        self,
        name_or_path: str | Path | None = None,
        codebooks: int | None = None,
        *,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        directory, own = source(name_or_path, config)
        _check(directory or "config", own)
        self.model = _fresh(own) if directory is None else _read(directory)
        self._bandwidth, _ = _codebooks(own, codebooks)
        told = _told(own, codebooks)
        self.codebooks, self.codebook_size = told.codebooks, told.codebook_size
        self.sampling_rate, self.samples_per_token = told.sampling_rate, told.samples_per_token

    def tokens(self, samples: int) -> int:
        """Frames of codes that a sound of so many samples gives.

        Raises:
            ValueError: its last frame would not be full, so that what comes back were longer.
        """
        if samples % self.samples_per_token:
            raise ValueError(
                f"expected samples in multiples of {self.samples_per_token}, found {samples}. Cut or pad the sound."
            )
        return samples // self.samples_per_token

    def encode(self, media: Tensor) -> Tensor:
        """Codes int64 `[n, frames, codebooks]` of sounds `[n, samples]` or `[n, channels, samples]`."""
        sounds = media if media.dim() == 3 else media[:, None]
        if self._bandwidth is None:
            return self.model.encode(sounds, num_quantizers=self.codebooks).audio_codes.transpose(1, 2)
        codes = self.model.encode(sounds, bandwidth=self._bandwidth).audio_codes
        return codes[0].transpose(1, 2)  # of the only chunk

    def decode(self, tokens: Tensor) -> Tensor:
        """Sounds `[n, channels, samples]` of codes `[n, frames, codebooks]`."""
        codes = tokens.reshape(tokens.shape[0], -1, self.codebooks).transpose(1, 2)
        if self._bandwidth is None:
            return self.model.decode(codes).audio_values
        return self.model.decode(codes[None], [None]).audio_values


def _fresh(config: Any) -> Any:
    from transformers import AutoModel

    return AutoModel.from_config(config)


def _read(directory: Path) -> Any:
    from transformers import AutoModel

    open_checkpoint(directory)  # refuses what is cut, quantised, or would run code
    model, report = AutoModel.from_pretrained(
        directory, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    told = {name: sorted(report[name]) for name in ("missing_keys", "unexpected_keys") if report[name]}
    if told:
        raise ValueError(f"{directory}: expected the tensors of {type(model).__name__}, found {told}.")
    return model


def _check(directory: Path | str, config: Any) -> None:
    if config.model_type not in _KINDS:
        raise ValueError(f"{directory}: expected one of {_KINDS}, found model_type {config.model_type!r}.")
    if config.model_type == "encodec" and (config.normalize or config.chunk_length_s is not None):
        raise ValueError(
            f"{directory}: expected one chunk without loudness beside its codes, found normalize={config.normalize} "
            f"and chunk_length_s={config.chunk_length_s}. Take EnCodec's 24 kHz model."
        )


def _told(config: Any, codebooks: int | None) -> SoundCodes:
    encodec = config.model_type == "encodec"
    frame = math.prod(config.upsampling_ratios) if encodec else round(config.sampling_rate / config.frame_rate)
    _, count = _codebooks(config, codebooks)
    return SoundCodes(count, int(config.codebook_size), int(config.sampling_rate), int(frame))


def _codebooks(config: Any, asked: int | None) -> tuple[float | None, int]:
    """The bandwidth that EnCodec is asked for, and how many codebooks that is."""
    if config.model_type == "mimi":
        lowest, highest = int(config.num_semantic_quantizers) + 1, int(config.num_quantizers)
        count = highest if asked is None else asked
        if not lowest <= count <= highest:
            raise ValueError(f"codebooks: expected {lowest} to {highest}, found {asked}")
        return None, count
    bits = math.log2(config.codebook_size) * config.frame_rate / 1000
    counts = {max(1, math.floor(bandwidth / bits)): bandwidth for bandwidth in config.target_bandwidths}
    count = max(counts) if asked is None else asked
    if count not in counts:
        raise ValueError(f"codebooks: expected one of {sorted(counts)}, as its bandwidths have, found {asked}")
    return counts[count], count
