"""The documents of a data folder, to be packed anew at another length; nothing is decoded or encoded again.

A document that is longer than the new packs is cut where a reader would pause. For that its text must give the ids that
are stored, as texts do but for odd places where an earlier cut fell inside a word; what does not is counted and named.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.data.fitting import Fitting, Long
from transfusion_fast.data.index import INDEX_NAME, parse_index
from transfusion_fast.data.pack import Document, ImageSegment, ModalityInfo, Segment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.source import Rejected, Unit
from transfusion_fast.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class StoredDocument:
    """A document as a pack holds it, and that place."""

    where: str
    segments: Document


@dataclass(frozen=True)
class PacksSource:
    """The documents of a data folder; a unit is a shard, from its first pack to its last.

    A pack that cannot be read is an InputError: of a prepared folder nothing is to be lost.
    """

    folder: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.folder / shard.file for shard in parse_index(self.folder).shards)

    def units(self) -> list[Unit]:
        counts = parse_index(self.folder).pack_counts
        ends = itertools.accumulate(counts)
        return [Unit(file, end - count, end) for file, count, end in zip(self.files, counts, ends, strict=True)]

    def documents(self, unit: Unit) -> Iterator[StoredDocument]:
        reader = _reader(self.folder)
        for number in range(unit.start, unit.end):
            documents = reader.read(number).documents(reader.index.modalities)
            for place, document in enumerate(documents):
                yield StoredDocument(f"document {place} of pack {number} of {self.folder}", document)

    def describe(self) -> dict[str, Any]:
        sha256 = hashlib.sha256((self.folder / INDEX_NAME).read_bytes()).hexdigest()
        return {"kind": "packs", "folder": str(self.folder), "index": sha256}


@functools.lru_cache(maxsize=1)
def _reader(folder: Path) -> PackReader:
    """One a process: an index of many shards takes seconds to read."""
    return PackReader(folder, parse_index(folder))


@dataclass(frozen=True)
class Repacker:
    """What makes stored documents fit packs of another length. Picklable; an encoder to `build`."""

    tokenizer: Tokenizer
    sequence_length: int
    modalities: tuple[ModalityInfo, ...]
    long: Long = "split"

    @classmethod
    def of(cls, folder: Path, sequence_length: int, long: Long) -> Repacker:
        """With the tokenizer and modalities of a data folder."""
        index = parse_index(folder)
        return cls(load_tokenizer(index.tokenizer, folder), sequence_length, index.modalities, long)

    def __post_init__(self) -> None:
        _ = self._fitting  # checks the length

    @property
    def _fitting(self) -> Fitting:
        return Fitting(self.sequence_length, self.modalities, self.long)

    def describe(self) -> dict[str, Any]:
        """As JSON: repackers of one description make the same documents."""
        return {
            "tokenizer": self.tokenizer.describe(),
            "sequence_length": self.sequence_length,
            "modalities": [asdict(modality) for modality in self.modalities],
            "long": self.long,
        }

    def encode(self, stored: Iterable[StoredDocument | Rejected]) -> Iterator[list[Document] | Rejected]:
        """Of each document itself or its parts, or why it cannot be used."""
        for document in stored:
            if isinstance(document, Rejected):
                yield document
                continue
            try:
                yield self._fitting.documents(document.segments, self._segments)
            except Rejected as rejected:
                yield rejected.at(document.where)

    def _segments(self, segment: Segment, free: int) -> Sequence[Segment]:
        if isinstance(segment, ImageSegment) or len(segment.ids) <= free:
            return [segment]
        text = self.tokenizer.decode(segment.ids)
        ids, starts = self.tokenizer.encode_with_starts(text)
        if not np.array_equal(ids, segment.ids):
            raise Rejected("text cannot be cut", "its words do not give the stored ids again; choose longer packs")
        return self._fitting.cut(text, ids, starts, free)
