"""Pixels to what the model sees, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.patches import patchify, unpatchify


def scale_pixels(pixels: np.ndarray) -> np.ndarray:
    """uint8 to fp32 in [-1, 1], any shape."""
    return pixels.astype(np.float32) / 127.5 - 1


def pixels_to_latents(pixels: np.ndarray, patch_size: int) -> Tensor:
    """uint8 [N, height, width, channels] -> fp32 [N, rows, columns, C]."""
    rows, columns = pixels.shape[1] // patch_size, pixels.shape[2] // patch_size
    patches = patchify(scale_pixels(pixels), patch_size)
    return torch.from_numpy(patches.reshape(len(pixels), rows, columns, -1))


def latents_to_pixels(latents: np.ndarray, patch_size: int) -> np.ndarray:
    """fp32 [N, rows, columns, C] -> uint8 [N, height, width, channels]; values beyond [-1, 1] are clipped."""
    rows, columns, width = latents.shape[1:]
    images = unpatchify(latents.reshape(-1, width), rows * patch_size, columns * patch_size, patch_size)
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
