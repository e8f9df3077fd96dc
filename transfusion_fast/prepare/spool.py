"""The encoded documents of one unit on disk, between reading the source and packing; both ends stream.

A unit is three files of numbers, a file of rejections, and a JSON that is written last. The JSON holds a checksum of
each file: after a power failure it may be there and they may not.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from transfusion_fast.data.pack import (
    SEGMENT_COLUMNS,
    Document,
    ImageSegment,
    ModalityInfo,
    Segment,
    TextSegment,
    latents_dtype,
    segment_at,
    segment_row,
)
from transfusion_fast.errors import Rejected
from transfusion_fast.files import read_json, write_atomically
from transfusion_fast.prepare.packing import document_lengths

_KINDS = ("tokens", "latents", "segments", "rejected")
_BLOCK = 1 << 20
_ROWS = np.dtype(np.int64)


@dataclass(frozen=True)
class UnitReport:
    """The outcome of reading a unit."""

    documents: int
    rejected: dict[str, int]
    """Number of rejected documents by reason."""
    examples: dict[str, str]
    """The first rejection for each reason."""
    cut: int = 0
    """Number of documents that were longer than a pack and became several."""


def write_unit(
    folder: Path, number: int, documents: Iterable[list[Document] | Rejected], modalities: tuple[ModalityInfo, ...]
) -> UnitReport:
    """Write the documents of a unit in order, keeping none in memory, and count rejections."""
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    count = ids = values = cut = 0
    checksums = dict.fromkeys(_KINDS, 0)
    with ExitStack() as stack:
        files = {kind: stack.enter_context(_path(folder, number, kind).open("wb")) for kind in _KINDS}

        def append(kind: str, data: bytes) -> None:
            files[kind].write(data)
            checksums[kind] = zlib.crc32(data, checksums[kind])

        for outcome in documents:
            if isinstance(outcome, Rejected):
                rejected[outcome.reason] += 1
                examples.setdefault(outcome.reason, str(outcome))
                line = json.dumps({"reason": outcome.reason, "detail": outcome.detail})
                append("rejected", f"{line}\n".encode())
                continue
            cut += len(outcome) > 1
            for document in outcome:
                for segment in document:
                    row = segment_row(segment, count, ids, values, modalities)
                    append("segments", np.array(row, _ROWS).tobytes())
                    if isinstance(segment, TextSegment):
                        append("tokens", segment.ids.tobytes())
                        ids += segment.ids.size
                    else:
                        append("latents", segment.values.tobytes())
                        values += segment.values.size
                count += 1
    report = UnitReport(count, dict(rejected), examples, cut)
    write_atomically(_path(folder, number, "json"), json.dumps([*astuple(report), checksums]))
    return report


def read_report(folder: Path, number: int) -> UnitReport | None:
    """Return the report of a unit; None if it is not finished, or its files are not as they were written."""
    match read_json(_path(folder, number, "json")):
        case [int(documents), dict(rejected), dict(examples), int(cut), dict(checksums)]:
            if all(_crc32(_path(folder, number, kind)) == checksums.get(kind) for kind in _KINDS):
                return UnitReport(documents, rejected, examples, cut)
    return None


def _crc32(path: Path) -> int | None:
    """Return the checksum of a file; None if there is none."""
    crc32 = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                crc32 = zlib.crc32(block, crc32)
    except FileNotFoundError:
        return None
    return crc32


def copy_rejections(folder: Path, units: int, path: Path) -> None:
    """Write the rejections of all units to `path`, as JSON lines; no file if there are none."""
    path.unlink(missing_ok=True)
    parts = [part for part in (_path(folder, number, "rejected") for number in range(units)) if part.stat().st_size]
    if parts:
        with path.open("wb") as whole:
            for part in parts:
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, whole)


def read_lengths(folder: Path, number: int) -> np.ndarray:
    """Return the positions, int64, that each document of a unit takes."""
    return document_lengths(_rows(folder, number))


class UnitReader:
    """The documents of a unit by number; copies, as a view would keep the unit's files open."""

    def __init__(self, folder: Path, number: int, modalities: tuple[ModalityInfo, ...]) -> None:
        self._modalities = modalities
        self._tokens = _mapped(_path(folder, number, "tokens"), np.dtype(np.int32))
        self._latents = _mapped(_path(folder, number, "latents"), latents_dtype(modalities))
        self._rows = _rows(folder, number)

    def __getitem__(self, document: int) -> Document:
        first, end = np.searchsorted(self._rows[:, 0], (document, document + 1))
        rows = self._rows[first:end].tolist()
        return tuple(_copied(segment_at(row, self._tokens, self._latents, self._modalities)) for row in rows)


def _copied(segment: Segment) -> Segment:
    if isinstance(segment, TextSegment):
        return TextSegment(np.array(segment.ids))
    return ImageSegment(np.array(segment.values), segment.modality)


def _path(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:06d}.{kind}"


def _rows(folder: Path, number: int) -> np.ndarray:
    return _mapped(_path(folder, number, "segments"), _ROWS).reshape(-1, len(SEGMENT_COLUMNS))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Return the numbers of a file, mapped into memory; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
