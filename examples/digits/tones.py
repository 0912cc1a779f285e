"""DTMF dial tones, synthesised as ITU-T Q.23 defines them."""

import torch
from torch import Tensor

RATE = 8000
"""Samples a second."""
CLIP = 1024
"""Samples of a clip, 128 ms."""

# ITU-T Q.23: a key sounds the frequency of its row and that of its column.
LOW_HZ = (697.0, 770.0, 852.0, 941.0)
HIGH_HZ = (1209.0, 1336.0, 1477.0)
KEYPAD = ("123", "456", "789", "*0#")
KEY_HZ = {key: (LOW_HZ[r], HIGH_HZ[c]) for r, keys in enumerate(KEYPAD) for c, key in enumerate(keys)}


def dial_tones(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Waveforms `[n, CLIP]`, within about [-1, 1], of the keys `digits` `[n]`.

    Drawn for each clip: the level (over 12 dB), the twist between its two frequencies (4 dB), both
    phases, duration (64 to 112 ms; ITU-T Q.24 wants 40) and noise (14 to 34 dB below the tone).
    """
    n = len(digits)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator)

    time = torch.arange(CLIP) / RATE
    hz = torch.tensor([KEY_HZ[str(digit)] for digit in range(10)])[digits]
    low = torch.sin(2 * torch.pi * (hz[:, :1] * time + between(0, 1)))
    high = torch.sin(2 * torch.pi * (hz[:, 1:] * time + between(0, 1)))
    twist = 10 ** (between(-2, 2) / 20)
    start, end = 0.008, 0.008 + between(0.064, 0.112)
    gate = torch.clamp(torch.minimum(time - start, end - time) / 0.002, 0, 1)  # 2 ms ramps: no click
    level = 0.4 * 10 ** (between(-12, 0) / 20)
    noise = 10 ** (between(-34, -14) / 20) * torch.randn(n, CLIP, generator=generator)
    return level * (gate * (low * twist + high / twist) + noise)
