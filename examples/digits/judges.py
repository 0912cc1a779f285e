"""The judges of the demo, which never see the model: they look at its images and listen to its tones."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from examples.digits.data import Digits
from examples.digits.tones import HIGH_HZ, KEY_HZ, LOW_HZ, RATE

KEY_OF_HZ = {hz: key for key, hz in KEY_HZ.items()}
FRAME = 205
"""Samples of a frame that the detector listens to: 25.6 ms, the usual choice for DTMF at 8 kHz."""


def accuracy(found: Sequence, expected: Sequence) -> float:
    """The share of `found` that equals `expected`, one by one."""
    return float(np.mean([a == b for a, b in zip(found, expected, strict=True)]))


def train_svm(digits: Digits) -> SVC:
    """A classifier of real digits, with the settings of scikit-learn's own example for them."""
    return SVC(gamma=0.001).fit(_grey_levels(digits.images), digits.labels.numpy())


def recognise(svm: SVC, images: Tensor) -> list[int]:
    """The digits that a classifier takes images `[n, 8, 8]` for."""
    return svm.predict(_grey_levels(images)).tolist()


def diversity(drawn: Digits, real: Digits) -> float:
    """How far apart images of one digit lie, over how far apart real ones do; mean of the ten digits.

    0 if every image of a digit is the same, 1 if they differ as much as handwriting does.
    """
    ratios = [
        torch.pdist(drawn.images[drawn.labels == digit].flatten(1)).mean()
        / torch.pdist(real.images[real.labels == digit].flatten(1)).mean()
        for digit in range(10)
    ]
    return float(torch.stack(ratios).mean())


def novelty(drawn: Tensor, seen: Digits, held_out: Digits) -> float:
    """How far images `[n, 8, 8]` lie from the nearest training image, over how far held-out digits do.

    0 if every image is a copy of one from training, 1 if they are as new as unseen handwriting.
    """

    def to_nearest(images: Tensor) -> Tensor:
        return torch.cdist(images.flatten(1), seen.images.flatten(1)).amin(1).mean()

    return float(to_nearest(drawn) / to_nearest(held_out.images))


def detect_key(clip: np.ndarray) -> str | None:
    """The telephone key that a clip `[n]` sounds, or None where none is clear.

    Listens to the frames at least half as loud as the loudest. One frequency of each group must stand 6 dB
    above the group's others, and the two together must carry at least half of the energy. In silence none is.
    """
    frames = np.lib.stride_tricks.sliding_window_view(clip, FRAME)[:: FRAME // 4]
    energy = (frames**2).sum(-1)
    loud = energy >= 0.5 * energy.max()
    power = goertzel(frames[loud], LOW_HZ + HIGH_HZ).sum(0)
    low, high = power[: len(LOW_HZ)], power[len(LOW_HZ) :]
    clear = energy.any() and all(np.sort(group)[-1] >= 4 * np.sort(group)[-2] for group in (low, high))
    if not clear or low.max() + high.max() < 0.5 * energy[loud].sum():
        return None
    return KEY_OF_HZ[LOW_HZ[low.argmax()], HIGH_HZ[high.argmax()]]


def goertzel(frames: np.ndarray, hz: Sequence[float]) -> np.ndarray:
    """The energy `[..., len(hz)]` of frames `[..., n]` at each frequency, that of a pure sine being all.

    Goertzel's recurrence `s[n] = x[n] + 2 cos(w) s[n - 1] - s[n - 2]`, for all frames at once.
    """
    turn = 2 * np.cos(2 * np.pi * np.array(hz) / RATE)
    last = before = np.zeros((*frames.shape[:-1], len(hz)))
    for n in range(frames.shape[-1]):
        last, before = frames[..., n, None] + turn * last - before, last
    return (last**2 + before**2 - turn * last * before) * 2 / frames.shape[-1]


def _grey_levels(images: Tensor) -> np.ndarray:
    """`[n, 8, 8]` in [-1, 1] as the rows `[n, 64]` of 0 to 16 that the set comes in."""
    return (images.flatten(1) * 8 + 8).numpy()
