"""Pixels, patches and pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import EinopsError
from PIL import Image

from transfusion_fast.data.images import latents_to_pixels, patchify, pixels_to_latents, unpatchify
from transfusion_fast.sampling.pictures import draw_grid


def test_patches_run_row_by_row_and_hold_their_rows_with_channels_last() -> None:
    image = np.arange(2 * 4 * 2).reshape(1, 2, 4, 2)
    assert patchify(image, 2).tolist() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpatchify_undoes_patchify_for_arrays_and_tensors(patch_size: int) -> None:
    images = np.random.default_rng(0).normal(size=(3, 8, 4, 2))
    for given in (images, torch.from_numpy(images)):
        assert (unpatchify(patchify(given, patch_size), 8, 4, patch_size) == given).all()


def test_a_side_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(EinopsError):
        patchify(np.zeros((1, 3, 4, 1)), 2)


def test_pixels_survive_the_way_to_latents_and_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
    latents = pixels_to_latents(pixels, 2)
    assert latents.shape == (5, 2, 3, 12) and latents.min() >= -1 and latents.max() <= 1
    assert (latents_to_pixels(latents.numpy(), 2) == pixels).all()


def test_latents_beyond_the_range_become_black_and_white() -> None:
    latents = np.array([-3.0, 3.0], dtype=np.float32).reshape(2, 1, 1, 1)
    assert latents_to_pixels(latents, 1).ravel().tolist() == [0, 255]


def test_a_picture_shows_rows_of_different_length(tmp_path: Path) -> None:
    white, black = (np.full((8, 8, 1), value, dtype=np.uint8) for value in (255, 0))
    draw_grid([("two", [[black, black]]), ("one", [[black]])], tmp_path / "grid.png")
    draw_grid([("two", [[black, black]]), ("one", [[white]])], tmp_path / "other.png")
    one, other = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("grid.png", "other.png"))
    assert one.shape == other.shape
    assert (one < 64).sum() > (other < 64).sum() * 1.3
