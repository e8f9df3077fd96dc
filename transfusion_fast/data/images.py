"""Pixels to what the model sees, and back."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


def scale_pixels(pixels: np.ndarray) -> np.ndarray:
    """uint8 to fp32 in [-1, 1], any shape."""
    return pixels.astype(np.float32) / 127.5 - 1


def unscale_pixels(values: np.ndarray) -> np.ndarray:
    """fp32 to uint8, any shape; values beyond [-1, 1] are clipped."""
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_grid(values: np.ndarray, patch_size: int) -> Tensor:
    """[N, height, width, channels] -> fp32 [N, rows, columns, C], a vector a patch."""
    rows, columns = values.shape[1] // patch_size, values.shape[2] // patch_size
    patches = patchify(values.astype(np.float32, copy=False), patch_size)
    return torch.from_numpy(patches.reshape(len(values), rows, columns, -1))


def from_grid(patches: np.ndarray, patch_size: int) -> np.ndarray:
    """The inverse of `to_grid`: [N, rows, columns, C] -> [N, height, width, channels]."""
    rows, columns, width = patches.shape[1:]
    return unpatchify(patches.reshape(-1, width), rows * patch_size, columns * patch_size, patch_size)


def pixels_to_latents(pixels: np.ndarray, patch_size: int) -> Tensor:
    """uint8 [N, height, width, channels] -> fp32 [N, rows, columns, C]."""
    return to_grid(scale_pixels(pixels), patch_size)


def latents_to_pixels(latents: np.ndarray, patch_size: int) -> np.ndarray:
    """fp32 [N, rows, columns, C] -> uint8 [N, height, width, channels]; values beyond [-1, 1] are clipped."""
    return unscale_pixels(from_grid(latents, patch_size))


Array = TypeVar("Array")


def patchify(images: Array, patch_size: int) -> Array:
    """[N, height, width, channels] -> [N * patches, patch_size^2 * channels], patches row by row.

    Both sides must be multiples of the patch size (einops raises otherwise).
    """
    return rearrange(images, "n (i p) (j q) c -> (n i j) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Array, height: int, width: int, patch_size: int) -> Array:
    """The inverse of `patchify` for N images of one size, given in values: -> [N, height, width, channels]."""
    return rearrange(
        patches, "(n i j) (p q c) -> n (i p) (j q) c",
        i=height // patch_size, j=width // patch_size, p=patch_size, q=patch_size,
    )  # fmt: skip
