"""Lines of text files, compressed or not, in units that several processes can read."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources.base import COMPRESSIONS, MAX_BYTES, Unit

JSON_LINES = (".jsonl", *(f"{kind}{compression}" for kind in (".jsonl", ".json") for compression in COMPRESSIONS))
"""Kinds of files; .json alone is as often one value on many lines."""
UNIT_BYTES = 64 << 20
_BLOCK = 1 << 20


def line_units(path: Path, size: int = UNIT_BYTES) -> list[Unit]:
    """A file in pieces of about `size` bytes; one that is compressed cannot be entered in its middle.

    InputError for a .zst that the library does not read, as whole as it may be.
    """
    if path.suffix.lower() in COMPRESSIONS:
        _check_window(path)
        return [Unit(path, 0, sys.maxsize)]
    total = path.stat().st_size
    return [Unit(path, start, min(start + size, total)) for start in range(0, total, size)]


def _check_window(path: Path) -> None:
    if path.suffix.lower() == ".zst":
        with _zstandard(path) as stream:
            try:
                stream.read(1)
            except OSError as error:
                if "too much memory" in str(error):
                    raise InputError(f"{path} must be compressed without --long, and is not; do it again") from error


def lines_of(unit: Unit) -> Iterator[tuple[int, bytes | Rejected]]:
    """(offset, line without its end) of the lines that begin in the unit, but for blank ones.

    A line in two units is the first's. A compressed file that is damaged is one line that is rejected.
    """
    if damage := _damage(unit.path):
        yield 0, Rejected("file damaged", f"nothing of it is used ({damage}), {unit.path}")
        return
    with _opened(unit.path) as file:
        if unit.start:
            file.seek(unit.start - 1)
            _skip_line(file, unit.end)
        while (at := file.tell()) < unit.end and (line := _read_line(file, unit)) is not None:
            if isinstance(line, Rejected) or line.strip():
                yield at, line


def _damage(path: Path) -> str:
    """What is wrong with a compressed file, found before any of it is used.

    The checksum, which every .gz has and a .zst unless it was made without, comes after what it is of.
    """
    if path.suffix.lower() not in COMPRESSIONS:
        return ""
    if not path.stat().st_size:
        return "it is of no bytes"
    try:
        with _opened(path) as file:
            while file.read(_BLOCK):
                pass
    except (OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None):  # the disk's, not the file's
            raise
        return str(error)
    return ""


def _skip_line(file: BinaryIO, end: int) -> None:
    """To the next line, or `end`: a line across many units must not be read by each to its own end."""
    while (left := min(MAX_BYTES, end - file.tell())) > 0 and (rest := file.readline(left)):
        if rest.endswith(b"\n"):
            return


def _read_line(file: BinaryIO, unit: Unit) -> bytes | Rejected | None:
    """The next line; None at the end. No more of it than a document may have is ever in memory.

    One too long is passed over to the unit's end.
    """
    at = file.tell()
    line = file.readline(MAX_BYTES)
    if not line:
        return None
    if len(line) < MAX_BYTES or line.endswith(b"\n"):
        return line.rstrip(b"\r\n")
    _skip_line(file, unit.end)
    return Rejected("line too long", f"more than {MAX_BYTES} bytes, byte {at} of {unit.path}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file as it is once decompressed."""
    compression = path.suffix.lower()
    if compression == ".zst":
        with _zstandard(path) as stream, io.BufferedReader(_Counted(stream), _BLOCK) as file:
            yield file
    elif compression == ".gz":
        with io.BufferedReader(gzip.GzipFile(path), _BLOCK) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


@contextmanager
def _zstandard(path: Path) -> Iterator[Any]:
    """pyarrow's, which reads frame after frame, and tells where one is cut off."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs the package pyarrow, which is missing; install it") from error
    with path.open("rb") as file, pyarrow.input_stream(file, compression="zstd") as stream:
        yield stream


class _Counted(io.RawIOBase):
    """A stream that cannot tell where it is, and is to."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._at = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._at += count
        return count

    def tell(self) -> int:
        return self._at
