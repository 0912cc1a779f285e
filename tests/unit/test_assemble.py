"""Patches and frames are put together as they were taken apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.assemble import (
    frames_to_waveforms,
    images_to_patches,
    patches_to_images,
    waveforms_to_frames,
)

small = st.integers(1, 4)


@given(n=st.integers(0, 3), channels=small, rows=small, columns=small, patch=small)
def test_images_survive_patches(n, channels, rows, columns, patch):
    shape = (channels, rows * patch, columns * patch)
    images = torch.randn(n, *shape)
    patches = images_to_patches(images, patch)
    assert patches.shape == (n * rows * columns, channels * patch * patch)
    assert torch.equal(patches_to_images(patches, shape), images)


def test_patches_go_row_by_row():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert images_to_patches(image, 2)[1].tolist() == [2.0, 3.0, 6.0, 7.0]


@given(n=st.integers(0, 3), frames=small, frame=small)
def test_waveforms_survive_frames(n, frames, frame):
    waveforms = torch.randn(n, frames * frame)
    assert torch.equal(frames_to_waveforms(waveforms_to_frames(waveforms, frame), frames), waveforms)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: images_to_patches(torch.zeros(1, 1, 5, 4), 2), "does not divide images of 5 x 4"),
        (lambda: patches_to_images(torch.zeros(4, 3), (1, 4, 4)), "no square patches"),
        (lambda: patches_to_images(torch.zeros(3, 4), (1, 4, 4)), "3 patch rows do not fill"),
        (lambda: waveforms_to_frames(torch.zeros(1, 5), 2), "does not divide waveforms of 5"),
        (lambda: frames_to_waveforms(torch.zeros(3, 2), 2), "3 frames do not fill clips of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
