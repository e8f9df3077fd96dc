"""Documents that alternate texts and images: JSON lines beside the folder of their pictures.

A line is `{"content": [..]}` or the list alone. Its parts are a text, `"some words"` or `{"text": ..}`, or an image,
`{"image": "path/below/this/file.jpg"}` or `{"base64": ".."}`. No path leads out of the folder that holds the file.
Preparing that is cut off and goes on notices a file that has changed, but not a picture.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES, RawDocument, Unit, existing_files, parse_json
from transfusion_fast.prepare.sources.lines import JSON_LINES, line_units, lines_of

CONTENT_FIELD = "content"


@dataclass(frozen=True)
class InterleavedSource:
    """The documents of JSON lines, one a line."""

    files: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> InterleavedSource:
        """Of files and folders; InputError where there are none."""
        return cls(tuple(existing_files(paths, JSON_LINES)))

    def units(self) -> list[Unit]:
        return [unit for file in self.files for unit in line_units(file)]

    def documents(self, unit: Unit) -> Iterator[RawDocument | Rejected]:
        folder = unit.path.parent.resolve()
        for at, line in lines_of(unit):
            where = f"byte {at} of {unit.path}"
            try:
                yield RawDocument(where, tuple(_parts(parse_json(line, where), folder)))
            except Rejected as rejected:
                at_fault = rejected.detail if where in rejected.detail else f"{rejected.detail}, {where}"
                yield Rejected(rejected.reason, at_fault)

    def describe(self) -> dict[str, Any]:
        return {"kind": "interleaved"}


def _parts(entry: Any, folder: Path) -> Iterator[str | bytes]:
    if isinstance(entry, Rejected):
        raise entry
    content = entry.get(CONTENT_FIELD) if isinstance(entry, dict) else entry
    if not isinstance(content, list):
        raise Rejected("no content", f"{CONTENT_FIELD} must be a list, got {type(content).__name__}")
    if not content:
        raise Rejected("empty document", f"{CONTENT_FIELD} is empty")
    size, blank = 0, True
    found: str | bytes
    for number, part in enumerate(content):
        match part, len(part) if isinstance(part, dict) else 1:
            case ((str(found) | {"text": str(found)}), 1):
                pass
            case {"image": str(path)}, 1:
                found = _file(path, folder)
            case {"base64": str(data)}, 1:
                found = _decoded(data, number)
            case _:
                raise Rejected("unknown part", f"part {number} must be a text, an image or base64, got {part!r:.60}")
        size += len(found)
        if size > MAX_BYTES:
            raise Rejected("document too large", f"its parts have more than {MAX_BYTES} bytes")
        blank = blank and isinstance(found, str) and not found.strip()
        if found != "":  # an image of no bytes is for the decoder to reject
            yield found
    if blank:
        raise Rejected("empty document", "its texts are blank, and it has no image")


def _file(name: str, folder: Path) -> bytes:
    """The bytes of an image below `folder`, links followed."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise Rejected("path leads out", f"image {name!r:.80} must lie below {folder}")
        if not path.is_file():
            raise Rejected("image missing", f"{name!r:.80} below {folder}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise Rejected("file too large", f"{size} bytes of {name!r:.80}")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, of a zero byte, or of links in a circle
        if isinstance(error, Rejected):
            raise
        raise Rejected("image unreadable", f"{name!r:.80} ({error})") from error


def _decoded(data: str, number: int) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("not base64", f"part {number} ({error})") from error
