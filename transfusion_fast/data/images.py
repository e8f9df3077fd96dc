"""Conversion of pixels to the patches of latents that the model sees, and back."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

Array = TypeVar("Array")


def scale_pixels(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 of any shape to fp32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


def unscale_pixels(values: np.ndarray) -> np.ndarray:
    """Convert fp32 of any shape to uint8, clipping values to [-1, 1]."""
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def patchify(images: Array, patch_size: int) -> Array:
    """Cut [N, height, width, channels] into [N * patches, patch_size^2 * channels], patches row by row.

    einops raises an error if the patch size does not divide both sides.
    """
    return rearrange(images, "n (i p) (j q) c -> (n i j) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Array, height: int, width: int, patch_size: int) -> Array:
    """Invert `patchify` for N images of one size, given in values; return [N, height, width, channels]."""
    i, j, p = height // patch_size, width // patch_size, patch_size
    return rearrange(patches, "(n i j) (p q c) -> n (i p) (j q) c", i=i, j=j, p=p, q=p)


def to_grid(values: np.ndarray, patch_size: int) -> Tensor:
    """Convert [N, height, width, channels] to fp32 [N, rows, columns, C], one vector a patch."""
    patches = torch.from_numpy(patchify(values.astype(np.float32, copy=False), patch_size))
    return patches.reshape(len(values), values.shape[1] // patch_size, -1, patches.shape[1])


def from_grid(grid: np.ndarray, patch_size: int) -> np.ndarray:
    """Invert `to_grid`: convert [N, rows, columns, C] to [N, height, width, channels]."""
    return rearrange(grid, "n i j (p q c) -> n (i p) (j q) c", p=patch_size, q=patch_size)


def pixels_to_latents(pixels: np.ndarray, patch_size: int) -> Tensor:
    """Convert uint8 [N, height, width, channels] to fp32 [N, rows, columns, C]."""
    return to_grid(scale_pixels(pixels), patch_size)


def latents_to_pixels(latents: np.ndarray, patch_size: int) -> np.ndarray:
    """Convert fp32 [N, rows, columns, C] to uint8 [N, height, width, channels], clipping values to [-1, 1]."""
    return unscale_pixels(from_grid(latents, patch_size))
