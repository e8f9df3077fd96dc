"""The step from a source's documents to documents of token ids and image values, none longer than a pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from transfusion_fast.data.index import Index
from transfusion_fast.data.pack import (
    DOCUMENT_TOKENS,
    IMAGE_TOKENS,
    MAX_LENGTH,
    Document,
    ImageSegment,
    ModalityInfo,
    Segment,
    TextSegment,
    segment_length,
)
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError, Rejected, Remark, Repaired
from transfusion_fast.prepare.decoding import decode_image
from transfusion_fast.prepare.fitting import cut_ids, encode_in_pieces
from transfusion_fast.prepare.images import ImageRule, LatentRule
from transfusion_fast.prepare.sources.base import Part, SourceDocument

Long = Literal["split", "reject"]
"""The treatment of documents that are longer than a pack: split into several, or rejected."""

_BATCHES_TOGETHER = 16  # images have several shapes; the more wait, the fuller the batch of each shape
_BYTES_TOGETHER = 64 << 20
_MAX_PIXEL_BYTES = 1 << 30  # in one document: many small files may become as many large images


@dataclass(frozen=True)
class Encoder:
    """The settings by which source documents become documents that fit packs. Picklable.

    A document that is longer than a pack is split, its texts where a reader would pause and its images never, or it is
    rejected.
    """

    tokenizer: Tokenizer
    sequence_length: int
    modalities: tuple[ModalityInfo, ...] = ()
    """Kinds of images. Image files become images of the first."""
    image: ImageRule | None = None
    """Rule by which image files become pixels; without it, they are rejected."""
    long: Long = "split"
    latents: LatentRule | None = None
    """Rule by which pixels become latents; without it, pixels are stored."""

    def __post_init__(self) -> None:
        least = DOCUMENT_TOKENS + IMAGE_TOKENS + 1
        if not least <= self.sequence_length <= MAX_LENGTH:
            raise InputError(
                f"sequence length must be in {least}..{MAX_LENGTH}, got {self.sequence_length}; give another number"
            )

    @property
    def _capacity(self) -> int:
        """Positions of a pack for the segments of a document."""
        return self.sequence_length - DOCUMENT_TOKENS

    def empty_index(self) -> Index:
        """Return the index of a data folder of these settings, without shards."""
        return Index(self.sequence_length, self.tokenizer.describe(), self.modalities, 0, 0, ())

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON; encoders of equal settings make equal documents."""
        return {
            "tokenizer": self.tokenizer.describe(),
            "sequence_length": self.sequence_length,
            "modalities": [modality.describe() for modality in self.modalities],
            "image": None if self.image is None else asdict(self.image),
            "long": self.long,
            "latents": None if self.latents is None else self.latents.describe(),
        }

    def encode(self, documents: Iterable[SourceDocument | Remark]) -> Iterator[list[Document] | Remark]:
        """Yield for each source document, in order, its repairs and the documents that it becomes, or its rejection.

        Images become latents in batches: documents wait for later ones, up to a limit of their number and size.
        """
        together = 1 if self.latents is None else _BATCHES_TOGETHER * self.latents.batch
        waiting: list[SourceDocument | Remark] = []
        size = 0
        for document in documents:
            waiting += self._decoded(document) if isinstance(document, SourceDocument) else [document]
            size += _bytes(waiting[-1])
            if len(waiting) >= together or size >= _BYTES_TOGETHER:
                yield from self._encoded(waiting)
                waiting, size = [], 0
        yield from self._encoded(waiting)

    def pixels(self, documents: Iterable[SourceDocument | Remark]) -> Iterator[np.ndarray]:
        """Yield the pixels, uint8 [height, width, 3], of the images that `encode` would encode."""
        for document in documents:
            decoded = self._decoded(document)[-1] if isinstance(document, SourceDocument) else document
            if isinstance(decoded, SourceDocument):
                yield from (part for part in decoded.parts if isinstance(part, np.ndarray))

    def _decoded(self, document: SourceDocument) -> list[SourceDocument | Remark]:
        """Return what was repaired, and last the document with its image files as pixels."""
        parts: list[Part] = []
        found: list[SourceDocument | Remark] = []
        left = _MAX_PIXEL_BYTES
        try:
            for part in document.parts:
                if isinstance(part, bytes):
                    part, repairs = self._pixels(part)
                    found += [repaired.at(document.where) for repaired in repairs]
                    left -= part.nbytes
                if left < 0:
                    raise Rejected("document too large", f"its images take more than {_MAX_PIXEL_BYTES} bytes")
                parts.append(part)
        except Rejected as rejected:
            return [rejected.at(document.where)]
        return [*found, replace(document, parts=tuple(parts))]

    def _pixels(self, file: bytes) -> tuple[np.ndarray, tuple[Repaired, ...]]:
        if self.image is None:
            raise Rejected("image in text", "these documents are prepared as text alone")
        decoded = decode_image(file, self.image.scale)
        pixels = np.ascontiguousarray(self.image(decoded))
        patch = self.modalities[0].patch_size * (1 if self.latents is None else self.latents.encoder.stride)
        self._image_length((pixels.shape[0] // patch) * (pixels.shape[1] // patch))  # before it costs a GPU's time
        return pixels, decoded.repairs

    def _image_length(self, patches: int) -> int:
        """Return the positions that an image takes; Rejected if no pack has so many."""
        length = patches + IMAGE_TOKENS
        if length > self._capacity:
            raise Rejected("image too long", f"its {length} positions do not fit a pack")
        return length

    def _encoded(self, documents: Sequence[SourceDocument | Remark]) -> Iterator[list[Document] | Remark]:
        parts = (part for document in documents if isinstance(document, SourceDocument) for part in document.parts)
        images = [part for part in parts if isinstance(part, np.ndarray)]
        values = iter(images if self.latents is None else self.latents(images))
        for document in documents:
            if isinstance(document, Remark):
                yield document
                continue
            encoded = [next(values) if isinstance(part, np.ndarray) else part for part in document.parts]
            found: list[Document] | Rejected
            try:
                found = self._fitted(encoded, document.weights or (1.0,) * len(encoded))
            except Rejected as rejected:
                found = rejected.at(document.where)
            yield found

    def _fitted(self, parts: Iterable[Part | Rejected], weights: Iterable[float]) -> list[Document]:
        """Return one document of the parts, or several; Rejected for none, or for several if `long` says so."""
        documents: list[list[Segment]] = [[]]
        free = self._capacity
        for part, weight in zip(parts, weights, strict=True):
            for number, segment in enumerate(self._segments(part, free)):
                length = segment_length(segment, self.modalities)
                if isinstance(segment, ImageSegment):
                    length = self._image_length(length)
                if number or length > free:
                    documents.append([])
                    free = self._capacity
                documents[-1].append(segment if weight == 1 else replace(segment, weight=weight * segment.weight))
                free -= length
        found = [tuple(segments) for segments in documents if segments]
        if not found:
            raise Rejected("empty document", "nothing is left of it")
        if len(found) > 1 and self.long == "reject":
            raise Rejected("too long", f"it takes more than {self.sequence_length} positions")
        return found

    def _segments(self, part: Part | Rejected, free: int) -> Sequence[Segment]:
        match part:
            case Rejected():
                raise part
            case str(text):
                return encode_in_pieces(self.tokenizer, text, free, self._capacity)
            case np.ndarray():
                return [ImageSegment(part)]
            case TextSegment():
                return cut_ids(self.tokenizer, part, free, self._capacity)
            case ImageSegment():
                return [part]
        raise TypeError(f"image files are decoded before, got {type(part).__name__}")


def _bytes(document: SourceDocument | Remark) -> int:
    """Return the size of a document's texts and pixels."""
    parts = document.parts if isinstance(document, SourceDocument) else ()
    return sum(getattr(part, "nbytes", 0) or len(part) for part in parts if isinstance(part, str | np.ndarray))
