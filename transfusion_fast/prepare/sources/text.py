"""Text documents: JSON lines, plain text files, Parquet."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transfusion_fast.errors import InputError, Rejected, Remark, optional_module
from transfusion_fast.prepare.sources.base import MAX_BYTES, Source, TextRange, Unit, decode_utf8, kind_of, parse_json
from transfusion_fast.prepare.sources.lines import (
    JSON_LINES,
    LONG_BYTES,
    line_units,
    read_lines,
    read_separated,
    separated_units,
)

FILES_TOGETHER = 256
"""Most .txt files in a unit."""
_ROWS_TOGETHER = 16  # few, as each row may be large once it is decompressed
_MAX_GROUP_BYTES = 16 << 30
_STRINGS = (
    "string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary", "null",
)  # fmt: skip


class _Row(NamedTuple):
    """A row of Parquet: bytes of its text, or None, and the fields that filters look at."""

    text: bytes | None
    fields: dict[str, Any]


@dataclass(frozen=True)
class TextSource(Source):
    """The texts of files: one per line of JSON lines and per row of .parquet, under `field`, and one per .txt."""

    field: str = "text"
    separator: bytes = b""
    """Bytes between the texts of a .txt file; empty if each file is one text."""

    suffixes = (*JSON_LINES, ".txt", ".parquet")

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        for number, file in enumerate(self.files):
            last = units[-1] if units else None
            match kind_of(file):
                case ".parquet":
                    units += _row_groups(file, self.field)
                case ".txt" if self.separator:
                    units += separated_units(file, self.separator)
                case ".txt":
                    if last and kind_of(last.path) == ".txt" and last.end == number < last.start + FILES_TOGETHER:
                        units[-1] = replace(last, end=number + 1)
                    else:
                        units.append(Unit(file, number, number + 1))
                case _:
                    units += line_units(file)
        return units

    def spans(self, unit: Unit) -> list[tuple[Path, int, int]]:
        match kind_of(unit.path):
            case ".txt" if not self.separator:
                return [(file, 0, sys.maxsize) for file in self.files[unit.start : unit.end]]
            case ".parquet":  # its units are row groups
                return [(unit.path, 0, sys.maxsize)] if unit.start == 0 else []
            case _:
                return super().spans(unit)

    def entries(self, unit: Unit) -> Iterator[tuple[str, bytes | TextRange | _Row | Remark]]:
        match kind_of(unit.path):
            case ".txt" if self.separator:
                yield from read_separated(unit, self.separator)
            case ".txt":
                for file in self.files[unit.start : unit.end]:
                    size = file.stat().st_size
                    yield str(file), file.read_bytes() if size <= LONG_BYTES else TextRange(file, 0, size)
            case ".parquet":
                yield from _read_rows(unit, self.field, self.fields)
            case _:
                yield from read_lines(unit)

    def parts(self, entry: bytes | TextRange | _Row, unit: Unit) -> tuple[str | TextRange]:
        if isinstance(entry, TextRange):
            return (entry,)
        if isinstance(entry, _Row):
            value: Any = None if entry.text is None else decode_utf8(entry.text)
        elif kind_of(unit.path) == ".txt":
            value = decode_utf8(entry, "utf-8-sig")
        else:
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

    def record(self, entry: bytes | TextRange | _Row, unit: Unit) -> Any:
        if isinstance(entry, _Row):
            return entry.fields
        return None if kind_of(unit.path) == ".txt" else parse_json(entry)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", "field": self.field, "separator": os.fsdecode(self.separator)}


def _row_groups(path: Path, column: str) -> list[Unit]:
    """Return the row groups of a file; one for a file that cannot be used, which is reported when it is read.

    Raises:
        InputError: a row group is larger than a process should read.
    """
    try:
        with _parquet(path) as table:
            _check_column(table, column)
            _check_groups(table, path)
            return [Unit(path, group, group + 1) for group in range(table.num_row_groups)]
    except Rejected:
        return [Unit(path, 0, 1)]


def _read_rows(unit: Unit, column: str, fields: Sequence[str]) -> Iterator[tuple[str, _Row | Rejected]]:
    """Yield the place and the values of each row; if the rest of a row group cannot be read, Rejected once."""
    group = f"row group {unit.start} of {unit.path}"
    try:
        with _parquet(unit.path) as table:
            _check_column(table, column)
            info = table.metadata.row_group(unit.start)
            if info.num_columns == 1 and info.total_byte_size > max(info.num_rows, 1) * MAX_BYTES:
                raise Rejected("rows too large", f"{info.total_byte_size} bytes in {info.num_rows} rows")
            for row, value in enumerate(_values(table, unit.start, column, fields)):
                yield f"row {row} of {group}", value
    except Rejected as rejected:
        yield group, rejected


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    arrow, parquet = (optional_module(name, "data") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        # A path may be taken for a URI, a stream may not. With other settings a whole row group is in memory.
        with path.open("rb") as file, parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            yield table
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names in the schema need not be UTF-8
        if getattr(error, "errno", None):  # the disk's fault, not the file's
            raise
        raise Rejected("file damaged", f"it cannot be read as Parquet ({' '.join(str(error).split()):.200})") from error


def _check_column(table: Any, name: str) -> None:
    schema = table.schema_arrow
    if name not in schema.names:
        names = ", ".join(schema.names)
        raise Rejected("no text", f"no column {name!r} among {names!r:.200}; name one with --field")
    kind = schema.types[schema.names.index(name)]
    values = kind.value_type if str(kind).startswith("dictionary") else kind
    if str(values).partition("[")[0] not in _STRINGS:
        raise Rejected("no text", f"column {name!r} is of {kind!s:.80}; name one of strings with --field")


def _check_groups(table: Any, path: Path) -> None:
    for group in range(table.num_row_groups):
        # The size of all columns: to ask a damaged file for the size of one can end the process.
        if (size := table.metadata.row_group(group).total_byte_size) > _MAX_GROUP_BYTES:
            raise InputError(
                f"row group {group} of {path} must have at most {_MAX_GROUP_BYTES} bytes, got {size}; "
                "write the file with smaller row groups"
            )


def _values(table: Any, group: int, name: str, fields: Sequence[str]) -> Iterator[_Row | Rejected]:
    """Yield the rows of a row group, and at the end what is wrong if there should be more. Other columns are not read.

    Texts are bytes: a string of Arrow need not be UTF-8, and the size of bytes is known before they are copied.
    """
    import pyarrow
    from pyarrow import compute

    try:
        known = [field for field in fields if field in table.schema_arrow.names]
        for batch in table.iter_batches(_ROWS_TOGETHER, row_groups=[group], columns=list({name, *known})):
            columns = dict(
                zip(reversed(batch.schema.names), reversed(batch.columns), strict=True)
            )  # the first of a name
            values = columns[name].cast(pyarrow.large_binary())
            for row, size in enumerate(compute.binary_length(values).to_pylist()):
                if size is not None and size > MAX_BYTES:
                    yield Rejected("row too large", f"{size} bytes")
                else:
                    found = {field: _field(columns[field][row]) for field in known}
                    yield _Row(values[row].as_py(), found)
    except (pyarrow.ArrowException, OSError) as error:
        yield Rejected("parquet damaged", f"what follows is lost ({error})")


def _field(value: Any) -> Any:
    """Return a value of Arrow; None if Python has none for it, such as for a string that is not UTF-8."""
    try:
        return value.as_py()
    except (ValueError, ArithmeticError):
        return None
