"""Rows of tables: Parquet, and Arrow files as `datasets` caches and saves them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from transfusion_fast.errors import InputError, Rejected, optional_module
from transfusion_fast.prepare.sources.base import MAX_BYTES, Unit, decode_utf8
from transfusion_fast.prepare.sources.files import kind_of

TABLES = (".parquet", ".arrow")
Columns = Callable[[Any], Sequence[str]]
"""The names of the columns to read, of a pyarrow.Schema; Rejected if the table lacks what is needed."""
_ROWS_TOGETHER = 16  # few, as each row may be large once it is decompressed
_MAX_GROUP_BYTES = 16 << 30
_ARROW_FILE = b"ARROW1"  # the beginning of an Arrow file; a stream has none


def table_units(path: Path, columns: Columns) -> list[Unit]:
    """Return the row groups of a Parquet file; one unit for an Arrow file, and for a file that cannot be used.

    Raises:
        InputError: a row group is larger than a process should read.
    """
    if kind_of(path) == ".arrow":
        return [Unit(path, 0, sys.maxsize)]
    try:
        with _parquet(path) as table:
            columns(table.schema_arrow)
            _check_groups(table, path)
            return [Unit(path, group, group + 1) for group in range(table.num_row_groups)]
    except Rejected:  # which is reported when the file is read
        return [Unit(path, 0, 1)]


def read_rows(unit: Unit, columns: Columns) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """Yield the location and the chosen columns of each row; if the rest cannot be read, Rejected once.

    Strings become str, binary values bytes, and structures dictionaries.
    """
    if kind_of(unit.path) == ".arrow":
        batches, part = _arrow_batches(unit.path, columns), str(unit.path)
    else:
        batches, part = _parquet_batches(unit, columns), f"row group {unit.start} of {unit.path}"
    row = 0
    columns_read: dict[str, _Column] = {}
    try:
        for batch in batches:
            columns_read = columns_read or _Column.all_of(batch.schema)
            for value in _rows(batch, columns_read):
                yield f"row {row} of {part}", value
                row += 1
    except Rejected as rejected:
        yield part, rejected


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    arrow, parquet = (optional_module(name, "data") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        # A path may be taken for a URI, a stream may not. With other settings a whole row group is in memory.
        with path.open("rb") as file, parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            yield table
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names in the schema need not be UTF-8
        raise _damaged("Parquet", error) from error


def _damaged(kind: str, error: Exception) -> Rejected:
    if getattr(error, "errno", None):  # the disk's fault, not the file's
        raise error
    return Rejected("file damaged", f"it cannot be read as {kind} ({' '.join(str(error).split()):.200})")


def _check_groups(table: Any, path: Path) -> None:
    for group in range(table.num_row_groups):
        # The size of all columns: to ask a damaged file for the size of one can end the process.
        if (size := table.metadata.row_group(group).total_byte_size) > _MAX_GROUP_BYTES:
            raise InputError(
                f"row group {group} of {path} must have at most {_MAX_GROUP_BYTES} bytes, got {size}; "
                "write the file with smaller row groups"
            )


def _parquet_batches(unit: Unit, columns: Columns) -> Iterator[Any]:
    with _parquet(unit.path) as table:
        chosen = columns(table.schema_arrow)
        info = table.metadata.row_group(unit.start)
        if info.num_columns == 1 and info.total_byte_size > max(info.num_rows, 1) * MAX_BYTES:
            raise Rejected("rows too large", f"{info.total_byte_size} bytes in {info.num_rows} rows")
        import pyarrow

        try:
            yield from table.iter_batches(_ROWS_TOGETHER, row_groups=[unit.start], columns=chosen)
        except (pyarrow.ArrowException, OSError) as error:
            raise Rejected("parquet damaged", f"what follows is lost ({error})") from error


def _arrow_batches(path: Path, columns: Columns) -> Iterator[Any]:
    arrow, ipc = (optional_module(name, "data") for name in ("pyarrow", "pyarrow.ipc"))
    begun = False
    try:
        with path.open("rb") as file, _arrow_reader(ipc, file) as reader:
            chosen = columns(reader.schema)
            for number in range(getattr(reader, "num_record_batches", sys.maxsize)):
                try:
                    batch = reader.get_batch(number) if hasattr(reader, "get_batch") else reader.read_next_batch()
                except StopIteration:
                    return
                batch.validate(full=True)  # reading values behind damaged offsets can end the process
                # By position, as names may be repeated.
                chosen_batch = batch.select([reader.schema.names.index(name) for name in chosen])
                begun = True
                for start in range(0, batch.num_rows, _ROWS_TOGETHER):
                    yield chosen_batch.slice(start, _ROWS_TOGETHER)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        damaged = _damaged("Arrow", error)
        raise Rejected("arrow damaged", f"what follows is lost ({error})") if begun else damaged from error


def _arrow_reader(ipc: Any, file: IO[bytes]) -> Any:
    """Return a reader of either form of Arrow files: with a table of batches at the end, or a stream."""
    begin = file.read(len(_ARROW_FILE))
    file.seek(0)
    return ipc.open_file(file) if begin == _ARROW_FILE else ipc.open_stream(file)


class _Column(NamedTuple):
    """How the values of a column are read. Strings are read as bytes, as those of Arrow need not be UTF-8."""

    number: int
    bytes_type: Any
    decode: Callable[[Any], Any]

    @classmethod
    def all_of(cls, schema: Any) -> dict[str, _Column]:
        """Return the columns by name, of which a file may have several: then the first."""
        types = {name: (schema.names.index(name), column_type(schema, name)) for name in schema.names}
        return {name: cls(number, _bytes_type(kind), _decoder(kind)) for name, (number, kind) in types.items()}


def _rows(batch: Any, columns: dict[str, _Column]) -> Iterator[dict[str, Any] | Rejected]:
    """Yield the rows of a batch; raise Rejected for columns that pyarrow cannot convert."""
    try:
        values = {name: batch.column(column.number).cast(column.bytes_type) for name, column in columns.items()}
    except optional_module("pyarrow", "data").ArrowException as error:  # such as a dictionary of structures
        raise Rejected("columns unreadable", f"what follows is lost ({error})") from error
    large = sum(column.nbytes for column in values.values()) > MAX_BYTES
    for row in range(batch.num_rows):
        size = sum(column.slice(row, 1).nbytes for column in values.values()) if large else 0
        if size > MAX_BYTES:
            yield Rejected("row too large", f"{size} bytes")
            continue
        try:
            yield {name: columns[name].decode(own[row].as_py()) for name, own in values.items()}
        except Rejected as rejected:
            yield rejected
        except (ValueError, ArithmeticError) as error:  # such as a time that Python cannot represent
            yield Rejected("row unreadable", str(error))


def column_type(schema: Any, name: str) -> Any:
    """Return the type of the first column of a name, of which a file may have several."""
    return schema.types[schema.names.index(name)]


def is_string(kind: Any) -> bool:
    """Return whether a pyarrow.DataType is one of text."""
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _bytes_type(kind: Any) -> Any:
    """Return the type with binary values in place of strings, and with plain values in place of a dictionary's."""
    import pyarrow
    from pyarrow import types

    if is_string(kind):
        return pyarrow.large_binary()
    if types.is_dictionary(kind):
        return _bytes_type(kind.value_type)
    if _is_list(kind):
        return pyarrow.large_list(_bytes_type(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    return kind


def _decoder(kind: Any) -> Callable[[Any], Any]:
    """Return a function from values that were read as `_bytes_type(kind)` to values with strings.

    It raises Rejected for a string that is not UTF-8.
    """
    from pyarrow import types

    if types.is_dictionary(kind):
        return _decoder(kind.value_type)
    if is_string(kind):
        of: Callable[[Any], Any] = decode_utf8
    elif _is_list(kind):
        element = _decoder(kind.value_type)
        of = lambda values: list(map(element, values))  # noqa: E731
    elif types.is_struct(kind):
        fields = {field.name: _decoder(field.type) for field in kind}
        of = lambda value: {name: decode(value[name]) for name, decode in fields.items()}  # noqa: E731
    else:
        return lambda value: value
    return lambda value: None if value is None else of(value)
