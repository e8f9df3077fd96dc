"""Parquet files give their texts, and name the rows and row groups that cannot be used."""

import os
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from build_cases import found_in, texts_of

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources import tables
from transfusion_fast.prepare.sources.text import TextSource


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.parquet"


def write_column(path, values, **options):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, **options)
    return path


def test_file_names_are_not_taken_for_uris(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("part:1.parquet", os.fsdecode(b"caf\xe9.parquet")):
        write_column(path, ["one"]).rename(name)
        assert texts_of([Path(name)]) == (["one"], {})


def test_rows_that_are_not_utf8_are_counted_and_others_read(path):
    offsets, content = np.array([0, 3, 5, 8], np.int32), b"one\xff\xfetwo"
    values = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(offsets), pyarrow.py_buffer(content))
    assert texts_of([write_column(path, values)]) == (["one", "two"], {"not UTF-8": 1})


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_strings_of_every_kind_are_read(path, kind):
    values = pyarrow.array(["one", None, "日本"])
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(getattr(pyarrow, kind)())
    assert texts_of([write_column(path, values)]) == (["one", "日本"], {"no text": 1})


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [{"x": "y"}], None], ids=str)
def test_a_file_without_a_column_of_strings_is_named_and_others_read(path, tmp_path, values):
    write_column(tmp_path / "b.parquet", ["b"])
    table = pyarrow.table({"other": ["a", "a"]} if values is None else {"text": values})
    pyarrow.parquet.write_table(table, path, row_group_size=1)
    rejected, good = found_in(TextSource.of([tmp_path]))
    assert good.parts == ("b",)
    assert re.fullmatch(rf"no text: .*column 'text' .* with --field, row group 0 of {path}", str(rejected))


def test_rows_and_row_groups_that_are_too_large_are_rejected(path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES", 1000)
    write_column(path, ["a" * 980, "b" * 1001, *["c"] * 9], use_dictionary=False)
    assert texts_of([path]) == (["a" * 980, *["c"] * 9], {"row too large": 1})
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", pytest.fail)
    assert texts_of([write_column(path, ["a" * 9000], compression="zstd")]) == ([], {"rows too large": 1})
    monkeypatch.setattr(tables, "_MAX_GROUP_BYTES", 1000)
    with pytest.raises(InputError, match=r"row group 0 of .*a.parquet must have at most 1000 bytes, got 9\d\d\d; "):
        texts_of([path])


def test_a_damaged_row_group_is_named_and_the_next_one_read(path):
    write_column(path, [f"row {n}" for n in range(300)], row_group_size=100, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    at = content.index(b"row 100") - 4
    content[at : at + 4] = b"\xff\xff\xff\x7f"  # the length of the second row group's first value
    path.write_bytes(content)
    [rejected] = [entry for entry in found_in(TextSource.of([path])) if isinstance(entry, Rejected)]
    assert rejected.reason == "parquet damaged" and f"row group 1 of {path}" in rejected.detail
    assert texts_of([path])[0] == [f"row {n}" for n in (*range(100), *range(200, 300))]


def test_a_row_group_of_no_rows_holds_nothing(path):
    assert texts_of([write_column(path, pyarrow.array([], pyarrow.string()))]) == ([], {})


def test_a_bit_flipped_in_the_values_is_never_raised(path):
    write_column(path, [f"row {n}" for n in range(8)], row_group_size=4)
    content, chosen, rejected = path.read_bytes(), np.random.default_rng(0), Counter()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in range(4, footer):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chosen.integers(8)]) + content[at + 1 :])
        rejected += texts_of([path])[1]
    assert rejected["parquet damaged"] and rejected["not UTF-8"]


@pytest.mark.parametrize("damage", ["names", "cut", "empty", "pickle"])
def test_a_damaged_file_is_counted_and_others_read(path, tmp_path, damage):
    content = write_column(path, ["a"]).read_bytes()
    write_column(tmp_path / "b.parquet", ["b"])
    damaged = {"names": content.replace(b"text", b"te\xff\xfe"), "cut": content[: len(content) // 2], "empty": b""}
    path.write_bytes(damaged.get(damage, pickle.dumps(print)))
    assert texts_of([tmp_path]) == (["b"], {"file damaged": 1})
