"""Text documents: JSON lines, plain text files, Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_fast.data.source import (
    MAX_BYTES,
    RawDocument,
    Rejected,
    Unit,
    byte_ranges,
    existing_files,
    lines_of,
    parse_json,
)
from transfusion_fast.data.sources import parquet

SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class TextSource:
    """The documents of files: one a line of .jsonl and a row of .parquet, under `field`; one a .txt."""

    files: tuple[Path, ...]
    field: str = "text"

    @classmethod
    def of(cls, paths: Sequence[Path], field: str = "text") -> TextSource:
        """Of files and folders; InputError where there are none."""
        return cls(tuple(existing_files(paths, SUFFIXES)), field)

    def units(self) -> list[Unit]:
        return [unit for file in self.files for unit in self._units_of(file)]

    def _units_of(self, file: Path) -> list[Unit]:
        if file.suffix.lower() == ".jsonl":
            return byte_ranges(file)
        if file.suffix.lower() == ".txt":
            return [Unit(file, 0, file.stat().st_size)]
        return [Unit(file, group, group + 1) for group in range(parquet.row_groups(file, self.field))]

    def documents(self, unit: Unit) -> Iterator[RawDocument | Rejected]:
        readers: dict[str, Callable[[Unit], Iterator[tuple[str, Any]]]] = {
            ".txt": _whole_file,
            ".jsonl": self._json_values,
            ".parquet": lambda unit: parquet.rows(unit, self.field),
        }
        for where, value in readers[unit.path.suffix.lower()](unit):
            if isinstance(value, Rejected):
                yield value
            elif not isinstance(value, str):
                yield Rejected("no text", f"{self.field} is {type(value).__name__}, {where}")
            elif not value.strip():
                yield Rejected("empty text", where)
            else:
                yield RawDocument(where, (value,))

    def _json_values(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        for at, line in lines_of(unit):
            where = f"byte {at} of {unit.path}"
            entry = parse_json(line, where)
            yield where, entry.get(self.field) if isinstance(entry, dict) else entry

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", "files": [str(file) for file in self.files], "field": self.field}


def _whole_file(unit: Unit) -> Iterator[tuple[str, str | Rejected]]:
    where = str(unit.path)
    if unit.end > MAX_BYTES:
        yield where, Rejected("file too large", f"more than {MAX_BYTES} bytes, {where}")
        return
    try:
        yield where, unit.path.read_bytes().decode()
    except UnicodeDecodeError as error:
        yield where, Rejected("not UTF-8", f"{error.reason} at byte {error.start}, {where}")
