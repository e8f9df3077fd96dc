"""Text documents: a field of records, or plain text files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import Source, TextRange, Unit, decode_utf8
from transfusion_fast.prepare.sources.files import kind_of
from transfusion_fast.prepare.sources.lines import LONG_BYTES, read_separated, separated_units
from transfusion_fast.prepare.sources.records import RECORDS, lookup, read_records, record_units
from transfusion_fast.prepare.sources.tables import column_type, is_string

FILES_TOGETHER = 256
"""Most .txt files in a unit."""


@dataclass(frozen=True)
class TextSource(Source):
    """The texts of files: one per record, under `field`, and one per .txt."""

    field: str = "text"
    separator: bytes = b""
    """Bytes between the texts of a .txt file; empty if each file is one text."""

    suffixes = (*RECORDS, ".txt")

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        for number, file in enumerate(self.files):
            last = units[-1] if units else None
            if kind_of(file) != ".txt":
                units += record_units(file, self._columns)
            elif self.separator:
                units += separated_units(file, self.separator)
            elif last and kind_of(last.path) == ".txt" and last.end == number < last.start + FILES_TOGETHER:
                units[-1] = replace(last, end=number + 1)
            else:
                units.append(Unit(file, number, number + 1))
        return units

    def spans(self, unit: Unit) -> list[tuple[Path, int, int]]:
        if kind_of(unit.path) == ".txt" and not self.separator:
            return [(file, 0, sys.maxsize) for file in self.files[unit.start : unit.end]]
        return super().spans(unit)

    def entries(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        if kind_of(unit.path) != ".txt":
            yield from read_records(unit, self._columns)
        elif self.separator:
            yield from read_separated(unit, self.separator)
        else:
            for file in self.files[unit.start : unit.end]:
                size = file.stat().st_size
                yield str(file), file.read_bytes() if size <= LONG_BYTES else TextRange(file, 0, size)

    def parts(self, entry: Any, unit: Unit) -> tuple[str | TextRange]:
        if isinstance(entry, TextRange):
            return (entry,)
        value = entry
        if isinstance(entry, dict):
            value = entry[self.field] if self.field in entry else lookup(entry, self.field)
            if value is None and self.field not in entry:
                names = ", ".join(list(entry)[:8])
                raise Rejected("no text", f"no {self.field!r} among {names!r:.200}; name one with --field")
        if isinstance(value, bytes):
            value = decode_utf8(value, "utf-8-sig" if kind_of(unit.path) == ".txt" else "utf-8")
        if not isinstance(value, str):
            raise Rejected("no text", f"{self.field} is {type(value).__name__}")
        if not value.strip():
            raise Rejected("empty text", "")
        return (value,)

    def record(self, entry: Any, unit: Unit) -> Any:
        return entry

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", "field": self.field, "separator": os.fsdecode(self.separator)}

    def _columns(self, schema: Any) -> list[str]:
        """Return the column of the texts; Rejected if a table has none, or one of other values."""
        name = self.field if self.field in schema.names else self.field.partition(".")[0]
        if name not in schema.names:
            names = ", ".join(schema.names)
            raise Rejected("no text", f"no column {self.field!r} among {names!r:.200}; name one with --field")
        kind = column_type(schema, name)
        if name == self.field and not _may_be_text(kind):
            raise Rejected("no text", f"column {name!r} is of {kind!s:.80}; name one of strings with --field")
        return [name, *(other for other in self.fields if other in schema.names and other != name)]


def _may_be_text(kind: Any) -> bool:
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    binary = types.is_binary(values) or types.is_large_binary(values) or types.is_fixed_size_binary(values)
    return is_string(values) or binary or types.is_binary_view(values) or types.is_null(values)
