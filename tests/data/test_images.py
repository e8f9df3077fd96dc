"""Pixels and patches."""

import numpy as np
import pytest
import torch
from einops import EinopsError

from transfusion_fast.data.images import from_grid, latents_to_pixels, patchify, pixels_to_latents, to_grid, unpatchify


def test_patches_run_row_by_row_and_hold_their_rows_with_channels_last() -> None:
    image = np.arange(2 * 4 * 2).reshape(1, 2, 4, 2)
    expected = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert patchify(image, 2).tolist() == expected
    assert to_grid(image, 2).tolist() == [[expected]] and to_grid(image, 2).dtype == torch.float32


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_of_arrays_and_tensors_become_images_again(patch_size: int) -> None:
    images = np.random.default_rng(0).normal(size=(3, 8, 4, 2)).astype(np.float32)
    for given in (images, torch.from_numpy(images)):
        assert (unpatchify(patchify(given, patch_size), 8, 4, patch_size) == given).all()
    assert (from_grid(to_grid(images, patch_size).numpy(), patch_size) == images).all()


def test_a_side_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(EinopsError):
        patchify(np.zeros((1, 3, 4, 1)), 2)


def test_pixels_become_latents_in_their_range_and_pixels_again() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    latents = pixels_to_latents(pixels, 1)
    torch.testing.assert_close(latents.flatten(), torch.linspace(-1, 1, 256))
    assert (latents_to_pixels(latents.numpy(), 1) == pixels).all()


def test_latents_beyond_the_range_become_black_and_white() -> None:
    latents = np.array([-3.0, 3.0], dtype=np.float32).reshape(2, 1, 1, 1)
    assert latents_to_pixels(latents, 1).ravel().tolist() == [0, 255]
