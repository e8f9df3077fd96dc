"""The texts of a column of Parquet files; a unit is a row group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES, Unit

_ROWS_TOGETHER = 16  # each may be large once it is decompressed
_MAX_GROUP_BYTES = 16 << 30


def row_groups(path: Path, name: str) -> int:
    """Of a file, one for a file that cannot be read.

    InputError where the column is not there, holds no texts, or is more than a process should read.
    """
    try:
        with _parquet(path) as table:
            _check_column(table, path, name)
            return table.num_row_groups
    except Rejected:  # once more when its rows are asked for
        return 1


def rows(unit: Unit, name: str) -> Iterator[tuple[str, str | Rejected | None]]:
    """(where, value) of each row; a row group that cannot be read is named once, and what follows in it is lost."""
    group = f"row group {unit.start} of {unit.path}"
    try:
        yield from _rows(unit, name, group)
    except Rejected as rejected:
        yield group, rejected


def _rows(unit: Unit, name: str, group: str) -> Iterator[tuple[str, str | Rejected | None]]:
    with _parquet(unit.path) as table:
        info = table.metadata.row_group(unit.start)
        if info.num_columns == 1 and info.total_byte_size > max(info.num_rows, 1) * MAX_BYTES:
            yield group, Rejected("rows too large", f"{info.total_byte_size} bytes in {info.num_rows} rows, {group}")
            return
        for row, value in enumerate(_column(table, unit.start, name)):
            where = f"row {row} of {group}"
            yield where, value.at(where) if isinstance(value, Rejected) else _decoded(value, where)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs the package pyarrow, which is missing; install it") from error
    try:
        # A name would be taken for a URI. With other settings a row group is in memory as a whole.
        with path.open("rb") as file, ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            yield table
    except (ArrowException, OSError, UnicodeDecodeError) as error:  # names in its schema need not be UTF-8
        if getattr(error, "errno", None):  # the disk's, not the file's
            raise
        reason = " ".join(str(error).split())
        raise Rejected("file damaged", f"it cannot be read as Parquet ({reason:.200}), {path}") from error


def _check_column(table: Any, path: Path, name: str) -> None:
    from pyarrow import types

    schema = table.schema_arrow
    if name not in schema.names:
        names = ", ".join(schema.names)
        raise InputError(f"column of {path} must be of {names}, got {name!r}; name one with --field")
    kind = schema.types[schema.names.index(name)]
    values = kind.value_type if types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    if not any(getattr(types, f"is_{test}")(values) for test in (*tests, "null")):
        raise InputError(f"column {name!r} of {path} must be of strings, got {kind}; name another with --field")
    for group in range(table.num_row_groups):
        # Of all columns: to ask a damaged file for the size of one can end the process.
        if (size := table.metadata.row_group(group).total_byte_size) > _MAX_GROUP_BYTES:
            raise InputError(
                f"row group {group} of {path} must have at most {_MAX_GROUP_BYTES} bytes, got {size}; "
                "write the file with smaller row groups"
            )


def _column(table: Any, group: int, name: str) -> Iterator[bytes | Rejected | None]:
    """The values of a column in a row group, in order, and at last what is wrong if there should be more.

    As bytes: a string of Arrow need not be UTF-8, and its size is known before it is copied.
    """
    import pyarrow
    from pyarrow import compute

    try:
        for batch in table.iter_batches(_ROWS_TOGETHER, row_groups=[group], columns=[name]):
            values = batch.column(0).cast(pyarrow.large_binary())
            for value, size in zip(values, compute.binary_length(values).to_pylist(), strict=True):
                too_large = size is not None and size > MAX_BYTES
                yield Rejected("row too large", f"{size} bytes") if too_large else value.as_py()
    except (pyarrow.ArrowException, OSError) as error:
        yield Rejected("parquet damaged", f"what follows is lost ({error})")


def _decoded(value: bytes | None, where: str) -> str | Rejected | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return Rejected("not UTF-8", f"{error.reason} at byte {error.start}, {where}")
