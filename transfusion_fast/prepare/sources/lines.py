"""Lines of text files, compressed or not, and texts between separators, in units that several processes can read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from transfusion_fast.errors import InputError, Rejected, Remark, Repaired, optional_module
from transfusion_fast.prepare.sources.base import MAX_BYTES, TextRange, Unit
from transfusion_fast.prepare.sources.files import COMPRESSIONS

UNIT_BYTES = 64 << 20
LONG_BYTES = 8 << 20
"""The longest text of a .txt file that is held in memory; a longer one is read in pieces."""
DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_BLOCK = 1 << 20
_XZ_MEMORY = 256 << 20  # `xz -9` takes 65 MB


def line_units(path: Path, size: int = UNIT_BYTES) -> list[Unit]:
    """Return a file in units of about `size` bytes; a compressed file is one unit, as it has no random access.

    Raises:
        InputError: a .zst needs a larger window than pyarrow decompresses, or an .xz too much memory.
    """
    if path.suffix.lower() in COMPRESSIONS:
        damage, _ = _read_through(path, most=1)
        if "too much memory" in damage or "Memory usage limit" in damage:
            raise InputError(f"{path} must be compressed without --long, got a larger window; compress it again")
        return [Unit(path, 0, sys.maxsize)]
    total = path.stat().st_size
    return [Unit(path, start, min(start + size, total)) for start in range(0, total, size)]


def read_lines(unit: Unit) -> Iterator[tuple[str, bytes | Remark]]:
    """Yield (location, content) of each line that begins in the unit and is not blank, without its line end.

    A damaged compressed file is Rejected as a whole, and a line of more than MAX_BYTES is Rejected without being held
    in memory. Bytes behind the compressed data are ignored, as `gzip` does, and Repaired.
    """
    damage, trailing = damage_in(unit.path)
    yield from damage
    if damage:
        return
    end = unit.end
    with open_decompressed(unit.path) as file:
        offset = unit.start
        if offset:  # a line across the start belongs to the unit before
            file.seek(offset - 1)
            offset += _skip_line(file, end - offset + 1) - 1
        while offset < end and (line := file.readline(MAX_BYTES)):
            where = f"byte {offset} of {unit.path}"
            offset += len(line)
            if len(line) == MAX_BYTES and not line.endswith(b"\n"):
                offset += _skip_line(file, end - offset)
                yield where, Rejected("line too long", f"more than {MAX_BYTES} bytes")
            elif line.strip():
                yield where, line.rstrip(b"\r\n")
    yield from trailing


def _skip_line(file: Any, most: int) -> int:
    """Skip to the end of a line, at most `most` bytes; later units skip the rest. Return the number of bytes."""
    count = 0
    while count < most and (rest := file.readline(min(MAX_BYTES, most - count))):
        count += len(rest)
        if rest.endswith(b"\n"):
            break
    return count


def separated_units(path: Path, separator: bytes, size: int = UNIT_BYTES) -> list[Unit]:
    """Return a file in units of about `size` bytes, each of which ends behind a separator or with the file."""
    units: list[Unit] = []
    start, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while start < total:
            end = min(_find(file, start + size, separator) + len(separator), total)
            units.append(Unit(path, start, end))
            start = end
    return units


def read_separated(unit: Unit, separator: bytes) -> Iterator[tuple[str, bytes | TextRange]]:
    """Yield (location, content) of each text between the separators in the unit that is not blank."""
    with unit.path.open("rb") as file:
        begin, held, more = file.seek(unit.start), b"", True
        while more:
            block = file.read(min(_BLOCK, max(unit.end - begin - len(held), 0)))
            more = bool(block)
            *texts, held = (held + block).split(separator)
            for text in texts if more else [*texts, held]:
                if text.strip():
                    yield f"byte {begin} of {unit.path}", text
                begin += len(text) + len(separator)
            if more and len(held) > LONG_BYTES:
                end = min(_find(file, begin + len(held) - len(separator) + 1, separator), unit.end)
                yield f"byte {begin} of {unit.path}", TextRange(unit.path, begin, end)
                begin, held = file.seek(min(end + len(separator), unit.end)), b""


def _find(file: IO[bytes], offset: int, separator: bytes) -> int:
    """Return the offset of the first separator from `offset` on, or an offset at or behind the end of the file."""
    file.seek(offset)
    held = b""
    while block := file.read(_BLOCK):
        held += block
        if (found := held.find(separator)) >= 0:
            return offset + found
        searched = max(len(held) - len(separator) + 1, 0)
        offset, held = offset + searched, held[searched:]
    return offset + len(held)


def damage_in(path: Path) -> tuple[list[tuple[str, Rejected]], list[tuple[str, Repaired]]]:
    """Return (location, remark) if a compressed file cannot be used, and if other bytes follow its data.

    The checksum stands behind the data, so all of it is read before any is used. Every .gz has one; a .zst may lack it.
    """
    if path.suffix.lower() not in COMPRESSIONS:
        return [], []
    damage, trailing = _read_through(path)
    found = Rejected("file damaged", f"nothing of it is used ({damage})")
    ignored = Repaired("trailing bytes", "what follows the compressed data is ignored")
    return [(f"byte 0 of {path}", found)] * bool(damage), [(f"end of {path}", ignored)] * trailing


def _read_through(path: Path, most: int = sys.maxsize) -> tuple[str, bool]:
    """Return what is wrong with the first `most` bytes of the content, if anything, and whether other bytes follow."""
    if not path.stat().st_size:
        return "it is empty", False
    try:
        with open_decompressed(path) as file:
            # `read` would lose what it has read before an error.
            while most > 0 and (block := file.read1(min(most, _BLOCK))):
                most -= len(block)
            return "", getattr(file.raw, "trailing", False)
    except DECOMPRESSION_ERRORS as error:
        if getattr(error, "errno", None):  # the disk's fault, not the file's
            raise
        return str(error), False


@contextmanager
def open_decompressed(path: Path) -> Iterator[Any]:
    """Open a file for reading its decompressed content."""
    with path.open("rb") as file:
        match path.suffix.lower():
            case ".gz":
                yield io.BufferedReader(_Gzip(gzip.GzipFile(fileobj=file)), _BLOCK)
            case ".bz2":
                yield io.BufferedReader(_Streams(file, bz2.BZ2Decompressor, b"BZh"), _BLOCK)
            case ".xz":
                make = partial(lzma.LZMADecompressor, memlimit=_XZ_MEMORY)
                yield io.BufferedReader(_Streams(file, make, b"\xfd7zXZ\0"), _BLOCK)
            case ".zst":  # pyarrow reads frame after frame, and reports a frame that is cut off
                yield io.BufferedReader(optional_module("pyarrow", "data").input_stream(file, "zstd"), _BLOCK)
            case _:
                yield file


class _Content(io.RawIOBase):
    """The content of compressed data, up to other bytes that follow it."""

    trailing = False
    """True once such bytes were found."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._next(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    @abstractmethod
    def _next(self, most: int) -> bytes:
        """Return up to `most` bytes; none at the end."""


