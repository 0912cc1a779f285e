"""What generation gives: parts in order, each with its ids, log-probabilities and times, and files of them."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Ended = Literal["stop_id", "stop_string", "length", "error"]


@dataclass
class TextPart:
    """Text that the model said in one go.

    Attributes:
        ids: token ids, those that end the answer or begin a span included.
        text: what they say; None without a tokenizer.
        logprobs: float32 `[ids]`, log-probabilities in the model's own distribution, before temperature.
        sampling_logprobs: float32 `[ids]`, in the distribution that was drawn from, after temperature, penalty and
            whatever narrowed the choice; 0 for greedy tokens.
        rescored_logprobs: float32 `[ids]`, what one training forward over the whole sequence gives for them; None
            unless asked for.
        started, ended: seconds since the call began.
    """

    ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))
    sampling_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))
    rescored_logprobs: Tensor | None = None
    started: float = 0.0
    ended: float = 0.0
    kind: Literal["text"] = "text"


@dataclass
class MediaPart:
    """An image, a clip or what else a decoder wrote.

    Attributes:
        kind: "image", "audio", or the modality's name where it is neither.
        modality, decoder: which wrote it.
        ids: generation tokens that it took.
        value: what `ModalitySubmodules.finish` made of the samples, of one medium, on the CPU: `[C, height, width]`
            of an image, `[samples]` of a clip.
        samples: what the decoder drew, one row a target, on the CPU.
        started, ended: seconds since the call began.
    """

    kind: str
    modality: str
    decoder: str
    ids: list[int]
    value: Tensor
    samples: Tensor
    started: float = 0.0
    ended: float = 0.0


@dataclass
class GenerationOutput:
    """What the model answered to one prompt. Equal on every tensor- and pipeline-parallel rank.

    Attributes:
        parts: text and media in order.
        reason: why it ended: "stop_id", "stop_string", "length" (its limit), or "error".
        error: what was wrong with the prompt, with ``on_error="return"``; None otherwise.
        prompt_length: positions of the prompt.
        first_token: seconds from the call's beginning to its first token.
        seconds: to its last.
    """

    parts: list[TextPart | MediaPart] = field(default_factory=list)
    reason: Ended | None = None
    error: ValueError | None = None
    prompt_length: int = 0
    first_token: float = 0.0
    seconds: float = 0.0

    @property
    def ids(self) -> list[int]:
        """Ids of all parts, generation tokens included."""
        return [token for part in self.parts for token in part.ids]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(part.text or "" for part in self.parts if isinstance(part, TextPart))

    def _of_text(self, name: str) -> Tensor:
        found = [getattr(part, name) for part in self.parts if isinstance(part, TextPart)]
        return torch.cat(found) if found else torch.zeros(0)

    @property
    def logprobs(self) -> Tensor:
        """Float32, of every text token in order: before temperature."""
        return self._of_text("logprobs")

    @property
    def sampling_logprobs(self) -> Tensor:
        """Float32, of every text token in order: in the distribution that was drawn from."""
        return self._of_text("sampling_logprobs")

    @property
    def rescored_logprobs(self) -> Tensor | None:
        """Float32, of every text token in order, of one training forward; None unless asked for."""
        if any(isinstance(part, TextPart) and part.rescored_logprobs is None for part in self.parts):
            return None
        return self._of_text("rescored_logprobs")


def save(outputs: Sequence[GenerationOutput], directory: str | Path, *, sampling_rate: int = 16_000) -> list[Path]:
    """Writes every part to a file of its own, `<sample>-<part>.txt`, `.png`, `.wav` or `.pt`; gives their paths.

    Args:
        outputs: of one call.
        directory: made if it is not there.
        sampling_rate: of clips, in Hz.

    Images are `[1 or 3, height, width]` with values in [0, 1], clips `[samples]` or `[channels, samples]` in [-1, 1];
    what lies outside is clipped. Anything else is saved as a tensor.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, output in enumerate(outputs):
        if output.error is not None:
            paths.append(_text(root / f"{index}-error.txt", str(output.error)))
        for number, part in enumerate(output.parts):
            stem = root / f"{index}-{number}"
            if isinstance(part, TextPart):
                text = " ".join(map(str, part.ids)) if part.text is None else part.text
                paths.append(_text(stem.with_suffix(".txt"), text))
            elif part.kind == "image" and part.value.dim() == 3 and part.value.shape[0] in (1, 3):
                paths.append(_png(stem.with_suffix(".png"), part.value))
            elif part.kind == "audio" and part.value.dim() in (1, 2):
                paths.append(_wav(stem.with_suffix(".wav"), part.value, sampling_rate))
            else:
                torch.save(part.value, stem.with_suffix(".pt"))
                paths.append(stem.with_suffix(".pt"))
    return paths


def _text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _png(path: Path, image: Tensor) -> Path:
    from PIL import Image

    pixels = (image.float().clamp(0, 1) * 255).round().byte().cpu()
    array = (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()
    Image.fromarray(array).save(path)
    return path


def _wav(path: Path, clip: Tensor, rate: int) -> Path:
    channels = clip.reshape(-1, clip.shape[-1]).float().clamp(-1, 1).cpu()
    samples = (channels.t() * 32767).round().short().contiguous()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().tobytes())
    return path
