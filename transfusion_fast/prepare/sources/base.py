"""What every source of documents is: files cut into units, read in any order and by any process.

What cannot be used is yielded as `Rejected`, to be counted; the rest goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from transfusion_fast.errors import InputError, Rejected

Split = Literal["train", "heldout"]

MAX_BYTES = 64 << 20  # of a line, or of a file in an archive: more is no document
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class RawDocument:
    """A document as its source has it."""

    where: str
    """For messages: its place in the source."""
    parts: tuple[str | bytes, ...]
    """Texts, and images as the bytes of their files."""


@dataclass(frozen=True)
class Unit:
    """A part of a file: what begins in [start, end), in bytes or whatever the source counts by."""

    path: Path
    start: int
    end: int


Raw_co = TypeVar("Raw_co", covariant=True)


class Source(Protocol[Raw_co]):
    """Where documents come from, `RawDocument`s mostly. Picklable."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is read."""

    def units(self) -> list[Unit]:
        """All of it, in the order of documents; InputError where there is nothing to read."""

    def documents(self, unit: Unit) -> Iterator[Raw_co | Rejected]:
        """Those of a unit, in order."""

    def describe(self) -> dict[str, Any]:
        """The settings but for the files, as JSON: sources of one description and the same files are the same."""


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, with that of its compression: `.parquet`, `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[-1:] and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


def existing_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files given, and those of `suffixes` in the folders given, by name.

    InputError where there is none, and for a file that is there twice.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = _files_below(path, suffixes)
            if not found:
                raise InputError(f"folder {path} must hold files of {', '.join(suffixes)}, and holds none")
            files += found
        elif not path.is_file():
            raise InputError(f"source {path} must exist, and does not; give files or folders of them")
        elif kind_of(path) not in suffixes:
            raise InputError(f"source must be of {', '.join(suffixes)}, got {path}; convert it or rename it")
        else:
            files.append(path)
    names: dict[Path, Path] = {}
    for file in files:
        if (other := names.setdefault(file.resolve(), file)) is not file:
            raise InputError(f"source must hold a file once, got {other} and {file}, which are one; leave one out")
    return files


def _files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """By name; links are followed, and no folder is entered twice."""
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
                raise InputError(f"source {path} must be a file, and is none or a link to nothing; mend or remove it")
    return sorted(found)


def parse_json(line: bytes | Rejected, where: str) -> Any:
    """The value of a line, or why it is rejected."""
    if isinstance(line, Rejected):
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected("not JSON", f"{error}, {where}")