class _Gzip(_Content):
    def __init__(self, file: gzip.GzipFile) -> None:
        self._file, self._begun = file, False

    def _next(self, most: int) -> bytes:
        try:
            block = b"" if self.trailing else self._file.read1(most)
        except gzip.BadGzipFile as error:
            if not (self._begun and "Not a gzipped file" in str(error)):  # what follows a member is none
                raise
            self.trailing, block = True, b""
        self._begun = True
        return block


class _Streams(_Content):
    """Streams of one compression one after another.

    The readers of `bz2` and `lzma` would silently ignore everything behind a stream that they cannot read.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], Any], magic: bytes) -> None:
        self._file, self._make, self._magic = file, make, magic
        self._stream = make()

    def _next(self, most: int) -> bytes:
        block = b""
        while not block:
            held = b""
            if self._stream.eof:
                held = self._following()
                if not held:
                    return b""
                self._stream = self._make()
            elif self._stream.needs_input and not (held := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                raise EOFError("it ends within its data")
            block = self._stream.decompress(held, most)
        return block

    def _following(self) -> bytes:
        """Return the first bytes of the next stream, b"" at the end. Zeros between streams are padding."""
        held: bytes = self._stream.unused_data.lstrip(b"\0")
        while len(held) < len(self._magic) and (more := self._file.read(io.DEFAULT_BUFFER_SIZE)):
            held = (held + more).lstrip(b"\0")
        self.trailing = bool(held) and not held.startswith(self._magic)
        return b"" if self.trailing else held
