"""Conversion of decoded images to pixels of the stored size, and of pixels to latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.decoding import DecodedImage
from transfusion_fast.prepare.pool import worker_number

if TYPE_CHECKING:
    from transfusion_fast.data.latent_encoder import LatentEncoder

BATCH = 16
"""Images that are encoded together by default."""

MAX_ASPECT = 3.0
"""The largest ratio of the sides of a bucket."""
STEPS = 16
"""The shorter sides of buckets are multiples of about a `STEPS`-th of the square's side, so that they are few."""

_OVERFLOW = "the encoder gives values that float16 cannot hold"


@lru_cache
def bucket_shapes(side: int) -> tuple[tuple[int, int], ...]:
    """Return the (rows, columns) in patches that images may have within the budget of a square of `side` patches.

    As for NovelAI's models and Stable Diffusion XL, the shorter side shrinks in equal steps, here until the ratio of
    the sides is `MAX_ASPECT`, and the longer side is as long as the budget allows. So fewer patches of the budget are
    unused than the shorter side has, which is never more than an eighth of the budget.
    """
    shorter = sorted({-(-side * step // STEPS) for step in range(1, STEPS + 1)}, reverse=True)
    upright = [(side * side // short, short) for short in shorter]
    upright = [(rows, columns) for rows, columns in upright if rows <= MAX_ASPECT * columns]
    return (*upright, *((columns, rows) for rows, columns in upright[1:]))


@dataclass(frozen=True)
class ImageRule:
    """The size of pixels [height, width, 3] as they are stored; their sides are multiples of `multiple`.

    `crop`: the shorter side is scaled to `size`, and the middle `size` x `size` kept. `buckets`: the image is scaled to
    cover the shape of `bucket_shapes` whose aspect ratio is nearest to its own, and the middle is kept. `native`: about
    the image's own shape, scaled down to at most `size`^2 pixels if it has more; sides are cut evenly to a multiple.
    """

    shape: Literal["crop", "buckets", "native"]
    size: int
    multiple: int

    def __post_init__(self) -> None:
        if not 1 <= self.multiple <= self.size or self.size % self.multiple:
            raise InputError(
                f"image size must be a positive multiple of {self.multiple}, got {self.size}; give such a size"
            )

    def scale(self, height: int, width: int) -> float:
        """Return the factor by which an image is scaled before it is cut."""
        if self.shape == "native":
            return min(1.0, self.size / (height * width) ** 0.5)
        rows, columns = self.covered(height, width)
        return max(rows / height, columns / width)

    def covered(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in pixels of the square or bucket that an image is scaled to cover."""
        if self.shape == "crop":
            return self.size, self.size

        def kept(bucket: tuple[int, int]) -> float:
            """Return the part of the image that is not cut, which is largest where log(aspect ratio) is nearest."""
            rows, columns = bucket
            return min(rows * width / (columns * height), columns * height / (rows * width))

        rows, columns = max(bucket_shapes(self.size // self.multiple), key=kept)
        return rows * self.multiple, columns * self.multiple

    def __call__(self, image: DecodedImage) -> np.ndarray:
        """Return uint8 [height, width, 3]; Rejected if a native image is too thin for one patch."""
        height, width = image.size
        scale = self.scale(height, width)
        if self.shape != "native":
            return scaled_middle(image, *self.covered(height, width), scale)
        rows, columns = (int(side * scale + 1e-9) // self.multiple * self.multiple for side in (height, width))
        if not rows or not columns:
            raise Rejected(
                "image narrower than a patch", f"{width} x {height} pixels leave a side below {self.multiple}"
            )
        return scaled_middle(image, rows, columns, scale)


def scaled_middle(image: DecodedImage, height: int, width: int, scale: float) -> np.ndarray:
    """Return the middle height x width, uint8 [height, width, 3], of an image that is scaled.

    The middle is cut out before it is scaled: a thin image, scaled as a whole, could become arbitrarily large.
    """
    sides, reduction = image.size, image.reduction
    kept = [min(float(length), side / scale) for length, side in zip(sides, (height, width), strict=True)]
    top, left = ((length - side) // 2 for length, side in zip(sides, kept, strict=True))
    if kept == [height, width]:
        return image.pixels[int(top) : int(top) + height, int(left) : int(left) + width]
    box = (left / reduction, top / reduction, (left + kept[1]) / reduction, (top + kept[0]) / reduction)
    resample = Image.Resampling.LANCZOS
    return np.asarray(image.image.resize((width, height), resample, box, reducing_gap=3.0))


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
        import torch  # takes 200 MB in a process, which one that stores pixels does not need

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
