"""The step from a source's documents to documents of token ids and image values, none longer than a pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
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
from transfusion_fast.prepare.filters import Filters
from transfusion_fast.prepare.fitting import cut_ids, encode_in_pieces, first_limit
from transfusion_fast.prepare.images import ImageRule, LatentRule
from transfusion_fast.prepare.sources.base import Part, SourceDocument, TextRange

Long = Literal["split", "reject"]
"""The treatment of documents that are longer than a pack: split into several, or rejected."""
BadImages = Literal["reject", "skip"]
"""The treatment of images that are missing or cannot be used: their documents are rejected, or used without them."""

_TEXTS_TOGETHER, _TEXT_BYTES_TOGETHER = 1024, 1 << 20  # each call of a tokenizer has a cost of its own
_SHORT = 2  # a text of up to two characters for each position of a pack is short: it hardly ever has to be cut
_BATCHES_TOGETHER = 16  # images have several shapes; the more wait, the fuller the batch of each shape
_BYTES_TOGETHER = 64 << 20
_MAX_PIXEL_BYTES = 1 << 30  # in one document: many small files may become as many large images
_Encoded = Part | Rejected | tuple[str, np.ndarray | Rejected]
"""A part whose image is latents, or a short text with its ids; or why it has none."""


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
    bad_images: BadImages = "reject"
    filters: Filters = field(default_factory=Filters)
    """Rules by which documents are left out."""

    def __post_init__(self) -> None:
        least = DOCUMENT_TOKENS + IMAGE_TOKENS + 1
        if not least <= self.sequence_length <= MAX_LENGTH:
            raise InputError(
                f"sequence length must be in {least}..{MAX_LENGTH}, got {self.sequence_length}; give another number"
            )
        if self.image is not None and self.image.shape == "crop":  # then all images take as many positions
            length = (self.image.size // self.image.multiple) ** 2 + IMAGE_TOKENS
            if length > self._capacity:
                raise InputError(
                    f"images must fit a pack of {self.sequence_length}, got {length} positions for each; give a larger "
                    "--seq-len or --patch-size, or a smaller --image-size"
                )

    @cached_property
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
            "bad_images": self.bad_images,
            **({"filters": filters} if (filters := self.filters.describe()) else {}),
        }

    def encode(self, documents: Iterable[SourceDocument | Remark]) -> Iterator[Iterable[Document] | Remark]:
        """Yield for each source document, in order, its repairs and the documents that it becomes, or its rejection.

        A text that is read in pieces becomes an iterator, which may raise Rejected: then none of its documents counts.
        Texts become ids and images latents in batches: documents wait for later ones, up to a limit of their number
        and size.
        """
        together, most = _TEXTS_TOGETHER, _TEXT_BYTES_TOGETHER
        if self.latents is not None:
            together, most = _BATCHES_TOGETHER * self.latents.batch, _BYTES_TOGETHER
        waiting: list[SourceDocument | Remark] = []
        size = 0
        for document in documents:
            if isinstance(document, SourceDocument):
                waiting += self._decoded(document)
                size += _bytes(waiting[-1])
            else:
                waiting.append(document)
            if len(waiting) >= together or size >= most:
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
        """Return what was repaired, and last the document with its image files as pixels, or its rejection."""
        if rejected := self.filters.rejection(document):
            return [rejected]
        if {bytes, Rejected}.isdisjoint(map(type, document.parts)):
            return [document]
        parts: list[tuple[Part, float]] = []
        found: list[Remark] = []
        left = _MAX_PIXEL_BYTES
        for part, weight in zip(document.parts, document.weights or (1.0,) * len(document.parts), strict=True):
            if isinstance(part, bytes | Rejected):
                try:
                    part, repairs = self._pixels(part)
                except Rejected as rejected:
                    if self.bad_images == "reject":
                        return [rejected.at(document.where)]
                    found.append(Repaired("image left out", str(rejected)).at(document.where))
                    continue
                found += [repaired.at(document.where) for repaired in repairs]
                left -= part.nbytes
            if left < 0:
                large = Rejected("document too large", f"its images take more than {_MAX_PIXEL_BYTES} bytes")
                return [large.at(document.where)]
            parts.append((part, weight))
        weights = tuple(weight for _, weight in parts) if document.weights else ()
        return [*found, replace(document, parts=tuple(part for part, _ in parts), weights=weights)]

    def _pixels(self, file: bytes | Rejected) -> tuple[np.ndarray, tuple[Repaired, ...]]:
        if isinstance(file, Rejected):
            raise file
        if self.image is None:
            raise Rejected("image in text", "these documents are prepared as text alone")
        decoded = decode_image(file, self.image.scale, check=self.filters.check_size)
        pixels = np.ascontiguousarray(self.image(decoded))
        patch = self.modalities[0].patch_size * (1 if self.latents is None else self.latents.encoder.stride)
        self._image_length((pixels.shape[0] // patch) * (pixels.shape[1] // patch))  # before it costs a GPU's time
        return pixels, decoded.repairs

    def _image_length(self, patches: int) -> int:
        """Return the positions that an image takes; Rejected if no pack has so many."""
        length = patches + IMAGE_TOKENS
        if length > self._capacity:
            fit = f"a pack of {self.sequence_length}; give a larger --seq-len"
            raise Rejected("image takes too many positions", f"its {length} positions do not fit {fit}")
        return length

    def _encoded(self, documents: Sequence[SourceDocument | Remark]) -> Iterator[Iterable[Document] | Remark]:
        parts = [part for document in documents if isinstance(document, SourceDocument) for part in document.parts]
        images = [part for part in parts if isinstance(part, np.ndarray)]
        values = iter(images if self.latents is None else self.latents(images))
        longest = _SHORT * self._capacity
        texts = [part for part in parts if isinstance(part, str) and len(part) <= longest]
        short = zip(texts, self.tokenizer.encode_batch(texts), strict=True)
        for document in documents:
            if isinstance(document, Remark):
                yield document
                continue
            encoded: list[_Encoded] = []
            for part in document.parts:
                if isinstance(part, str) and len(part) <= longest:
                    encoded.append(next(short))
                else:
                    encoded.append(next(values) if isinstance(part, np.ndarray) else part)
            match encoded:
                case [(_, np.ndarray() as ids)] if 0 < len(ids) <= self._capacity:
                    yield [(TextSegment(ids, *document.weights),)]
                case _:
                    yield self._outcome(encoded, document)

    def _outcome(self, parts: Sequence[_Encoded], document: SourceDocument) -> Iterable[Document] | Rejected:
        fitted = self._fitted(parts, document)
        if any(isinstance(part, TextRange) for part in parts):
            return fitted
        try:
            return list(fitted)
        except Rejected as rejected:
            return rejected

    def _fitted(self, parts: Sequence[_Encoded], document: SourceDocument) -> Iterator[Document]:
        """Yield one document of the parts, or several; raise Rejected for none, or for several if `long` says so."""
        segments: list[Segment] = []
        free = self._capacity
        try:
            for part, weight in zip(parts, document.weights or (1.0,) * len(parts), strict=True):
                for number, segment in enumerate(self._segments(part, free)):
                    length = segment_length(segment, self.modalities)
                    if isinstance(segment, ImageSegment):
                        length = self._image_length(length)
                    if segments and (number or length > free):
                        if self.long == "reject":
                            raise Rejected("too long", f"it takes more than {self.sequence_length} positions")
                        yield tuple(segments)
                        segments, free = [], self._capacity
                    segments.append(segment if weight == 1 else replace(segment, weight=weight * segment.weight))
                    free -= length
            if not segments:
                raise Rejected("empty document", "nothing is left of it")
            yield tuple(segments)
        except Rejected as rejected:
            raise rejected.at(document.where) from rejected

    def _segments(self, part: _Encoded, free: int) -> Iterable[Segment]:
        match part:
            case Rejected() as rejected:
                raise rejected
            case (str(), Rejected() as rejected):
                raise rejected
            case (str(), np.ndarray() as ids) if len(ids) <= first_limit(free, self._capacity):
                return [TextSegment(ids)] if len(ids) else []
            case str(text) | (str(text), _):
                return encode_in_pieces(self.tokenizer, [text], free, self._capacity)
            case TextRange():
                return encode_in_pieces(self.tokenizer, part.pieces(), free, self._capacity)
            case np.ndarray():
                return [ImageSegment(part)]
            case TextSegment():
                return cut_ids(self.tokenizer, part, free, self._capacity)
            case ImageSegment():
                return [part]
        raise TypeError(f"image files are decoded before, got {type(part).__name__}")


def _bytes(document: SourceDocument | Remark) -> int:
    """Return the size of a document's texts and pixels."""
    size = 0
    for part in document.parts if isinstance(document, SourceDocument) else ():
        size += len(part) if isinstance(part, str) else part.nbytes if isinstance(part, np.ndarray) else 0
    return size
