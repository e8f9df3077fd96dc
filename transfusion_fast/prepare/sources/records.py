"""Records of files: objects of JSON, rows of tables, and rows of .csv and .tsv files."""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES, Unit, decode_utf8, parse_json
from transfusion_fast.prepare.sources.files import COMPRESSIONS, kind_of
from transfusion_fast.prepare.sources.json_values import has_json_lines, read_values
from transfusion_fast.prepare.sources.lines import DECOMPRESSION_ERRORS, damage_in, line_units, opened, read_lines
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
        found = [value for element in record if (value := lookup(element, name)) is not None]
        return found or None
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    return lookup(record[head], rest) if dot and head in record else None


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line)
    except Rejected as rejected:
        return rejected


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, str] | Rejected]]:
    """Yield the rows of a file whose first row names the columns; Rejected once for what follows damage."""
    damage, _ = damage_in(path)
    if damage:
        yield f"byte 0 of {path}", Rejected("file damaged", f"nothing of it is used ({damage})")
        return
    csv.field_size_limit(MAX_BYTES)  # its default of 128 KiB is too small for images as base64
    with opened(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(text, delimiter="\t" if kind_of(path).startswith(".tsv") else ",")
        names: list[str] = []
        for number in itertools.count():
            where = f"row {number} of {path}"
            try:
                row = next(rows, None)
            except (csv.Error, *DECOMPRESSION_ERRORS) as error:
                if getattr(error, "errno", None):  # the disk's fault, not the file's
                    raise
                yield where, Rejected("csv damaged", f"what follows is lost ({error})")
                return
            if row is None:
                return
            if number == 0:
                names = row
            elif row:
                yield where, _named(row, names)


def _named(row: list[str], names: list[str]) -> dict[str, str] | Rejected:
    if len(row) != len(names):
        return Rejected("bad row", f"it has {len(row)} values for {len(names)} columns")
    try:
        values = [decode_utf8(value.encode("utf-8", "surrogateescape")) for value in row]
    except Rejected as rejected:
        return rejected
    return dict(zip(names, values, strict=True))
