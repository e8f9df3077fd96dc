"""What every source of documents is: files cut into units, read in any order and by any process.

What cannot be used is yielded as `Rejected`, to be counted; the rest goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from transfusion_fast.errors import InputError

Split = Literal["train", "heldout"]

UNIT_BYTES = 64 << 20
MAX_BYTES = 64 << 20  # of a line, or of a file in an archive: more is no document


@dataclass(frozen=True)
class RawDocument:
    """A document as its source has it."""

    where: str
    """For messages: its place in the source."""
    parts: tuple[str | bytes, ...]
    """Texts, and images as the bytes of their files."""


class Rejected(ValueError):
    """A document that cannot be used. `reason` is one of a few, for counting; the message is for the reader."""

    def __init__(self, reason: str, detail: str) -> None:
        # Names in archives and messages of libraries reach the terminal, and must not forge lines on it.
        self.reason, self.detail = reason, _printable(detail)
        super().__init__(f"{reason}: {self.detail}")

    def at(self, where: str) -> Rejected:
        """The same, and in which document."""
        return Rejected(self.reason, f"{self.detail}, {where}")


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
        """The settings, as JSON: two sources of one description and the same files have the same documents."""


def existing_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files given, and those of `suffixes` in the folders given, by name; InputError where there is none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            if not found:
                raise InputError(f"folder {path} must hold files of {', '.join(suffixes)}, and holds none")
            files += found
        elif not path.is_file():
            raise InputError(f"source {path} must exist, and does not; give files or folders of them")
        elif path.suffix.lower() not in suffixes:
            raise InputError(f"source must be of {', '.join(suffixes)}, got {path}; convert it or rename it")
        else:
            files.append(path)
    return files


def byte_ranges(path: Path, size: int = UNIT_BYTES) -> list[Unit]:
    """A file in pieces of about `size` bytes."""
    total = path.stat().st_size
    return [Unit(path, start, min(start + size, total)) for start in range(0, total, size)]


def lines_of(unit: Unit) -> Iterator[tuple[int, bytes | Rejected]]:
    """(offset, line without its end) of the lines that begin in the unit; a line in two units is the first's."""
    with unit.path.open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            _skip_line(file, unit.end)
        while (at := file.tell()) < unit.end and (line := _read_line(file, unit.end)) is not None:
            yield at, line


def _skip_line(file: BinaryIO, end: int) -> None:
    """To the next line, or `end`: a line across many units must not be read by each to its own end."""
    while (left := min(MAX_BYTES, end - file.tell())) > 0 and (rest := file.readline(left)):
        if rest.endswith(b"\n"):
            return


def _read_line(file: BinaryIO, end: int) -> bytes | Rejected | None:
    """The next line; None at the end. No more of it than a document may have is ever in memory.

    One too long is passed over to `end`.
    """
    at = file.tell()
    line = file.readline(MAX_BYTES)
    if not line:
        return None
    if len(line) < MAX_BYTES or line.endswith(b"\n"):
        return line.rstrip(b"\r\n")
    _skip_line(file, end)
    return Rejected("line too long", f"more than {MAX_BYTES} bytes, byte {at} of {file.name}")


def parse_json(line: bytes | Rejected, where: str) -> Any:
    """The value of a line, or why it is rejected."""
    if isinstance(line, Rejected):
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected("not JSON", f"{error}, {where}")


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
