"""Text documents: JSON lines, plain text files, Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources import parquet
from transfusion_fast.prepare.sources.base import MAX_BYTES, RawDocument, Unit, existing_files, kind_of, parse_json
from transfusion_fast.prepare.sources.lines import JSON_LINES, line_units, lines_of

KINDS = (*JSON_LINES, ".txt", ".parquet")
FILES_TOGETHER = 256
"""A unit of .txt is so many files that follow one another, by their numbers."""


@dataclass(frozen=True)
class TextSource:
    """The documents of files: one a line of JSON lines and a row of .parquet, under `field`; one a .txt."""

    files: tuple[Path, ...]
    field: str = "text"

    @classmethod
    def of(cls, paths: Sequence[Path], field: str = "text") -> TextSource:
        """Of files and folders; InputError where there are none."""
        return cls(tuple(existing_files(paths, KINDS)), field)

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        for number, file in enumerate(self.files):
            if not _is_whole(file):
                units += self._units_of(file)
            elif units and _is_whole(units[-1].path) and units[-1].end == number < units[-1].start + FILES_TOGETHER:
                units[-1] = replace(units[-1], end=number + 1)
            else:
                units.append(Unit(file, number, number + 1))
        return units

    def _units_of(self, file: Path) -> list[Unit]:
        if kind_of(file) in JSON_LINES:
            return line_units(file)
        return [Unit(file, group, group + 1) for group in range(parquet.row_groups(file, self.field))]

    def documents(self, unit: Unit) -> Iterator[RawDocument | Rejected]:
        for where, value in self._values(unit):
            if isinstance(value, Rejected):
                yield value
            elif not isinstance(value, str):
                yield Rejected("no text", f"{self.field} is {type(value).__name__}, {where}")
            elif not value.strip():
                yield Rejected("empty text", where)
            else:
                yield RawDocument(where, (value,))

    def _values(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        match kind_of(unit.path):
            case ".txt":
                return self._whole_files(unit)
            case ".parquet":
                return parquet.rows(unit, self.field)
        return self._json_values(unit)

    def _whole_files(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        for file in self.files[unit.start : unit.end]:
            yield str(file), _content(file)

    def _json_values(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        for at, line in lines_of(unit):
            where = f"byte {at} of {unit.path}"
            entry = parse_json(line, where)
            if isinstance(entry, dict) and self.field not in entry:
                names = ", ".join(list(entry)[:8])
                yield (
                    where,
                    Rejected("no text", f"no {self.field!r} among {names!r:.200}; name one with --field, {where}"),
                )
            else:
                yield where, entry[self.field] if isinstance(entry, dict) else entry

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", "field": self.field}


def _is_whole(file: Path) -> bool:
    """Whether the file is one document."""
    return kind_of(file) == ".txt"


def _content(file: Path) -> str | Rejected:
    if file.stat().st_size > MAX_BYTES:
        return Rejected("file too large", f"more than {MAX_BYTES} bytes, {file}")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Rejected("not UTF-8", f"{error.reason} at byte {error.start}, {file}")
