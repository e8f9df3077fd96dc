"""Pixels to latents, several images at a time: the same ones in any process and in any preparation.

The noise of a sample is a function of the image's pixels alone: neither where the image lies nor what was encoded
before it has a part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transfusion_fast.autoencoder import Autoencoder
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.pool import worker_number
from transfusion_fast.data.source import Rejected
from transfusion_fast.errors import InputError

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
