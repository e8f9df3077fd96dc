"""The interface of a source of documents: files cut into units, which any process may read in any order.

Entries that cannot be used are yielded as `Rejected`, to be counted; reading continues behind them.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from transfusion_fast.data.pack import Segment
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.model.inputs import Weighted

_BLOCK = 1 << 20


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


Part = str | TextRange | bytes | np.ndarray | Segment
"""A text, one that is read in pieces, the bytes of an image file, its pixels uint8 [height, width, 3], or an encoded
segment."""
MAX_BYTES = 64 << 20
"""The largest line, and the largest file in an archive, that is read."""
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class SourceDocument:
    """A document as its source holds it, and its place there, for messages."""

    where: str
    parts: tuple[Part, ...]
    weights: tuple[float, ...] = ()
    """Weight of the loss of each part; empty for 1 everywhere."""


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
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Kinds of files that the source reads."""

    @classmethod
    def of(cls, paths: Sequence[Path], **settings: Any) -> Self:
        """Return the source of these files, and of the files of `suffixes` below these folders, by name.

        Raises:
            InputError: a path or a link leads nowhere, a folder holds no such file, a file is of another kind or was
                given twice.
        """
        names: dict[Path, Path] = {}
        for file in (file for path in paths for file in _files_at(path, cls.suffixes)):
            if (other := names.setdefault(file.resolve(), file)) is not file:
                raise InputError(f"source must hold a file once, got {other} and {file}, the same file; leave one out")
        return cls(tuple(names.values()), **settings)

    @abstractmethod
    def units(self) -> list[Unit]:
        """Return all units in the order of their documents."""

    @abstractmethod
    def entries(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        """Yield the place and the content of each document of a unit; the content may be Rejected."""

    def parts(self, entry: Any, unit: Unit) -> Iterable[Part | Weighted]:
        """Return the parts of the document that an entry holds; Rejected if it holds none."""
        return entry

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the settings except for the files as JSON; equal settings and files give equal documents."""

    def spans(self, unit: Unit) -> list[tuple[Path, int, int]]:
        """Return bytes [start, end) of files such that those of all units together are those of all files."""
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

    def documents(self, unit: Unit) -> Iterator[SourceDocument | Rejected]:
        """Yield each document of a unit, or why it cannot be used and where it is, in order."""
        for where, entry in self.entries(unit):
            found: SourceDocument | Rejected
            try:
                if isinstance(entry, Rejected):
                    raise entry
                found = _document(where, tuple(self.parts(entry, unit)))
            except Rejected as rejected:
                found = rejected.at(where)
            yield found


def _document(where: str, parts: tuple[Part | Weighted, ...]) -> SourceDocument:
    plain = tuple([part.content if isinstance(part, Weighted) else part for part in parts])
    weights = tuple([part.weight if isinstance(part, Weighted) else 1.0 for part in parts])
    return SourceDocument(where, plain, weights if any(weight != 1 for weight in weights) else ())


@functools.lru_cache  # asked for every document, and slow
def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds, with that of its compression: `.parquet`, `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def _files_at(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return a file, or the files below a folder by name. Links are followed, and no folder is entered twice."""
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"source {path} must exist, got no such file; give files or folders of files")
        if kind_of(path) not in suffixes:
            raise InputError(f"source must be of {', '.join(suffixes)}, got {path}; convert it or rename it")
        return [path]
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    for current, folders, names in os.walk(path, onerror=_fail, followlinks=True):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort(reverse=True)  # so that a folder with several names is entered by the same one each time
        for file in (Path(current, name) for name in names):
            wanted = kind_of(file) in suffixes
            if wanted and file.is_file():
                found.append(file)
            elif wanted or (not file.suffix and file.is_symlink() and not file.exists()):  # perhaps to a folder
                raise InputError(f"source {file} must be a file, got something else or a broken link; remove it")
    if not found:
        raise InputError(f"folder {path} must hold files of {', '.join(suffixes)}, got none; give another")
    return sorted(found)


def _fail(error: OSError) -> None:
    raise error


def parse_json(line: bytes) -> Any:
    """Return the value of a line; Rejected if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(error)) from error


def decode_utf8(content: bytes, encoding: Literal["utf-8", "utf-8-sig"] = "utf-8") -> str:
    """Return a text; Rejected if it is not UTF-8. `utf-8-sig` drops the byte order mark."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"{error.reason} at byte {error.start}") from error
