"""Records of files: objects of JSON, rows of tables, and rows of .csv and .tsv files."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from transfusion_fast.errors import Rejected, Remark
from transfusion_fast.prepare.sources.base import MAX_BYTES, Unit, decode_utf8, parse_json
from transfusion_fast.prepare.sources.files import COMPRESSIONS, kind_of
from transfusion_fast.prepare.sources.json_values import has_json_lines, read_values
from transfusion_fast.prepare.sources.lines import damage_in, line_units, open_decompressed, read_lines
from transfusion_fast.prepare.sources.tables import TABLES, Columns, read_rows, table_units


def _compressed(*kinds: str) -> tuple[str, ...]:
    return tuple(f"{kind}{compression}" for kind in kinds for compression in ("", *COMPRESSIONS))


JSON, CSV = _compressed(".jsonl", ".ndjson", ".json"), _compressed(".csv", ".tsv")
RECORDS = (*JSON, *CSV, *TABLES)
"""Kinds of files that hold records."""


def record_units(path: Path, columns: Columns) -> list[Unit]:
    """Return a file in units: 64 MiB of JSON lines, a row group of Parquet, else the whole file.

    InputError if a unit needs more memory than a process should take.
    """
    kind = kind_of(path)
    if kind in TABLES:
        return table_units(path, columns)
    units = line_units(path)
    whole = kind in CSV or (kind == ".json" and not has_json_lines(path))
    return [Unit(path, 0, sys.maxsize)] if whole and units else units


def read_records(unit: Unit, columns: Columns) -> Iterator[tuple[str, Any]]:
    """Yield (location, record) of each record that begins in a unit; it may be a Remark instead, and any JSON value."""
    kind = kind_of(unit.path)
    if kind in TABLES:
        yield from read_rows(unit, columns)
    elif kind in CSV:
        yield from _read_csv(unit.path)
    elif kind.startswith(".json") and not kind.startswith(".jsonl") and not has_json_lines(unit.path):
        yield from read_values(unit.path)
    else:
        for where, line in read_lines(unit):
            yield where, _parsed(line) if isinstance(line, bytes) else line


def lookup(record: Any, name: str) -> Any:
    """Return a field of a record, None if it has none. `a.b` is field b of object a, or of each object in list a."""
    if isinstance(record, list):
        objects = (element for element in record if isinstance(element, dict))
        return [value for element in objects if (value := lookup(element, name)) is not None] or None
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    return lookup(record[head], rest) if dot and head in record else None


def first_field(record: Any, names: Sequence[str]) -> Any:
    """Return the first of these fields that a record has, None if it has none."""
    return next((found for name in names if (found := lookup(record, name)) is not None), None)


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line)
    except Rejected as rejected:
        return rejected


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, str] | Remark]]:
    """Yield the rows of a file whose first row names the columns; Rejected for lines that are no row."""
    damage, trailing = damage_in(path)
    yield from damage
    if damage:
        return
    csv.field_size_limit(MAX_BYTES)  # its default of 128 KiB is too small for images as base64
    delimiter = "\t" if kind_of(path).startswith(".tsv") else ","
    with open_decompressed(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        for line, found in _csv_rows(_lines(text), delimiter):
            yield f"line {line} of {path}", found
    yield from trailing


def _csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, dict[str, str] | Rejected]]:
    """Yield (number of the first line, row) of each row but the first, whose values are the names of the columns."""
    # Strict, as a quote that is left open would otherwise make one value of the rows up to the next quote.
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:  # the next line begins a row
            yield line, Rejected("bad row", f"lines {line} to {rows.line_num} hold no row ({error})")
            names = names or []
            continue
        except Rejected as rejected:
            yield line, rejected
            return
        if row is None:
            return
        if names is None:
            names = row
            if len(row) == 1 and (other := re.search(r"[;|\t]", row[0])):
                yield line, Rejected("no columns", f"values must be separated by {delimiter!r}, got {other[0]!r}")
                return
        elif row:
            yield line, _named(row, names)


def _lines(text: IO[str]) -> Iterator[str]:
    """Yield the lines of a text; raise Rejected for one that should not be held in memory."""
    while line := text.readline(MAX_BYTES):
        if len(line) == MAX_BYTES:
            raise Rejected("line too long", f"more than {MAX_BYTES} characters; what follows is lost")
        yield line


def _named(row: list[str], names: list[str]) -> dict[str, str] | Rejected:
    if len(row) != len(names):
        return Rejected("bad row", f"it has {len(row)} values for {len(names)} columns")
    try:
        values = [decode_utf8(value.encode("utf-8", "surrogateescape")) for value in row]
    except Rejected as rejected:
        return rejected
    return dict(zip(names, values, strict=True))
