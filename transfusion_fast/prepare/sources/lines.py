"""Lines of text files, compressed or not, and texts between separators, in units that several processes can read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
        damage = damage_in(path, most=1)[0]
        if "too much memory" in damage or "Memory usage limit" in damage:
            raise InputError(f"{path} must be compressed without --long, got a larger window; compress it again")
        return [Unit(path, 0, sys.maxsize)]
    total = path.stat().st_size
    return [Unit(path, start, min(start + size, total)) for start in range(0, total, size)]


def read_lines(unit: Unit) -> Iterator[tuple[str, bytes | Remark]]:
    """Yield (location, content) of each line that begins in the unit and is not blank, without its line end.

    A damaged compressed file is Rejected as a whole, and a line of more than MAX_BYTES is Rejected without being held
    in memory. Bytes behind the compressed data of a .gz are ignored, as `gzip` does.
    """
    damage, size = damage_in(unit.path)
    end = min(unit.end, size)
    if damage:
        yield f"byte 0 of {unit.path}", Rejected("file damaged", f"nothing of it is used ({damage})")
        return
    with opened(unit.path) as file:
        offset = unit.start
        if offset:  # a line across the start belongs to the unit before
            file.seek(offset - 1)
            offset += _skip_line(file, end - offset + 1) - 1
        while offset < end and (line := file.readline(min(MAX_BYTES, size - offset))):
            where = f"byte {offset} of {unit.path}"
            offset += len(line)
            if len(line) == MAX_BYTES and not line.endswith(b"\n"):
                offset += _skip_line(file, end - offset)
                yield where, Rejected("line too long", f"more than {MAX_BYTES} bytes")
            elif line.strip():
                yield where, line.rstrip(b"\r\n")
    if size < sys.maxsize:
        yield f"byte {size} of {unit.path}", Repaired("trailing bytes", "what follows the compressed data is ignored")


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


def damage_in(path: Path, most: int = sys.maxsize) -> tuple[str, int]:
    """Return what is wrong with the first `most` bytes of a compressed file, before any of it is used; else "".

    The checksum stands behind the data. Every .gz has one; a .zst may lack it. The second value is the size of the
    content if it ends before the file does, else sys.maxsize.
    """
    if path.suffix.lower() not in COMPRESSIONS:
        return "", sys.maxsize
    if not path.stat().st_size:
        return "it is empty", sys.maxsize
    size = 0
    try:
        with opened(path) as file:
            # `read` would lose what it has read before an error.
            while size < most and (block := file.read1(min(most - size, _BLOCK))):
                size += len(block)
    except DECOMPRESSION_ERRORS as error:
        if getattr(error, "errno", None):  # the disk's fault, not the file's
            raise
        if size and "Not a gzipped file" in str(error):  # what follows a member is none
            return "", size
        return str(error), sys.maxsize
    return "", sys.maxsize


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file for reading its decompressed content."""
    with path.open("rb") as file:
        match path.suffix.lower():
            case ".gz":
                yield gzip.GzipFile(fileobj=file)
            case ".bz2":
                yield bz2.BZ2File(file)
            case ".xz":
                lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(file.read(_BLOCK), max_length=1)
                file.seek(0)
                yield lzma.LZMAFile(file)  # noqa: SIM115
            case ".zst":  # pyarrow reads frame after frame, and reports a frame that is cut off
                yield io.BufferedReader(optional_module("pyarrow", "data").input_stream(file, "zstd"), _BLOCK)
            case _:
                yield file
