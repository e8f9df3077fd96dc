"""Raw documents to documents of token ids and patches, none longer than a pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from transfusion_fast.data.pack import Document, ImageSegment, ModalityInfo, Segment
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.fitting import Fitting, Long
from transfusion_fast.prepare.images import LatentRule, decode_image
from transfusion_fast.prepare.sources.base import RawDocument

_BATCHES_TOGETHER = 16  # of images whose shapes may differ; the fuller the batches of each
_BYTES_TOGETHER = 64 << 20
_MAX_PIXEL_BYTES = 1 << 30  # of a document: many small files may become as many large images


@dataclass(frozen=True)
class ImageRule:
    """How an image becomes pixels [height, width, 3] whose sides are multiples of `multiple`.

    `crop`: the shorter side is scaled to `size`, and the middle `size` x `size` kept. `native`: about its own shape,
    scaled down to at most `size`^2 pixels where it has more; what is over a multiple is cut off evenly.
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
        """uint8 [height, width, 3]; Rejected where an image is too thin for one patch."""
        height, width = pixels.shape[:2]
        if self.shape == "crop":
            scale, target = self.size / min(height, width), (self.size, self.size)
        else:
            scale = min(1.0, self.size / (height * width) ** 0.5)
            target = (self._multiple(height * scale), self._multiple(width * scale))
            if not all(target):
                raise Rejected("image too thin", f"{width} x {height} pixels leave a side below {self.multiple}")
        return scaled_middle(pixels, *target, scale)

    def _multiple(self, length: float) -> int:
        return int(length + 1e-9) // self.multiple * self.multiple


def scaled_middle(pixels: np.ndarray, height: int, width: int, scale: float) -> np.ndarray:
    """The middle of an image, uint8 [.., .., 3], that takes height x width pixels once it is scaled.

    It is cut out first: a thin image scaled as a whole could be of any size.
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
class _Opened:
    """A raw document whose images are decoded: pixels, uint8 [height, width, 3]."""

    where: str
    parts: tuple[str | np.ndarray, ...]

    @property
    def bytes(self) -> int:
        return sum(len(part) if isinstance(part, str) else part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Encoder:
    """What makes documents of raw ones. Picklable.

    `long` says what becomes of a document that is longer than a pack: "split" into several, its texts where a reader
    would pause, its images whole; or "reject". With `latents` images are stored as those, else as pixels.
    """

    tokenizer: Tokenizer
    sequence_length: int
    modality: ModalityInfo | None = None
    image: ImageRule | None = None
    long: Long = "split"
    latents: LatentRule | None = None

    def __post_init__(self) -> None:
        _ = self._fitting  # checks the length

    @property
    def modalities(self) -> tuple[ModalityInfo, ...]:
        return () if self.modality is None else (self.modality,)

    def describe(self) -> dict[str, Any]:
        """As JSON: encoders of one description make the same documents."""
        return {
            "tokenizer": self.tokenizer.describe(),
            "sequence_length": self.sequence_length,
            "modalities": [asdict(modality) for modality in self.modalities],
            "image": None if self.image is None else asdict(self.image),
            "long": self.long,
            "latents": None if self.latents is None else self.latents.describe(),
        }

    def __call__(self, raw: RawDocument) -> list[Document]:
        """One document, or its parts; Rejected where it cannot be used."""
        [outcome] = self.encode([raw])
        if isinstance(outcome, Rejected):
            raise outcome
        return outcome

    def encode(self, raws: Iterable[RawDocument | Rejected]) -> Iterator[list[Document] | Rejected]:
        """Of each raw document, in order, one document or its parts, or why it cannot be used.

        Images become latents in batches: documents wait for those that follow, a bounded number and size of them.
        """
        together = 1 if self.latents is None else _BATCHES_TOGETHER * self.latents.batch
        waiting: list[_Opened | Rejected] = []
        size = 0
        for raw in raws:
            opened = raw if isinstance(raw, Rejected) else self._opened(raw)
            waiting.append(opened)
            size += 0 if isinstance(opened, Rejected) else opened.bytes
            if len(waiting) >= together or size >= _BYTES_TOGETHER:
                yield from self._encoded(waiting)
                waiting, size = [], 0
        yield from self._encoded(waiting)

    def _opened(self, raw: RawDocument) -> _Opened | Rejected:
        parts: list[str | np.ndarray] = []
        room = _MAX_PIXEL_BYTES
        try:
            for part in raw.parts:
                opened = part if isinstance(part, str) else self._pixels(part)
                parts.append(opened)
                room -= 0 if isinstance(opened, str) else opened.nbytes
                if room < 0:
                    raise Rejected("document too large", f"its images take more than {_MAX_PIXEL_BYTES} bytes")
        except Rejected as rejected:
            return rejected.at(raw.where)
        return _Opened(raw.where, tuple(parts))

    def _pixels(self, data: bytes) -> np.ndarray:
        if self.image is None or self.modality is None:
            raise Rejected("image in text", "these documents are prepared as text alone")
        pixels = np.ascontiguousarray(self.image(decode_image(data)))
        patch = self.modality.patch_size * (1 if self.latents is None else self.latents.autoencoder.stride)
        self._fitting.check_image((pixels.shape[0] // patch) * (pixels.shape[1] // patch))
        return pixels

    def _encoded(self, waiting: Sequence[_Opened | Rejected]) -> Iterator[list[Document] | Rejected]:
        opened = [entry for entry in waiting if isinstance(entry, _Opened)]
        images = [part for entry in opened for part in entry.parts if isinstance(part, np.ndarray)]
        values = iter(images if self.latents is None else self.latents(images))
        for entry in waiting:
            if isinstance(entry, Rejected):
                yield entry
                continue
            parts = [part if isinstance(part, str) else next(values) for part in entry.parts]
            try:
                yield self._fitting.documents(parts, self._segments)
            except Rejected as rejected:
                yield rejected.at(entry.where)

    def _segments(self, piece: str | np.ndarray | Rejected, free: int) -> Sequence[Segment]:
        if isinstance(piece, Rejected):
            raise piece
        if isinstance(piece, np.ndarray):
            return [ImageSegment(piece)]
        return self._fitting.texts(self.tokenizer, piece, free)

    @property
    def _fitting(self) -> Fitting:
        return Fitting(self.sequence_length, self.modalities, self.long)
