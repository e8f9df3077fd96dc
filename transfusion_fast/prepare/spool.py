"""The encoded documents of one unit on disk, between reading the source and packing; both ends stream.

A unit is four files of numbers, two of remarks, and a JSON that is written last. The JSON holds a checksum of
each file: after a power failure it may be there and they may not.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from transfusion_fast.data.pack import (
    SEGMENT_COLUMNS,
    Document,
    ModalityInfo,
    Segment,
    TextSegment,
    latents_dtype,
    segment_at,
    segment_row,
)
from transfusion_fast.errors import Remark, Repaired
from transfusion_fast.files import read_json, write_atomically
from transfusion_fast.prepare.packing import document_lengths

_KINDS = ("tokens", "latents", "segments", "weights", "rejected", "repaired")


def remark_line(remark: Remark) -> bytes:
    """Return a remark as a line of JSON."""
    return f"{json.dumps({'reason': remark.reason, 'detail': remark.detail})}\n".encode()


@dataclass(frozen=True)
class Counts:
    """Numbers of documents of a unit."""

    documents: int
    cut: int
    """Number of source documents that were longer than a pack and became several."""
    tokens: int
    """Positions that the documents take."""


@dataclass(frozen=True)
class Spool:
    """The documents of a unit by number, and why others were left out."""

    folder: Path
    number: int
    modalities: tuple[ModalityInfo, ...]

    def path(self, kind: str) -> Path:
        """Return the path of one of the unit's files."""
        return self.folder / f"{self.number:06d}.{kind}"

    def write(self, outcomes: Iterable[list[Document] | Remark]) -> Counts:
        """Write documents and remarks in order, keeping none in memory."""
        documents = cut = ids = values = 0
        checksums = dict.fromkeys(_KINDS, 0)
        with ExitStack() as stack:
            files = {kind: stack.enter_context(self.path(kind).open("wb")) for kind in _KINDS}

            def append(kind: str, data: bytes) -> None:
                files[kind].write(data)
                checksums[kind] = zlib.crc32(data, checksums[kind])

            for outcome in outcomes:
                if isinstance(outcome, Remark):
                    append("repaired" if isinstance(outcome, Repaired) else "rejected", remark_line(outcome))
                    continue
                cut += len(outcome) > 1
                for document in outcome:
                    for segment in document:
                        row = segment_row(segment, documents, ids, values, self.modalities)
                        append("segments", np.array(row, np.int64).tobytes())
                        append("weights", np.float32(segment.weight).tobytes())
                        if isinstance(segment, TextSegment):
                            append("tokens", segment.ids.tobytes())
                            ids += segment.ids.size
                        else:
                            append("latents", segment.values.tobytes())
                            values += segment.values.size
                    documents += 1
        write_atomically(self.path("json"), json.dumps([documents, cut, checksums]))
        return Counts(documents, cut, int(self.lengths.sum()))

    def read_counts(self) -> Counts | None:
        """Return what `write` returned; None if it did not end, or the files are not as they were written."""
        match read_json(self.path("json")):
            case [int(documents), int(cut), dict(checksums)]:
                with suppress(FileNotFoundError):
                    if all(zlib.crc32(self._mapped(kind, np.uint8).data) == checksums.get(kind) for kind in _KINDS):
                        return Counts(documents, cut, int(self.lengths.sum()))
        return None

    @property
    def lengths(self) -> np.ndarray:
        """Positions that each document takes, int64."""
        return document_lengths(self._rows)

    def __getitem__(self, document: int) -> Document:
        """Return copies: views would keep the unit's files open."""
        first, end = np.searchsorted(self._rows[:, 0], (document, document + 1))
        segments: list[Segment] = []
        weights = self._mapped("weights", np.float32)
        for row, weight in zip(self._rows[first:end].tolist(), weights[first:end].tolist(), strict=True):
            segment = segment_at(row, weight, *self._values, self.modalities)
            if isinstance(segment, TextSegment):
                segments.append(replace(segment, ids=np.array(segment.ids)))
            else:
                segments.append(replace(segment, values=np.array(segment.values)))
        return tuple(segments)

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._mapped("segments", np.int64).reshape(-1, len(SEGMENT_COLUMNS))

    @cached_property
    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        return self._mapped("tokens", np.int32), self._mapped("latents", latents_dtype(self.modalities))

    def _mapped(self, kind: str, dtype: DTypeLike) -> np.ndarray:
        """Return the numbers of a file, mapped into memory; an empty file cannot be mapped."""
        path = self.path(kind)
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
