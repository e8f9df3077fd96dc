"""Conversion of image files to upright RGB pixels of the stored size, and of pixels to latents."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from transfusion_fast.data.latent_encoder import LatentEncoder
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.pool import worker_number

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
BATCH = 16
"""Images that are encoded together by default."""

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each orientation (CIPA DC-008, Exif 2.32, 4.6.4)."""
_OVERFLOW = "the encoder gives values that float16 cannot hold"
# Decoders raise about anything on damaged data.
_DAMAGE = (
    OSError, ValueError, TypeError, SyntaxError, ArithmeticError, LookupError, EOFError, MemoryError, AttributeError,
    struct.error,
)  # fmt: skip


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return uint8 [height, width, 3], upright by its EXIF, transparent parts over white, 16 bits cut to 8.

    Raises:
        Rejected: not an image of `FORMATS`, more than `max_pixels` pixels by its header, or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images, which are checked below, and odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Rejected("image too large", f"{width} x {height} pixels are more than {max_pixels}")
                image.load()
                return _rgb(_upright(image))
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("image too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected("not an image", f"must be {', '.join(FORMATS)}") from error
    except _DAMAGE as error:
        raise Rejected("image damaged", str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """Undo the orientation that the EXIF names. No other tag is read: it may be malformed without harm."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return image
    transposition = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT:
        # Pillow would clip what is above 255 instead.
        grey = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class ImageRule:
    """The size of pixels [height, width, 3] as they are stored; their sides are multiples of `multiple`.

    `crop`: the shorter side is scaled to `size`, and the middle `size` x `size` kept. `native`: about the image's own
    shape, scaled down to at most `size`^2 pixels if it has more; sides are cut evenly to a multiple.
    """

    shape: Literal["crop", "native"]
    size: int
    multiple: int

    def __post_init__(self) -> None:
        if not 1 <= self.multiple <= self.size or self.size % self.multiple:
            raise InputError(
                f"image size must be a positive multiple of {self.multiple}, got {self.size}; give such a size"
            )

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return uint8 [height, width, 3]; Rejected if a native image is too thin for one patch."""
        height, width = pixels.shape[:2]
        if self.shape == "crop":
            return scaled_middle(pixels, self.size, self.size, self.size / min(height, width))
        scale = min(1.0, self.size / (height * width) ** 0.5)
        rows, columns = (int(side * scale + 1e-9) // self.multiple * self.multiple for side in (height, width))
        if not rows or not columns:
            raise Rejected("image too thin", f"{width} x {height} pixels leave a side below {self.multiple}")
        return scaled_middle(pixels, rows, columns, scale)


def scaled_middle(pixels: np.ndarray, height: int, width: int, scale: float) -> np.ndarray:
    """Return the middle height x width, uint8 [height, width, 3], of an image that is scaled.

    The middle is cut out before it is scaled: a thin image, scaled as a whole, could become arbitrarily large.
    """
    sides = pixels.shape[:2]
    kept = [min(float(length), side / scale) for length, side in zip(sides, (height, width), strict=True)]
    top, left = ((length - side) // 2 for length, side in zip(sides, kept, strict=True))
    if kept == [height, width]:
        return pixels[int(top) : int(top) + height, int(left) : int(left) + width]
    box = (left, top, left + kept[1], top + kept[0])
    resample = Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize((width, height), resample, box, reducing_gap=3.0))


@dataclass(frozen=True)
class LatentRule:
    """The encoding of pixels to latents, several images at a time. Picklable.

    The noise of a sampled latent is a function of the image's pixels alone: neither its place nor the images before it
    change it.
    """

    encoder: LatentEncoder
    sampled: bool = True
    """True: samples of an autoencoder's posterior; False: its mean, or features."""
    batch: int = BATCH
    """Images of one shape that are encoded together. It is a setting because it changes the last digit."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"images encoded together must be 1 or more, got {self.batch}; give a larger number")

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON; equal settings give equal latents. A GPU rounds differently from a CPU."""
        own = {"sampled": self.sampled, "batch": self.batch}
        return {"autoencoder": self.encoder.fingerprint, **own, "device": self.encoder.device}

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray | Rejected]:
        """Return float16 [h, w, channels] for each image uint8 [height, width, 3], or why it has none."""
        found: dict[int, np.ndarray | Rejected] = {}
        for shape in {image.shape for image in images}:
            numbers = [number for number, image in enumerate(images) if image.shape == shape]
            for first in range(0, len(numbers), self.batch):
                chosen = numbers[first : first + self.batch]
                for number, latents in zip(chosen, self._encoded([images[n] for n in chosen]), strict=True):
                    finite = np.isfinite(latents).all()
                    found[number] = latents if finite else Rejected("latents not finite", _OVERFLOW)
        return [found[number] for number in range(len(images))]

    def _encoded(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Encode images of one shape, on a GPU if there is any: the processes take them in turn."""
        noise = np.stack([self._noise(image) for image in images]) if self.sampled else None
        on_cpu = self.encoder.device == "cpu"
        try:
            with nullcontext() if on_cpu else torch.cuda.device(worker_number() % torch.cuda.device_count()):
                return self.encoder.encode(np.stack(images), noise)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"memory of the GPU must hold an encoder a process and {self.batch} images each, got too little; "
                "run it again with fewer processes, or remove what was begun and give a smaller batch"
            ) from error

    def _noise(self, image: np.ndarray) -> np.ndarray:
        """Return standard normal fp32 [h, w, channels]."""
        digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
        generator = np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(int.from_bytes(digest, "little"))))
        height, width = (side // self.encoder.stride for side in image.shape[:2])
        return generator.standard_normal((height, width, self.encoder.channels), dtype=np.float32)
