"""The encoded documents of one unit on disk, between reading the source and packing; both ends stream.

A unit is four files of numbers, three of lines, and a JSON that is written last. The JSON holds a checksum of each
file: after a power failure it may be there and they may not. What a segment takes beside its values is 32 bytes, as
there are as many of them as captions. Source documents have rows of their own only if some are to be chosen.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from transfusion_fast.data.pack import (
    DOCUMENT_TOKENS,
    IMAGE_TOKENS,
    KIND_TEXT,
    SEGMENT_COLUMNS,
    Document,
    ModalityInfo,
    Pack,
    TextSegment,
    latents_dtype,
    segment_row,
    tokens_dtype,
)
from transfusion_fast.errors import Rejected, Remark, Repaired
from transfusion_fast.files import read_json, write_atomically
from transfusion_fast.prepare.packing import document_lengths

_KINDS = ("tokens", "latents", "segments", "sources", "places", "rejected", "repaired")
_ROW = np.dtype([(name, "<i8" if name == "offset" else "<i4") for name in SEGMENT_COLUMNS] + [("weight", "<f4")])
# The number behind its last document, the numbers of remarks up to it, and its mark.
_SOURCE = np.dtype(
    [("end", "<i4"), ("rejected", "<i4"), ("repaired", "<i4"), ("heldout", "?"), ("has_key", "?"), ("key", "<u8", 2)]
)
_ROWS_TOGETHER, _IDS_TOGETHER = 1024, 1 << 18


def remark_line(remark: Remark) -> bytes:
    """Return a remark as a line of JSON."""
    return f"{json.dumps({'reason': remark.reason, 'detail': remark.detail})}\n".encode()


class Mark(NamedTuple):
    """Facts about a source document by which it is chosen."""

    heldout: bool
    key: bytes = b""
    """16 bytes by which duplicates are found; empty for a document that cannot be one."""
    place: str = ""
    """Location of the document in its source, for the remark on a duplicate; empty without a key."""
    of_images: bool = False
    """True if the key is that of the images alone. It is dropped if none of them can be used."""


@dataclass(frozen=True)
class Counts:
    """Numbers of documents of a unit."""

    documents: int
    cut: int
    """Number of source documents that were longer than a pack and became several."""
    tokens: int
    """Positions that the documents take."""
    sources: int = 0
    """Number of source documents that were used; 0 if they had no marks."""
    checksum: int | None = None
    """That of the bytes of the unit, if it was read to its end."""


@dataclass(frozen=True)
class Spool:
    """The documents of a unit by number, and why others were left out."""

    folder: Path
    number: int
    modalities: tuple[ModalityInfo, ...]
    num_text_tokens: int

    def path(self, kind: str) -> Path:
        """Return the path of one of the unit's files."""
        return self.folder / f"{self.number:06d}.{kind}"

    def write(
        self,
        outcomes: Iterable[Iterable[Document] | Remark],
        checksum: Callable[[], int] = lambda: 0,
        marks: deque[Mark | None] | None = None,
        enough: Callable[[int, int], bool] = lambda sources, tokens: False,
    ) -> Counts:
        """Write documents and remarks in order, keeping few in memory, and then the checksum of their source.

        An outcome that raises Rejected counts as rejected, whatever it yielded before.

        Args:
            marks: receives, before each outcome that is not Repaired, the mark of its source document.
            enough: with marks, tells from the numbers of source documents and of tokens when to stop.
        """
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {k: stack.enter_context(self.path(k).open("wb")) for k in _KINDS}
            writer = _Writer(files, self.modalities, tokens_dtype(self.num_text_tokens))
            stopped = False
            for outcome in outcomes:
                before, values = writer.documents, writer.values
                if isinstance(outcome, Remark):
                    writer.remark(outcome)
                elif isinstance(outcome, list):
                    writer.add(outcome)
                else:
                    writer.add_all_or_none(outcome)
                if marks is None or isinstance(outcome, Repaired):
                    continue
                mark = marks.popleft()
                if writer.documents > before:
                    assert mark is not None, "what is rejected by its source becomes no document"
                    writer.mark(Mark(mark.heldout) if mark.of_images and writer.values == values else mark)
                    if stopped := enough(writer.sources, writer.positions):
                        break
            writer.flush()
        read = None if stopped else checksum()
        written = Counts(writer.documents, writer.cut, writer.positions, writer.sources, read)
        write_atomically(self.path("json"), json.dumps([*astuple(written), writer.checksums]))
        return written

    def read_counts(self) -> Counts | None:
        """Return what `write` returned; None if it did not end, or the files are not as they were written."""
        match read_json(self.path("json")):
            case [int(documents), int(cut), int(tokens), int(sources), (int() | None) as checksum, dict(checksums)]:
                with suppress(FileNotFoundError):
                    if all(zlib.crc32(self._mapped(kind, np.uint8).data) == checksums.get(kind) for kind in _KINDS):
                        return Counts(documents, cut, tokens, sources, checksum)
        return None

    @property
    def sources(self) -> np.ndarray:
        """Rows of `_SOURCE`, one for each source document that was used; none if documents had no marks."""
        return self._mapped("sources", _SOURCE)

    def places(self, chosen: np.ndarray) -> Iterator[str]:
        """Yield where those of the first source documents are for which `chosen`, bool [n], is true and has a key."""
        with self.path("places").open("rb") as lines:
            yield from map(json.loads, compress(lines, chosen[self.sources["has_key"][: chosen.size]].tolist()))

    @property
    def lengths(self) -> np.ndarray:
        """Positions that each document takes, int64."""
        return document_lengths(*(self._rows[name] for name in ("document", "kind", "length")))

    def read(self, documents: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
        """Return rows, [n] of `_ROW`, and the values of each row, of the segments of documents in the given order.

        Images are read and texts are mapped: of images, all that a shard holds would stay in memory.

        Args:
            numbers: the documents' numbers in the rows that are returned.
        """
        column, documents = self._rows["document"], documents.astype(np.int32)  # another dtype would copy the column
        first, end = (np.searchsorted(column, documents, side) for side in ("left", "right"))
        counts = end - first
        rows = self._rows[np.repeat(end - np.cumsum(counts), counts) + np.arange(counts.sum())]
        rows["document"] = np.repeat(numbers, counts)
        tokens, images, size = self._tokens, self._images.fileno(), latents_dtype(self.modalities).itemsize
        values = []
        for _, kind, offset, length, height, width, _ in rows.tolist():
            if kind == KIND_TEXT:
                values.append(tokens[offset : offset + length].tobytes())
            else:
                count = height * width * self.modalities[kind - 1].channels
                values.append(os.pread(images, count * size, offset * size))
        return rows, values

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._mapped("segments", _ROW)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self._mapped("tokens", tokens_dtype(self.num_text_tokens))

    @cached_property
    def _images(self) -> IO[bytes]:
        return self.path("latents").open("rb")

    def _mapped(self, kind: str, dtype: DTypeLike) -> np.ndarray:
        """Return the numbers of a file, mapped into memory; an empty file cannot be mapped."""
        path = self.path(kind)
        return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.empty(0, dtype)


def read_pack(located: np.ndarray, spool: Callable[[int], Spool], modalities: Sequence[ModalityInfo]) -> Pack:
    """Return the pack of documents that lie in several units; equal to that of `make_pack`.

    Args:
        located: int64 [documents, 2], the unit and the number of each document.
    """
    found = []
    for unit in np.unique(located[:, 0]).tolist():
        own = np.flatnonzero(located[:, 0] == unit)
        found.append(spool(unit).read(located[own, 1], own))
        tokens = tokens_dtype(spool(unit).num_text_tokens)
    rows = np.concatenate([rows for rows, _ in found])
    order = np.argsort(rows["document"], kind="stable")
    rows, values = rows[order], [value for _, values in found for value in values]
    values = [values[i] for i in order.tolist()]
    is_text = rows["kind"] == KIND_TEXT
    bytes_of = np.array([len(value) for value in values])
    arrays = []
    for own, dtype in ((is_text, tokens), (~is_text, latents_dtype(modalities))):
        rows["offset"][own] = (np.cumsum(bytes_of[own]) - bytes_of[own]) // dtype.itemsize
        arrays.append(np.frombuffer(b"".join(compress(values, own.tolist())), dtype))
    return Pack(
        arrays[0].astype(np.int32),
        np.stack([rows[name].astype(np.int32) for name in SEGMENT_COLUMNS], axis=1),
        arrays[1],
        rows["weight"].copy() if (rows["weight"] != 1).any() else None,
    )


class _Writer:
    """Appends documents to the files of a unit, many at a time."""

    def __init__(self, files: dict[str, IO[bytes]], modalities: Sequence[ModalityInfo], tokens: np.dtype) -> None:
        self._files, self._modalities, self._dtype = files, modalities, tokens
        self.checksums = dict.fromkeys(files, 0)
        self.documents = self.cut = self.sources = self.positions = self.values = self._ids = self._flushed = 0
        self._remarks = {"rejected": 0, "repaired": 0}
        self._rows: list[tuple[float, ...]] = []
        self._sources: list[tuple[Any, ...]] = []
        self._tokens: list[np.ndarray] = []

    def add(self, documents: Iterable[Document]) -> None:
        """Add what a source document became."""
        before = self.documents
        for document in documents:
            for segment in document:
                row = segment_row(segment, self.documents, self._ids, self.values, self._modalities)
                self._rows.append((*row, segment.weight))
                self.positions += row[3] + IMAGE_TOKENS * (row[1] != KIND_TEXT)
                if isinstance(segment, TextSegment):
                    self._tokens.append(segment.ids)
                    self._ids += segment.ids.size
                else:
                    self._append("latents", segment.values.tobytes())
                    self.values += segment.values.size
            self.documents += 1
            self.positions += DOCUMENT_TOKENS
            if len(self._rows) >= _ROWS_TOGETHER or self._ids - self._flushed >= _IDS_TOGETHER:
                self.flush()
        self.cut += self.documents - before > 1

    def add_all_or_none(self, documents: Iterable[Document]) -> None:
        """Add what a source document became, or take all of it back and add its rejection if that is raised."""
        self.flush()
        ends = {kind: file.tell() for kind, file in self._files.items()}
        before = vars(self) | {"checksums": dict(self.checksums)}
        try:
            self.add(documents)
        except Rejected as rejected:
            for kind, file in self._files.items():
                file.truncate(file.seek(ends[kind]))
            vars(self).update(before, _rows=[], _tokens=[])
            self.remark(rejected)

    def mark(self, mark: Mark) -> None:
        """Add the row of the source document that was added last."""
        key = struct.unpack("<2Q", mark.key) if mark.key else (0, 0)
        self._sources.append((self.documents, *self._remarks.values(), mark.heldout, bool(mark.key), key))
        self.sources += 1
        if mark.key:
            self._append("places", f"{json.dumps(mark.place)}\n".encode())

    def remark(self, remark: Remark) -> None:
        """Add why a source document was left out, or what was repaired."""
        kind = "repaired" if isinstance(remark, Repaired) else "rejected"
        self._append(kind, remark_line(remark))
        self._remarks[kind] += 1

    def flush(self) -> None:
        """Write what is in memory to the files."""
        ids = np.concatenate([np.empty(0, np.int32), *self._tokens])
        stored = ids.astype(self._dtype)
        assert np.array_equal(stored, ids), "ids of a tokenizer are below its num_text_tokens"
        self._append("tokens", stored.tobytes())
        self._append("segments", np.array(self._rows, _ROW).tobytes())
        self._append("sources", np.array(self._sources, _SOURCE).tobytes())
        self._rows, self._sources, self._tokens, self._flushed = [], [], [], self._ids

    def _append(self, kind: str, data: bytes) -> None:
        self._files[kind].write(data)
        self.checksums[kind] = zlib.crc32(data, self.checksums[kind])
