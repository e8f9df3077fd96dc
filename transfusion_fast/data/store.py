"""Encoded documents of one unit on disk, between reading the sources and packing; both ends stream.

Files of numbers, and one of what was rejected, beside a JSON that is written last and so says that they are whole.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfusion_fast.data.pack import (
    KIND_TEXT,
    Document,
    ImageSegment,
    ModalityInfo,
    Segment,
    TextSegment,
    document_length,
    latents_dtype,
    segment_length,
)
from transfusion_fast.data.source import Rejected

_COLUMNS = 6  # document, kind, offset, length, height, width, as in a pack, but int64


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
    """Writes the unit's documents in order, and counts what was rejected."""
    rows, lengths = array("q"), array("q")  # a list of tuples takes ten times the memory
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    tokens_end = values_end = cut = 0
    with (
        _file(folder, number, "tokens").open("wb") as tokens,
        _file(folder, number, "latents").open("wb") as latents,
        _file(folder, number, "rejected").open("w", encoding="utf-8") as rejections,
    ):
        for outcome in documents:
            if isinstance(outcome, Rejected):
                rejected[outcome.reason] += 1
                examples.setdefault(outcome.reason, str(outcome))
                rejections.write(json.dumps({"reason": outcome.reason, "detail": outcome.detail}) + "\n")
                continue
            cut += len(outcome) > 1
            for document in outcome:
                for segment in document:
                    length = segment_length(segment, modalities)
                    if isinstance(segment, TextSegment):
                        rows.extend((len(lengths), KIND_TEXT, tokens_end, length, 0, 0))
                        tokens.write(segment.ids.tobytes())
                        tokens_end += length
                    else:
                        rows.extend((len(lengths), 1 + segment.modality, values_end, length, *segment.values.shape[:2]))
                        latents.write(segment.values.tobytes())
                        values_end += segment.values.size
                lengths.append(document_length(document, modalities))
    np.save(_file(folder, number, "segments.npy"), np.array(rows, dtype=np.int64).reshape(-1, _COLUMNS))
    np.save(_file(folder, number, "lengths.npy"), np.array(lengths, dtype=np.int32))
    report = UnitReport(len(lengths), dict(rejected), examples, cut)
    whole = _file(folder, number, "json")
    partial = whole.with_suffix(".partial")
    partial.write_text(json.dumps([report.documents, report.rejected, report.examples, report.cut]), encoding="utf-8")
    partial.replace(whole)
    return report


def read_report(folder: Path, number: int) -> UnitReport | None:
    """None where the unit is not written."""
    try:
        return UnitReport(*json.loads(_file(folder, number, "json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def copy_rejections(folder: Path, units: int, path: Path) -> None:
    """Writes what was rejected of all units to `path`, as JSON a line; no file where it is nothing."""
    parts = [part for part in (_file(folder, number, "rejected") for number in range(units)) if part.stat().st_size]
    if parts:
        with path.open("wb") as whole:
            for part in parts:
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, whole)


def read_lengths(folder: Path, number: int) -> np.ndarray:
    """Positions that each document of the unit takes, int32."""
    return np.load(_file(folder, number, "lengths.npy"), allow_pickle=False)


class UnitReader:
    """The documents of a unit by number; copies, as a view would keep its file open."""

    def __init__(self, folder: Path, number: int, modalities: tuple[ModalityInfo, ...]) -> None:
        self._modalities = modalities
        self._tokens = _mapped(_file(folder, number, "tokens"), np.dtype(np.int32))
        self._latents = _mapped(_file(folder, number, "latents"), latents_dtype(modalities))
        self._rows = np.load(_file(folder, number, "segments.npy"), allow_pickle=False)

    def __getitem__(self, document: int) -> Document:
        first, end = np.searchsorted(self._rows[:, 0], (document, document + 1))
        return tuple(self._segment(*row) for row in self._rows[first:end, 1:].tolist())

    def _segment(self, kind: int, offset: int, length: int, height: int, width: int) -> Segment:
        if kind == KIND_TEXT:
            return TextSegment(np.array(self._tokens[offset : offset + length]))
        channels = self._modalities[kind - 1].channels
        values = self._latents[offset : offset + height * width * channels]
        return ImageSegment(np.array(values).reshape(height, width, channels), kind - 1)


def _file(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:06d}.{kind}"


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file of no bytes cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
