"""Encoded documents of one unit on disk, between reading the sources and packing; both ends stream.

Files of numbers, and one of what was rejected, beside a JSON that is written last. It has a checksum of each of them: a
machine that goes down may keep it and lose what it speaks of.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from transfusion_fast.data.pack import (
    SEGMENT_COLUMNS,
    Document,
    ImageSegment,
    ModalityInfo,
    Segment,
    TextSegment,
    document_length,
    latents_dtype,
    segment_at,
    segment_row,
)
from transfusion_fast.errors import Rejected
from transfusion_fast.files import read_json, write_atomically

_KINDS = ("tokens", "latents", "segments", "lengths", "rejected")
_BLOCK = 1 << 20
_ROWS, _LENGTHS = np.dtype(np.int64), np.dtype(np.int32)


@dataclass(frozen=True)
class UnitReport:
    """What became of a unit's documents."""

    documents: int
    rejected: dict[str, int]
    """Of each reason, how many."""
    examples: dict[str, str]
    """Of each reason, the first."""
    cut: int = 0
    """How many became several, since no pack has room for them."""


def write_unit(
    folder: Path, number: int, documents: Iterable[list[Document] | Rejected], modalities: tuple[ModalityInfo, ...]
) -> UnitReport:
    """Writes the unit's documents in order, none of which stays in memory, and counts what was rejected."""
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    cut = 0
    with ExitStack() as stack:
        files = {kind: _Checked(stack.enter_context(_file(folder, number, kind).open("wb"))) for kind in _KINDS}
        writer = _Writer(files, modalities)
        for outcome in documents:
            if isinstance(outcome, Rejected):
                rejected[outcome.reason] += 1
                examples.setdefault(outcome.reason, str(outcome))
                writer.reject(outcome)
                continue
            cut += len(outcome) > 1
            for document in outcome:
                writer.write(document)
    report = UnitReport(writer.documents, dict(rejected), examples, cut)
    checksums = {kind: file.crc32 for kind, file in files.items()}
    write_atomically(_file(folder, number, "json"), json.dumps([*astuple(report), checksums]))
    return report


class _Checked:
    """A file that is written, and the checksum of what it has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.crc32 = file, 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)


class _Writer:
    """The files of a unit, and what is in them so far."""

    def __init__(self, files: Mapping[str, _Checked], modalities: tuple[ModalityInfo, ...]) -> None:
        self._tokens, self._latents, self._segments, self._lengths, self._rejected = (files[kind] for kind in _KINDS)
        self._modalities = modalities
        self.documents = self._ids = self._values = 0

    def write(self, document: Document) -> None:
        for segment in document:
            row = segment_row(segment, self.documents, self._ids, self._values, self._modalities)
            if isinstance(segment, TextSegment):
                self._tokens.write(segment.ids.tobytes())
                self._ids += segment.ids.size
            else:
                self._latents.write(segment.values.tobytes())
                self._values += segment.values.size
            self._segments.write(np.array(row, _ROWS).tobytes())
        self._lengths.write(np.array(document_length(document, self._modalities), _LENGTHS).tobytes())
        self.documents += 1

    def reject(self, rejected: Rejected) -> None:
        line = json.dumps({"reason": rejected.reason, "detail": rejected.detail})
        self._rejected.write(f"{line}\n".encode())


def read_report(folder: Path, number: int) -> UnitReport | None:
    """None where the unit is not written, or not as it was."""
    match read_json(_file(folder, number, "json")):
        case [int(documents), dict(rejected), dict(examples), int(cut), dict(checksums)]:
            if all(_crc32(_file(folder, number, kind)) == checksums.get(kind) for kind in _KINDS):
                return UnitReport(documents, rejected, examples, cut)
    return None


def _crc32(path: Path) -> int | None:
    """None where there is no file."""
    crc32 = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                crc32 = zlib.crc32(block, crc32)
    except FileNotFoundError:
        return None
    return crc32


def copy_rejections(folder: Path, units: int, path: Path) -> None:
    """Writes what was rejected of all units to `path`, as JSON a line; no file where it is nothing."""
    path.unlink(missing_ok=True)
    parts = [part for part in (_file(folder, number, "rejected") for number in range(units)) if part.stat().st_size]
    if parts:
        with path.open("wb") as whole:
            for part in parts:
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, whole)


def read_lengths(folder: Path, number: int) -> np.ndarray:
    """Positions that each document of the unit takes, int32."""
    return np.fromfile(_file(folder, number, "lengths"), _LENGTHS)


class UnitReader:
    """The documents of a unit by number; copies, as a view would keep its file open."""

    def __init__(self, folder: Path, number: int, modalities: tuple[ModalityInfo, ...]) -> None:
        self._modalities = modalities
        self._tokens = _mapped(_file(folder, number, "tokens"), np.dtype(np.int32))
        self._latents = _mapped(_file(folder, number, "latents"), latents_dtype(modalities))
        self._rows = _mapped(_file(folder, number, "segments"), _ROWS).reshape(-1, len(SEGMENT_COLUMNS))

    def __getitem__(self, document: int) -> Document:
        first, end = np.searchsorted(self._rows[:, 0], (document, document + 1))
        rows = self._rows[first:end].tolist()
        return tuple(_copied(segment_at(row, self._tokens, self._latents, self._modalities)) for row in rows)


def _copied(segment: Segment) -> Segment:
    if isinstance(segment, TextSegment):
        return TextSegment(np.array(segment.ids))
    return ImageSegment(np.array(segment.values), segment.modality)


def _file(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:06d}.{kind}"


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file of no bytes cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
