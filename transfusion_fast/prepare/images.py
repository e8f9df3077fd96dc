"""Pixels to latents, several images at a time: the same ones in any process and in any preparation.

The noise of a sample is a function of the image's pixels alone: neither where the image lies nor what was encoded
before it has a part in it.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from transfusion_fast.data.autoencoder import Autoencoder
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.pool import worker_number

BATCH = 16


@dataclass(frozen=True)
class LatentRule:
    """How the pixels of images become latents. Picklable."""

    autoencoder: Autoencoder
    sampled: bool = True
    """Samples of the posterior, else its mean."""
    batch: int = BATCH
    """Images of one shape that are encoded together: their number shows in the last digit, so it is a setting."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"images encoded together must be 1 or more, got {self.batch}; give a larger number")

    def modality(self, name: str, patch_size: int) -> ModalityInfo:
        """What holds the latents."""
        return ModalityInfo(name, self.autoencoder.channels, patch_size, "latents", self.autoencoder.fingerprint)

    def describe(self) -> dict[str, Any]:
        """As JSON: rules of one description make the same latents. A GPU's are rounded otherwise than a CPU's."""
        return {
            "autoencoder": self.autoencoder.fingerprint,
            "sampled": self.sampled,
            "batch": self.batch,
            "device": self.autoencoder.device,
        }

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray | Rejected]:
        """Of uint8 [height, width, 3] each the float16 [h, w, channels], or why it has none; in their order."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(images):
            alike.setdefault(image.shape, []).append(number)
        found: dict[int, np.ndarray | Rejected] = {}
        for numbers in alike.values():
            for first in range(0, len(numbers), self.batch):
                chosen = numbers[first : first + self.batch]
                latents = self._encoded(np.stack([images[number] for number in chosen]))
                found.update(zip(chosen, map(_finite, latents), strict=True))
        return [found[number] for number in range(len(images))]

    def _encoded(self, pixels: np.ndarray) -> np.ndarray:
        noise = np.stack([self._noise(image) for image in pixels]) if self.sampled else None
        try:
            with self._gpu():
                return self.autoencoder.encode(pixels, noise)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"memory of the GPU must hold an autoencoder a process and {self.batch} images each, and has no room "
                "left; run it again with fewer processes, or remove what was begun and give a smaller batch"
            ) from error

    def _gpu(self) -> AbstractContextManager[object]:
        """Where there are several, those that the processes take in turn."""
        if self.autoencoder.device == "cpu":
            return nullcontext()
        return torch.cuda.device(worker_number() % torch.cuda.device_count())

    def _noise(self, image: np.ndarray) -> np.ndarray:
        """Standard normal fp32 [h, w, channels]."""
        digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
        generator = np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(int.from_bytes(digest, "little"))))
        height, width = (side // self.autoencoder.stride for side in image.shape[:2])
        return generator.standard_normal((height, width, self.autoencoder.channels), dtype=np.float32)


def _finite(latents: np.ndarray) -> np.ndarray | Rejected:
    if np.isfinite(latents).all():
        return latents
    return Rejected("latents not finite", "the autoencoder gives values that float16 cannot hold")


FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What decoders raise on damaged data: about anything.
_DAMAGE = (
    OSError, ValueError, TypeError, SyntaxError, ArithmeticError, LookupError, EOFError, MemoryError, AttributeError,
    struct.error,
)  # fmt: skip
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [height, width, 3], upright as its EXIF says, transparent parts over white, 16 bits cut to 8.

    Raises:
        Rejected: not an image of `FORMATS`, more than `max_pixels` pixels by its header, or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are checked below, and of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Rejected("image too large", f"{width} x {height} pixels are more than {max_pixels}")
                image.load()
                return _rgb(_upright(image))
    except Image.DecompressionBombError as error:
        raise Rejected("image too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected("not an image", f"must be {', '.join(FORMATS)}") from error
    except _DAMAGE as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected("image damaged", str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF says it was held. Only that tag is read: any other may be malformed without harm to the picture."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT:
        # Pillow would clip what is above 255 instead.
        grey = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
