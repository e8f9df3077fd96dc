"""The choice among a source's documents by their content. It depends on neither processes nor other documents."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from transfusion_fast.data.pack import ImageSegment, Segment, TextSegment
from transfusion_fast.errors import InputError, Rejected, Remark, Repaired
from transfusion_fast.prepare.sources.base import Part, SourceDocument, TextRange
from transfusion_fast.prepare.spool import Mark

KEY_BYTES = 16
_TEXT = b"text:"
SIDES = ("train", "heldout")
"""Folders of a data folder with a held-out part."""


@dataclass(frozen=True)
class Selection:
    """The settings by which documents are chosen. Picklable."""

    heldout: float = 0.0
    """Share of the documents that are held out. A hash of a document's images, or of its texts if it has none, decides,
    so that all captions of an image are on one side."""

    limit: int | None = None
    """Number of source documents, the first ones in their order, before long ones are split."""
    limit_tokens: int | None = None
    """Number of tokens that the first source documents take together at most."""

    dedup: Literal["documents", "images"] | None = None
    """Leave out documents whose texts and images, or whose images alone, equal those of an earlier one."""

    def __post_init__(self) -> None:
        for option, most in (("--limit", self.limit), ("--limit-tokens", self.limit_tokens)):
            if most is not None and most < 1:
                raise InputError(f"{option} must be 1 or more, got {most}; give a larger number")
        if not 0 <= self.heldout < 1:
            raise InputError(f"--heldout must be a share between 0 and 1, got {self.heldout}; give one such as 0.01")

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON."""
        return asdict(self)

    @property
    def takes_all(self) -> bool:
        """True if every document is used, in one folder; then documents need no marks."""
        return self == ALL

    @property
    def has_limit(self) -> bool:
        """True if not all of the source may be read."""
        return self.limit is not None or self.limit_tokens is not None

    def is_enough(self, documents: int, tokens: int) -> bool:
        """Return whether a limit is reached after so many source documents of so many tokens."""
        reached = self.limit is not None and documents >= self.limit
        return reached or (self.limit_tokens is not None and tokens >= self.limit_tokens)

    @property
    def sides(self) -> tuple[str, ...]:
        """The folders below the data folder, or "" for the data folder itself."""
        return SIDES if self.heldout else ("",)

    def marked(
        self, documents: Iterable[SourceDocument | Remark], marks: deque[Mark | None]
    ) -> Iterator[SourceDocument | Remark]:
        """Yield the same documents; append the mark of each, and None for each one that is rejected."""
        for document in documents:
            if not isinstance(document, Repaired):
                marks.append(self._mark(document))
            yield document

    def trained_on(self, documents: Iterable[SourceDocument | Remark]) -> Iterator[SourceDocument]:
        """Yield those of the first `limit` documents that are not held out."""
        found = (document for document in documents if isinstance(document, SourceDocument))
        for document in islice(found, self.limit):
            mark = self._mark(document) if self.heldout else None
            if not (mark and mark.heldout):
                yield document

    def _mark(self, document: SourceDocument | Remark) -> Mark | None:
        if isinstance(document, Remark):
            return None
        images = [part for part in document.parts if not isinstance(part, str | TextRange | TextSegment | Rejected)]
        try:
            side = content_key(images or document.parts)
            key = content_key(document.parts) if self.dedup == "documents" else side if images else b""
        except Rejected:  # raised again, and counted, when the text is encoded
            return None
        heldout = int.from_bytes(side[:8], "little") < self.heldout * 2**64
        return Mark(heldout, key, document.where, self.dedup == "images") if self.dedup and key else Mark(heldout)


ALL = Selection()


def content_key(parts: Iterable[Part]) -> bytes:
    """Return a hash of a document's texts and images, which weights, places and other fields do not change.

    A text has the same hash in memory and in a file; that raises Rejected where it is not UTF-8.
    """
    keys = [_part_key(part) for part in parts if not isinstance(part, Rejected)]  # a missing image
    return keys[0] if len(keys) == 1 else _hash(b"".join(keys))


def _part_key(part: str | TextRange | bytes | np.ndarray | Segment) -> bytes:
    match part:
        case str():
            return _hash(_TEXT + part.encode("utf-8", "surrogatepass"))
        case TextRange():
            key = hashlib.blake2b(_TEXT, digest_size=KEY_BYTES)
            for piece in part.pieces():
                key.update(piece.encode())
            return key.digest()
        case bytes():
            return _hash(b"file:" + part)
        case TextSegment():
            return _array_key(part.ids)
        case ImageSegment():
            return _array_key(part.values)
        case np.ndarray():
            return _array_key(part)


def _array_key(array: np.ndarray) -> bytes:
    return _hash(f"{array.dtype}{array.shape}:".encode() + array.tobytes())


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
