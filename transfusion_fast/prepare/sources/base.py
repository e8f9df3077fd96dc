"""The interface of a source of documents: files cut into units, which any process may read in any order.

Entries that cannot be used are yielded as `Rejected`, to be counted; reading continues behind them.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from transfusion_fast.data.pack import Segment
from transfusion_fast.errors import InputError, Rejected

Split = Literal["train", "heldout"]
Part = str | bytes | np.ndarray | Segment
"""A text, the bytes of an image file, its pixels uint8 [height, width, 3], or a segment that is encoded already."""

MAX_BYTES = 64 << 20
"""The largest line, and the largest file in an archive, that is read."""
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class SourceDocument:
    """A document as its source holds it."""

    where: str
    """Its place in the source, for messages."""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Unit:
    """The documents of a file that begin in [start, end), in bytes or in whatever the source counts by."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Source(ABC):
    """Files of documents. Picklable."""

    files: tuple[Path, ...]
    """All files that are read."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Kinds of files that the source reads."""

    @classmethod
    def of(cls, paths: Sequence[Path], **settings: Any) -> Self:
        """Return the source of some files, and of the files in some folders; InputError if there are none."""
        return cls(tuple(existing_files(paths, cls.suffixes)), **settings)

    @abstractmethod
    def units(self) -> list[Unit]:
        """Return all units in the order of their documents."""

    @abstractmethod
    def entries(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        """Yield the place and the content of each document of a unit; the content may be Rejected."""

    @abstractmethod
    def parts(self, entry: Any, unit: Unit) -> Iterable[Part]:
        """Return the parts of the document that an entry holds; Rejected if it holds none."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the settings except for the files as JSON; equal settings and files give equal documents."""

    def documents(self, unit: Unit) -> Iterator[SourceDocument | Rejected]:
        """Yield each document of a unit, or why it cannot be used and where it is, in order."""
        for where, entry in self.entries(unit):
            found: SourceDocument | Rejected
            try:
                if isinstance(entry, Rejected):
                    raise entry
                found = SourceDocument(where, tuple(self.parts(entry, unit)))
            except Rejected as rejected:
                found = rejected.at(where)
            yield found


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file holds, with that of its compression: `.parquet`, `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def existing_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Return the given files, and the files of `suffixes` below the given folders, by name.

    Raises:
        InputError: a path or a link leads nowhere, a folder holds no such file, a file is of another kind or was given
            twice.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = _files_below(path, suffixes)
            if not found:
                raise InputError(f"folder {path} must hold files of {', '.join(suffixes)}, got none; give another")
            files += found
        elif not path.is_file():
            raise InputError(f"source {path} must exist, got no such file; give files or folders of files")
        elif kind_of(path) not in suffixes:
            raise InputError(f"source must be of {', '.join(suffixes)}, got {path}; convert it or rename it")
        else:
            files.append(path)
    names: dict[Path, Path] = {}
    for file in files:
        if (other := names.setdefault(file.resolve(), file)) is not file:
            raise InputError(f"source must hold a file once, got {other} and {file}, the same file; leave one out")
    return files


def _files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a folder by name. Links are followed, and no folder is entered twice."""
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(current) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
        for entry in entries:
            path = Path(entry.path)
            wanted = kind_of(path) in suffixes
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and path.is_dir()):
                waiting.append(path)
            elif wanted and path.is_file():
                found.append(path)
            elif wanted or (not path.suffix and entry.is_symlink() and not path.exists()):  # perhaps to a folder
                raise InputError(f"source {path} must be a file, got something else or a broken link; remove it")
    return sorted(found)


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
