"""Documents that alternate texts and images: JSON lines beside the folder of their images.

A line is `{"content": [..]}` or the list alone. Its parts are a text, `"some words"` or `{"text": ..}`, or an image,
`{"image": "path/below/this/file.jpg"}` or `{"base64": ".."}`, also as a data URI. No written path leads out of the
folder that holds the file; links on disk may.
A line and a part that is an object may have `"weight": 2.5`, the weight of its loss, or `"loss": false` for none.
A preparation that is resumed detects a changed JSON file, but not a changed image.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from transfusion_fast.errors import Rejected
from transfusion_fast.model.inputs import Weighted
from transfusion_fast.model.loss import check_weight
from transfusion_fast.prepare.sources.base import MAX_BYTES, Source, Unit, parse_json
from transfusion_fast.prepare.sources.lines import JSON_LINES, line_units, read_lines

CONTENT_FIELD = "content"
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")  # from the URL-safe alphabet


class InterleavedSource(Source):
    """The documents of JSON lines, one a line."""

    suffixes = JSON_LINES

    def units(self) -> list[Unit]:
        return [unit for file in self.files for unit in line_units(file)]

    def entries(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        return read_lines(unit)

    def parts(self, entry: bytes, unit: Unit) -> Iterator[Weighted]:
        content = parse_json(entry)
        around, _ = _weight(content, "document")
        content = content.get(CONTENT_FIELD) if isinstance(content, dict) else content
        if not isinstance(content, list):
            raise Rejected("no content", f"{CONTENT_FIELD} must be a list, got {type(content).__name__}")
        size, blank = 0, True
        for number, part in enumerate(content):
            weight, part = _weight(part, f"part {number}")
            found = _part(part, number, unit.path.parent)
            size += len(found)
            if size > MAX_BYTES:
                raise Rejected("document too large", f"its parts have more than {MAX_BYTES} bytes")
            blank = blank and isinstance(found, str) and not found.strip()
            if found != "":  # an image of no bytes is left to the decoder to reject
                yield Weighted(found, around * weight)
        if blank:
            raise Rejected("empty document", "its texts are blank, and it has no image")

    def record(self, entry: bytes, unit: Unit) -> Any:
        return parse_json(entry)

    def describe(self) -> dict[str, Any]:
        return {"kind": "interleaved"}


def _weight(holder: Any, what: str) -> tuple[float, Any]:
    """Return the weight of the loss of a document or part, and the rest of what holds it; Rejected for a bad one."""
    if not isinstance(holder, dict):
        return 1.0, holder
    rest = {name: value for name, value in holder.items() if name not in ("loss", "weight")}
    loss = holder.get("loss", True)
    if not isinstance(loss, bool) or ("loss" in holder and "weight" in holder):
        raise Rejected(
            "bad weight", f"loss of {what} must be true or false, and given without weight, got {loss!r:.60}"
        )
    try:
        return check_weight(holder.get("weight", float(loss)), what), rest
    except ValueError as error:
        raise Rejected("bad weight", str(error)) from error


def _part(part: Any, number: int, folder: Path) -> str | bytes:
    match part, len(part) if isinstance(part, dict) else 1:
        case ((str(text) | {"text": str(text)}), 1):
            return text
        case {"image": str(path)}, 1:
            return _image_file(path, folder)
        case {"base64": str(data)}, 1:
            return _decode_base64(data, number)
    raise Rejected("unknown part", f"part {number} must be a text, an image or base64, got {part!r:.60}")


def _decode_base64(data: str, number: int) -> bytes:
    """Return the bytes of base64 (RFC 4648) in either alphabet, padded or not, in lines, alone or as a data URI."""
    head, comma, content = data.partition(",")
    if not comma:
        content = data
    elif not (head.startswith("data:") and head.endswith(";base64")):
        raise Rejected("not base64", f"part {number} begins with {head!r:.40}")
    try:
        letters = b"".join(unquote_to_bytes(content).split()).rstrip(b"=").translate(_TO_STANDARD)
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("not base64", f"part {number} ({error})") from error


def _image_file(name: str, folder: Path) -> bytes:
    """Return the bytes of a file whose written path lies below `folder`; links there are the owner's and followed."""
    try:
        if "\0" in name:
            raise ValueError("it has a zero byte")  # where normpath may stop
        path = Path(os.path.normpath(folder.resolve() / name))
        if not any(path.is_relative_to(known) for known in (folder.resolve(), os.path.abspath(folder))):
            raise Rejected("path leads out", f"image {name!r:.80} must lie below {folder}")
        if not path.is_file():
            raise Rejected("image missing", f"{name!r:.80} below {folder}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise Rejected("file too large", f"{size} bytes of {name!r:.80}")
        return path.read_bytes()
    except Rejected:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte in it, or a circle of links
        raise Rejected("image unreadable", f"{name!r:.80} ({error})") from error
