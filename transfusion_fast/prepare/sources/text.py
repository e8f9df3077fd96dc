"""Text documents: JSON lines, plain text files, Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES, Source, Unit, decode_utf8, kind_of, parse_json
from transfusion_fast.prepare.sources.lines import JSON_LINES, line_units, read_lines
from transfusion_fast.prepare.sources.parquet import read_rows, row_groups

FILES_TOGETHER = 256
"""A unit of .txt is at most so many consecutive files, by their numbers."""


@dataclass(frozen=True)
class TextSource(Source):
    """The texts of files: one a line of JSON lines and one a row of .parquet, under `field`; one a .txt."""

    field: str = "text"

    suffixes = (*JSON_LINES, ".txt", ".parquet")

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        for number, file in enumerate(self.files):
            last = units[-1] if units else None
            match kind_of(file):
                case ".parquet":
                    units += row_groups(file, self.field)
                case ".txt":
                    if last and kind_of(last.path) == ".txt" and last.end == number < last.start + FILES_TOGETHER:
                        units[-1] = replace(last, end=number + 1)
                    else:
                        units.append(Unit(file, number, number + 1))
                case _:
                    units += line_units(file)
        return units

    def entries(self, unit: Unit) -> Iterator[tuple[str, bytes | Rejected | None]]:
        match kind_of(unit.path):
            case ".txt":
                for file in self.files[unit.start : unit.end]:
                    too_large = file.stat().st_size > MAX_BYTES
                    rejected = Rejected("file too large", f"more than {MAX_BYTES} bytes")
                    yield str(file), rejected if too_large else file.read_bytes()
            case ".parquet":
                yield from read_rows(unit, self.field)
            case _:
                yield from read_lines(unit)

    def parts(self, entry: bytes | None, unit: Unit) -> tuple[str]:
        value: Any = entry
        if entry is not None:
            match kind_of(unit.path):
                case ".txt":
                    value = decode_utf8(entry, "utf-8-sig")
                case ".parquet":
                    value = decode_utf8(entry)
                case _:
                    value = parse_json(entry)
        if isinstance(value, dict):
            if self.field not in value:
                names = ", ".join(list(value)[:8])
                raise Rejected("no text", f"no {self.field!r} among {names!r:.200}; name one with --field")
            value = value[self.field]
        if not isinstance(value, str):
            raise Rejected("no text", f"{self.field} is {type(value).__name__}")
        if not value.strip():
            raise Rejected("empty text", "")
        return (value,)

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", "field": self.field}
