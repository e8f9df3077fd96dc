"""The interface of a source of documents: files cut into units, which any process may read in any order.

Entries that cannot be used are yielded as `Rejected`, to be counted; reading continues behind them. Faults that were
mended are yielded as `Repaired`.
"""

from __future__ import annotations

import codecs
import json
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np

from transfusion_fast.data.pack import Segment
from transfusion_fast.errors import Rejected, Remark, Repaired
from transfusion_fast.model.loss_weights import Weighted
from transfusion_fast.prepare.sources.files import kind_of, source_files

_BLOCK = 1 << 20
_decode_json = json.JSONDecoder().raw_decode
_parse = json.JSONDecoder().decode


@dataclass(frozen=True)
class TextRange:
    """A text that is too long to hold in memory: bytes [start, end) of a file, in UTF-8."""

    path: Path
    start: int
    end: int

    def pieces(self) -> Iterator[str]:
        """Yield the text in order; raise Rejected where it is not UTF-8. A byte order mark at byte 0 is dropped."""
        decoder = codecs.getincrementaldecoder("utf-8" if self.start else "utf-8-sig")()
        with self.path.open("rb") as file:
            at = file.seek(self.start)
            while block := file.read(min(_BLOCK, self.end - at)):
                at += len(block)
                try:
                    yield decoder.decode(block, final=at == self.end)
                except UnicodeDecodeError as error:
                    raise Rejected("not UTF-8", f"{error.reason} before byte {at}") from error


Part = str | TextRange | bytes | np.ndarray | Segment | Rejected
"""A text, one that is read in pieces, the bytes of an image file, its pixels uint8 [height, width, 3], an encoded
segment, or why an image is missing."""
MAX_BYTES = 64 << 20
"""The largest line, and the largest file in an archive, that is read."""


@dataclass(frozen=True)
class SourceDocument:
    """A document as its source holds it, and its place there, for messages."""

    where: str
    parts: tuple[Part, ...]
    weights: tuple[float, ...] = ()
    """Weight of the loss of each part; empty for 1 everywhere."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Those of `Source.fields` that the document's record has."""


@dataclass(frozen=True)
class Unit:
    """A part of the source that one process reads: entries [start, end) of `path`, in bytes, rows, packs or files."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Source(ABC):
    """All files of documents that a run reads. Picklable."""

    files: tuple[Path, ...]
    passed_over: tuple[Rejected, ...] = field(default=(), kw_only=True, compare=False)
    """Why files in folders were passed over, one remark for each."""
    fields: tuple[str, ...] = field(default=(), kw_only=True, compare=False)
    """Names of the fields of records, such as scores, that the filters of documents look at."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Kinds of files that the source reads."""

    @classmethod
    def of(cls, paths: Sequence[Path], **settings: Any) -> Self:
        """Return the source of these files, and of the files of `suffixes` below these folders, by name.

        Raises:
            InputError: a path leads nowhere, a folder holds no such file, a file is of another kind or was given twice.
        """
        files, passed_over = source_files(paths, cls.suffixes)
        return cls(files, passed_over=passed_over, **settings)

    @abstractmethod
    def units(self) -> list[Unit]:
        """Return all units in the order of their documents."""

    @abstractmethod
    def entries(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        """Yield the place and the content of each document of a unit; the content may be a Remark instead."""

    def parts(self, entry: Any, unit: Unit) -> Iterable[Part | Weighted]:
        """Return the parts of the document that an entry holds; Rejected if it holds none."""
        return entry

    def record(self, entry: Any, unit: Unit) -> Any:
        """Return the record of the document that an entry holds, a mapping of its fields, or another value for none.

        It is asked for only if `fields` are, and need not have any others.
        """
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the settings except for files and `fields` as JSON; equal settings and files give equal documents."""

    def states(self) -> dict[str, dict[str, int]]:
        """Return the size and the time of change of each file, in order, by which a changed source is recognized."""
        found = ((str(file.resolve()), file.stat()) for file in self.files)
        return {file: {"bytes": status.st_size, "modified": status.st_mtime_ns} for file, status in found}

    def spans(self, unit: Unit) -> list[tuple[Path, int, int]]:
        """Return bytes [start, end) of files such that those of all units together are those of all files."""
        if kind_of(unit.path) == ".parquet":  # its units are row groups
            return [(unit.path, 0, sys.maxsize)] if unit.start == 0 else []
        return [(unit.path, unit.start, unit.end)]

    def checksum(self, unit: Unit) -> int:
        """Return the crc32 of the bytes of a unit, by which a file that was only touched is recognized."""
        found = 0
        for path, start, end in self.spans(unit):
            with path.open("rb") as file:
                at = file.seek(start)
                while block := file.read(min(_BLOCK, end - at)):
                    at, found = at + len(block), zlib.crc32(block, found)
        return found

    def documents(self, unit: Unit) -> Iterator[SourceDocument | Remark]:
        """Yield each document of a unit, or why it cannot be used and where it is, in order; repairs come before it."""
        for where, entry in self.entries(unit):
            if isinstance(entry, Remark):
                yield entry.at(where)
                continue
            try:
                fields = self._fields(entry, unit) if self.fields else {}
                found = _document(where, tuple(self.parts(entry, unit)), fields)
            except Rejected as rejected:
                yield rejected.at(where)
                continue
            if repairs := sum(map(_has_surrogates, found.parts)):
                remark = Repaired("surrogates", f"pairs were joined, single ones become question marks, {where}")
                yield from [remark] * repairs
                found = replace(found, parts=tuple(map(_join_surrogates, found.parts)))
            yield found

    def _fields(self, entry: Any, unit: Unit) -> dict[str, Any]:
        record = self.record(entry, unit)
        return {name: record[name] for name in self.fields if name in record} if isinstance(record, Mapping) else {}


def _document(where: str, parts: tuple[Part | Weighted, ...], fields: Mapping[str, Any]) -> SourceDocument:
    if Weighted not in map(type, parts):
        return SourceDocument(where, cast(tuple[Part, ...], parts), (), fields)
    plain = tuple([part.content if isinstance(part, Weighted) else part for part in parts])
    weights = tuple([part.weight if isinstance(part, Weighted) else 1.0 for part in parts])
    return SourceDocument(where, plain, weights if any(weight != 1 for weight in weights) else (), fields)


def _has_surrogates(part: Part) -> bool:
    """Return whether a part is a text with surrogates.

    CESU-8, which Java and databases write, encodes pairs of them in place of one character.
    """
    if isinstance(part, str) and not part.isascii():
        try:
            part.encode()
        except UnicodeEncodeError:
            return True
    return False


def _join_surrogates(part: Part) -> Part:
    """Return a text with each pair of surrogates as one character; tokenizers replace single ones."""
    if not isinstance(part, str):
        return part
    return part.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def parse_json(line: bytes) -> Any:
    """Return the value of a line; Rejected if it is not JSON."""
    try:
        has_mark = line.startswith(codecs.BOM_UTF8)
        return json.loads(line) if has_mark else _parse(line.decode("utf-8", "surrogatepass"))  # half the time
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(error)) from error


def decode_utf8(content: bytes, encoding: Literal["utf-8", "utf-8-sig"] = "utf-8") -> str:
    """Return a text; Rejected if it is not UTF-8 nor CESU-8. `utf-8-sig` drops the byte order mark."""
    try:
        return content.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"{error.reason} at byte {error.start}") from error
