"""Values of .json files: one list of records, records one after another, or JSON lines under another name."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES
from transfusion_fast.prepare.sources.lines import DECOMPRESSION_ERRORS, damage_in, open_decompressed

_BLOCK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
_decode = json.JSONDecoder().raw_decode


def has_json_lines(path: Path) -> bool:
    """Return whether one of the first two lines is a whole object or list, so that each line is a record of its own.

    A file of a single line holds one value. A damaged file has lines, whose reader reports the damage.
    """
    try:
        with open_decompressed(path) as file:
            begin = file.readline(MAX_BYTES)
            if not begin.endswith(b"\n"):
                return False
            lines = [line.removeprefix(codecs.BOM_UTF8).strip() for line in (begin, file.readline(MAX_BYTES))]
    except DECOMPRESSION_ERRORS:
        return True
    return lines[0] not in (b"[", b"") and lines[1] != b"" and any(map(_is_container, lines))


def _is_container(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, value) of each element of the file's list, or of each value if the file is no list.

    One element is held in memory at a time. What follows a value that cannot be read is Rejected as a whole, and so is
    a damaged compressed file.
    """
    damage, trailing = damage_in(path)
    yield from damage
    if damage:
        return
    number = 0
    try:
        with open_decompressed(path) as file:
            for value in _values(file):
                yield f"value {number} of {path}", value
                number += 1
    except Rejected as rejected:
        yield f"value {number} of {path}", rejected
    yield from trailing


def _values(file: IO[bytes]) -> Iterator[Any]:
    """Yield the values; raise Rejected where the next one cannot be read."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogatepass")
    text, offset, more = _read(file, decoder, _BLOCK), 0, True
    offset = _BETWEEN.match(text).end()  # type: ignore[union-attr]  # it matches any text
    in_list = text[offset : offset + 1] == "["
    offset += in_list
    while True:
        offset = _BETWEEN.match(text, offset).end()  # type: ignore[union-attr]
        if in_list and text[offset : offset + 1] == "]":
            in_list = False
            offset += 1
            continue
        try:
            value, end = _decode(text, offset)
        except (ValueError, RecursionError) as error:
            held = len(text) - offset
            if more and held <= MAX_BYTES:  # reading as much again keeps the work linear
                block = _read(file, decoder, max(held, _BLOCK))
                text, offset, more = text[offset:] + block, 0, bool(block)
                continue
            if held or in_list:
                reason = error if held else "the list has no end"
                raise Rejected("not JSON", f"what follows is lost ({reason})") from error
            return
        if end == len(text) and more:  # a number may continue in the next block
            block = _read(file, decoder, _BLOCK)
            text, offset, more = text[offset:] + block, 0, bool(block)
            continue
        yield value
        offset = end


def _read(file: IO[bytes], decoder: codecs.IncrementalDecoder, size: int) -> str:
    """Return the next characters, at least one unless the file ends."""
    try:
        while block := file.read(size):
            if text := decoder.decode(block):
                return text
        return decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"what follows is lost ({error.reason})") from error
