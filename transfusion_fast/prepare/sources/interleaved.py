"""Documents that alternate texts and images, in records of JSON or of tables; see `layouts` for what records hold.

A part is a text, `"some words"` or `{"text": ..}`, or an image, `{"image": "path/below/this/file.jpg"}` or
`{"base64": ".."}`, also as a data URI. No written path leads out of the folder that holds the file, or out of
`image_root`; links on disk may. A record and a part that is an object may have `"weight": 2.5`, the weight of its loss,
or `"loss": false` for none.
A preparation that is resumed detects a changed file of records, but not a changed image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.model.inputs import Weighted
from transfusion_fast.model.loss import check_weight
from transfusion_fast.prepare.sources.base import MAX_BYTES, Source, Unit
from transfusion_fast.prepare.sources.layouts import FIELDS, Layout, content_of
from transfusion_fast.prepare.sources.records import JSON, read_records, record_units
from transfusion_fast.prepare.sources.references import check_root, decode_base64, image_bytes
from transfusion_fast.prepare.sources.tables import TABLES

_KINDS = {"text", "image", "base64"}
"""The keys of a part, of which it has one; others describe it and are ignored."""


@dataclass(frozen=True)
class InterleavedSource(Source):
    """The documents of records."""

    layout: Layout | None = None
    """Layout of all records; None to detect that of each."""
    image_root: Path | None = None
    """Folder that paths are relative to; None for that of the file that holds them."""

    suffixes = (*JSON, *TABLES)

    def __post_init__(self) -> None:
        check_root(self.image_root)

    def units(self) -> list[Unit]:
        return [unit for file in self.files for unit in record_units(file, self._columns)]

    def entries(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        return read_records(unit, self._columns)

    def parts(self, entry: Any, unit: Unit) -> Iterator[Weighted]:
        around, _ = _weight(entry, "document")
        folder = unit.path.parent if self.image_root is None else self.image_root
        size, blank = 0, True
        for number, part in enumerate(content_of(entry, self.layout)):
            weight, part = _weight(part, f"part {number}")
            found = _part(part, number, folder)
            size += 0 if isinstance(found, Rejected) else len(found)
            if size > MAX_BYTES:
                raise Rejected("document too large", f"its parts have more than {MAX_BYTES} bytes")
            blank = blank and isinstance(found, str) and not found.strip()
            if found != "":  # an image of no bytes is left to the decoder to reject
                yield Weighted(found, around * weight)
        if blank:
            raise Rejected("empty document", "its texts are blank, and it has no image")

    def record(self, entry: Any, unit: Unit) -> Any:
        return entry

    def describe(self) -> dict[str, Any]:
        root = None if self.image_root is None else str(self.image_root.resolve())
        return {"kind": "interleaved", "layout": self.layout, "image_root": root}

    def _columns(self, schema: Any) -> list[str]:
        """Return the columns of a table that documents may be in; Rejected if it has none of them."""
        if not any(name in schema.names for name in FIELDS):
            raise Rejected("no content", f"{', '.join(schema.names)!r:.200} are not the columns of a known layout")
        return [name for name in dict.fromkeys((*FIELDS, *self.fields)) if name in schema.names]


def _weight(holder: Any, what: str) -> tuple[float, Any]:
    """Return the weight of the loss of a document or part, and the rest of what holds it; Rejected for a bad one."""
    if not isinstance(holder, dict):
        return 1.0, holder
    rest = {name: value for name, value in holder.items() if name not in ("loss", "weight")}
    given = {name: holder[name] for name in ("loss", "weight") if holder.get(name) is not None}
    loss = given.get("loss", True)
    if not isinstance(loss, bool) or len(given) > 1:
        raise Rejected(
            "bad weight", f"loss of {what} must be true or false, and given without weight, got {loss!r:.60}"
        )
    try:
        return check_weight(given.get("weight", float(loss)), what), rest
    except ValueError as error:
        raise Rejected("bad weight", str(error)) from error


def _part(part: Any, number: int, folder: Path) -> str | bytes | Rejected:
    """Return a text, the bytes of an image, or why they are missing."""
    if isinstance(part, dict):  # which has all keys in a table, most of them null
        part = {name: value for name, value in part.items() if name in _KINDS and value is not None} or part
    try:
        match part, len(_KINDS & part.keys()) if isinstance(part, dict) else 1:
            case None, _:
                return ""
            case ((str(text) | {"text": str(text)}), 1):
                return text
            case {"image": image}, 1:
                return image_bytes(image, folder)
            case {"base64": str(data)}, 1:
                return decode_base64(data)
    except Rejected as rejected:
        return rejected.at(f"part {number}")
    raise Rejected("unknown part", f"part {number} must be a text, an image or base64, got {part!r:.60}")
