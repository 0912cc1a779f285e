"""Media of a record -> decoded images, sounds and videos, within bounds of place and size."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from megatron_mimo.data.messages import Kind, Medium, SampleError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sound:
    """One clip: `samples` float32 `[n]`, one channel, at `rate` a second."""

    samples: np.ndarray
    rate: int


@dataclass(frozen=True)
class Video:
    """Frames that were taken from a video: uint8 `[T, H, W, 3]`, `rate` of them a second."""

    frames: np.ndarray
    rate: float


@dataclass(frozen=True)
class Limits:
    """What a medium may be at most; a larger one is refused before it is decoded.

    Args:
        bytes: of a file.
        pixels: of an image or a frame, as its header says: a picture of a few kilobytes can hold gigabytes.
        seconds: of a sound or a video.
        frames: taken from a video.

    Example:
        >>> Limits(pixels=1_000_000).pixels
        1000000
    """

    bytes: int = 512 * 2**20
    pixels: int = 64_000_000
    seconds: float = 3600.0
    frames: int = 768


def read_bytes(medium: Medium, root: Path | None, limits: Limits = Limits()) -> bytes:
    """The bytes of a medium that is not decoded yet.

    Args:
        medium: with a path or data.
        root: the directory that its path must lie in once all links are followed; None refuses every path.
        limits: of size.

    Raises:
        SampleError: no such file, a path or a link that leads out of the root, something that is no file, or too many
            bytes.
    """
    if medium.data is not None:
        _check_size(len(medium.data), limits)
        return medium.data
    path = _contained(str(medium.path), root)
    try:
        # Not to wait for a pipe's other end, and not to follow a link that was put there since.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SampleError("missing", f"{medium.path!r} below {root} cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SampleError("missing", f"{medium.path!r} below {root}: expected a file, found something else")
        _check_size(status.st_size, limits)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _contained(path: str, root: Path | None) -> str:
    if root is None:
        raise SampleError("outside", f"{path!r}: this source has no media_root, so it takes no paths. Set one.")
    try:
        real_root = os.path.realpath(root)
        real = os.path.realpath(os.path.join(real_root, path))
    except (OSError, ValueError) as error:  # a null byte, a loop of links
        raise SampleError("missing", f"{path[:200]!r} is no path: {error}") from None
    if os.path.commonpath([real_root, real]) != real_root:
        raise SampleError(
            "outside",
            f"{path!r} leads out of {root}. Media must lie below the media root, links followed; set media_root "
            "(--media-root) to a directory that holds them all.",
        )
    return real


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.bytes:
        raise SampleError("too_large", f"expected at most {limits.bytes} bytes (Limits.bytes), found {size}")


def open_image(medium: Medium, root: Path | None = None, limits: Limits = Limits()) -> Image:
    """The image, upright, in RGB.

    Raises:
        SampleError: as `read_bytes`, no image, a cut one, or more pixels than `limits` allows.
    """
    from PIL import Image, ImageOps

    if medium.value is not None and not isinstance(medium.value, Image.Image):
        raise SampleError("form", f"image: expected a file or an image of PIL, found {type(medium.value).__name__}")
    given: Image.Image | None = medium.value
    data = None if given is not None else read_bytes(medium, root, limits)

    def decode() -> Image.Image:
        with warnings.catch_warnings():  # the bound is ours, and an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = given if given is not None else Image.open(io.BytesIO(cast(bytes, data)))
        _check_pixels(image.size, limits)
        return ImageOps.exif_transpose(image).convert("RGB")

    try:
        return _decoded("image", medium, decode)
    except Image.DecompressionBombError as error:
        raise SampleError("too_large", f"image {_name(medium)}: {error}") from None


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.pixels:
        raise SampleError(
            "too_large", f"expected at most {limits.pixels} pixels (Limits.pixels), found {size[0]} x {size[1]}"
        )


def open_sound(medium: Medium, rate: int, root: Path | None = None, limits: Limits = Limits()) -> Sound:
    """The sound in one channel at `rate` samples a second.

    Raises:
        SampleError: as `read_bytes`, no sound, or more seconds than `limits` allows.
        ImportError: soundfile or soxr is not installed (extra `data`).
    """
    soundfile, soxr = _library("soundfile"), _library("soxr")
    if medium.value is None:
        data = read_bytes(medium, root, limits)

        def decode() -> tuple[np.ndarray, int]:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                _check_seconds(file.frames / file.samplerate, limits)
                return file.read(dtype="float32", always_2d=True).mean(1), file.samplerate

        samples, found = _decoded("audio", medium, decode)
    else:
        if not isinstance(medium.value, tuple):
            raise SampleError("form", f"audio: expected a file or (samples, rate), found {type(medium.value).__name__}")
        samples, found = np.asarray(medium.value[0], dtype=np.float32), medium.value[1]
        _check_seconds(samples.shape[-1] / found, limits)
        samples = samples if samples.ndim == 1 else samples.mean(0)
    if not len(samples):
        raise SampleError("media", f"audio {_name(medium)} has no samples")
    return Sound(np.ascontiguousarray(samples if found == rate else soxr.resample(samples, found, rate)), rate)


def _check_seconds(seconds: float, limits: Limits) -> None:
    if seconds > limits.seconds:
        raise SampleError(
            "too_large", f"expected at most {limits.seconds} seconds (Limits.seconds), found {seconds:.1f}"
        )


def open_video(medium: Medium, rate: float, root: Path | None = None, limits: Limits = Limits()) -> Video:
    """Frames of the video, `rate` a second where it has as many, spread over the whole of it.

    Raises:
        SampleError: as `read_bytes`, no video, no frame, or more than `limits` allows.
        ImportError: av is not installed (extra `data`).
    """
    av = _library("av")
    if medium.value is not None:
        raise SampleError("form", f"video: expected a file, found {type(medium.value).__name__}")
    data = read_bytes(medium, root, limits)

    def decode() -> Video:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise SampleError("media", f"video {_name(medium)} has no pictures")
            stream = container.streams.video[0]
            _check_pixels((stream.codec_context.width, stream.codec_context.height), limits)
            native = float(stream.average_rate or rate)
            return Video(_frames(container.decode(stream), rate, limits, _name(medium)), min(rate, native))

    return _decoded("video", medium, decode)


def _frames(decoded: Any, rate: float, limits: Limits, name: str) -> np.ndarray:
    """Every frame that is the first at or after a multiple of `1 / rate`."""
    frames: list[np.ndarray] = []
    due = 0.0
    for frame in decoded:
        time = float(frame.time or 0.0)
        _check_seconds(time, limits)
        if time + 1e-6 < due:
            continue
        if len(frames) == limits.frames:
            raise SampleError(
                "too_large", f"expected at most {limits.frames} frames (Limits.frames) at {rate} a second"
            )
        frames.append(frame.to_ndarray(format="rgb24"))
        due = (np.floor(time * rate + 1e-6) + 1) / rate
    if not frames:
        raise SampleError("media", f"video {name} has no frame")
    return np.stack(frames)


def _decoded(kind: Kind, medium: Medium, decode: Callable[[], Any]) -> Any:
    """What `decode` gives. A decoder raises anything on a broken file: it becomes one error that says which file."""
    try:
        return decode()
    except SampleError:
        raise
    except Exception as error:
        if type(error).__name__ == "DecompressionBombError":
            raise
        said = re.sub(r"\s*<_io\.BytesIO object at \w+>", "", str(error))  # which stands for the file's bytes
        reason = f"{type(error).__name__}: {said[:200]}"
        raise SampleError("media", f"{kind} {_name(medium)} cannot be decoded ({reason})") from None


def _name(medium: Medium) -> str:
    if medium.path is not None:
        return repr(medium.path)
    return "given as a value" if medium.data is None else f"of {len(medium.data)} bytes"


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed to open this medium: pip install 'megatron-mimo[data]'") from error
