"""Image files that a user gives to a model, read as its input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import reduce
from PIL import Image
from torch import Tensor

from transfusion_fast.data.autoencoder import Autoencoder
from transfusion_fast.data.images import pixels_to_latents, to_grid
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.decoding import decode_image
from transfusion_fast.prepare.images import scaled_middle
from transfusion_fast.prepare.sources.base import MAX_BYTES


def read_image(path: Path, modality: ModalityInfo, size: tuple[int, int], autoencoder: Autoencoder | None) -> Tensor:
    """Return an image file as the model's input, fp32 [rows, columns, C]: scaled to fill the size, and cut.

    Args:
        size: height and width in values of the modality.
        autoencoder: that of the modality's latents, None for pixels.

    Raises:
        InputError: the file is too large or no image, or the modality's pixels are neither grey nor colour.
        OSError: the file cannot be read.
    """
    if autoencoder is not None:
        height, width = size[0] * autoencoder.stride, size[1] * autoencoder.stride
        return to_grid(autoencoder.encode(_read_pixels(path, (height, width), 3)), modality.patch_size)[0]
    if modality.channels not in (1, 3):
        raise InputError(f"pixels must be grey or colour to read an image, got {modality.channels} channels")
    return pixels_to_latents(_read_pixels(path, size, modality.channels), modality.patch_size)[0]


def read_mask(path: Path, modality: ModalityInfo, size: tuple[int, int], autoencoder: Autoencoder | None) -> Tensor:
    """Return an image file as a mask, bool [rows, columns, C]: true where it is darker than grey.

    Arguments and errors are those of `read_image`.
    """
    stride = 1 if autoencoder is None else autoencoder.stride
    dark = _read_pixels(path, (size[0] * stride, size[1] * stride), channels=1) < 128
    dark = reduce(dark, "n (h p) (w q) 1 -> n h w 1", "min", p=stride, q=stride)  # latents of no white pixel
    return to_grid(np.repeat(dark, modality.channels, axis=3), modality.patch_size)[0] > 0


def _read_pixels(path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """Read an image as `prepare.py` does: uint8 [1, height, width, channels], grey or colour."""
    height, width = size
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} must have at most {MAX_BYTES} bytes, got more; give a smaller image")
    try:
        image = decode_image(content)
    except Rejected as error:
        raise InputError(f"{path} must be a readable image ({error}); give another") from error
    scale = max(height / image.size[0], width / image.size[1])
    middle = scaled_middle(image, height, width, scale)
    shown = Image.fromarray(middle).convert("L" if channels == 1 else "RGB")
    return np.asarray(shown, dtype=np.uint8).reshape(1, height, width, channels)
