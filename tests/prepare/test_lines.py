"""Lines of files: each is read once, however the file is cut or compressed, and damage is named."""

import bz2
import gzip
import io
import json
import lzma
import os

import pyarrow
import pytest
from build_cases import found_in
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.errors import InputError, Rejected, Repaired
from transfusion_fast.prepare.sources import lines as reading
from transfusion_fast.prepare.sources.lines import UNIT_BYTES, line_units, read_lines
from transfusion_fast.prepare.sources.text import TextSource

LINES = [json.dumps({"text": f"line {number} " + "of text " * (number % 50)}).encode() for number in range(4000)]
CONTENT = b"\n".join(LINES) + b"\n"
COMPRESS = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
COMPRESSIONS = list(COMPRESS)[1:]


def lines_in(path, content=None, size=UNIT_BYTES):
    """The lines of a file, whose places are checked if its decompressed content is given."""
    found = [entry for unit in line_units(path, size) for entry in read_lines(unit)]
    if content is not None:
        assert all(content[int(where.split()[1]) :].startswith(line) for where, line in found)
    return [line for _, line in found]


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=9))
def test_every_line_is_in_one_unit_wherever_the_file_is_cut(tmp_path_factory, lines):
    path, content = tmp_path_factory.mktemp("lines") / "a.jsonl", b"\n".join(lines)
    path.write_bytes(content)
    for size in (1, 2, 3, 7, 1000):
        assert lines_in(path, content, size) == [line for line in lines if line.strip()]


@pytest.mark.parametrize("compression", COMPRESS)
def test_an_endless_line_is_not_read_into_memory(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](bytes(100_000) + b"\nnext\n"))
    first, second = lines_in(path)
    assert isinstance(first, Rejected) and first.reason == "line too long" and second == b"next"


def test_a_line_across_many_units_is_not_read_by_each_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 10_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 1_000_000 + b"\nnext\n")
    read_bytes = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            read_bytes.append(super().readinto(buffer))
            return read_bytes[-1]

    monkeypatch.setattr(type(path), "open", lambda self, mode: io.BufferedReader(Counted(self, mode)))
    first, second = lines_in(path, size=10_000)
    assert isinstance(first, Rejected) and second == b"next"
    assert sum(read_bytes) < 4_000_000


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("cuts", [[0], [0, 1000, 7777]])
def test_compressed_lines_equal_plain_ones(tmp_path, compression, cuts):
    """In one piece and in several one after another, as tools that compress in parallel write them."""
    path = tmp_path / f"a.jsonl{compression}"
    pieces = [CONTENT[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]
    path.write_bytes(b"".join(map(COMPRESS[compression], pieces)))
    assert len(line_units(path)) == 1
    assert lines_in(path, CONTENT) == LINES


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut", "next is cut", "something else", "nothing"])
def test_nothing_is_read_of_a_compressed_file_that_is_damaged(tmp_path, compression, damage):
    path = tmp_path / f"a.jsonl{compression}"
    whole = COMPRESS[compression](CONTENT)
    half = whole[: len(whole) // 2]
    damaged = {"cut": half, "next is cut": whole + half, "nothing": b""}
    path.write_bytes(damaged.get(damage, b"something else"))
    [found] = found_in(TextSource.of([path]))
    assert isinstance(found, Rejected) and found.reason == "file damaged" and str(path) in str(found)


@pytest.mark.parametrize("trailing", [b"something else", bytes(600) + b"x", b"\x1f"])
@pytest.mark.parametrize("ending", [b"\n", b""])
def test_bytes_behind_the_data_of_a_gzip_file_are_ignored_and_counted(tmp_path, trailing, ending):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(CONTENT) + gzip.compress(b'"the last"' + ending) + trailing)
    *lines, remark = [entry for _, entry in read_lines(line_units(path)[0])]
    assert lines == [*LINES, b'"the last"'] and isinstance(remark, Repaired)
    path.write_bytes(gzip.compress(CONTENT) + bytes(600))  # which pads tapes
    assert lines_in(path) == LINES


@pytest.mark.parametrize("compression", [".bz2", ".xz"])
def test_what_follows_streams_is_never_ignored_in_silence(tmp_path, compression):
    """`bz2` and `lzma` end without an error where a later stream is damaged, and at zeros, which pad .xz files."""
    path, compress = tmp_path / f"a.jsonl{compression}", COMPRESS[compression]
    first, second = compress(b"1\n2\n"), compress(b"3\n")
    path.write_bytes(first + b"?" + second[1:])
    *lines, remark = lines_in(path)
    assert lines == [b"1", b"2"] and isinstance(remark, Repaired)
    path.write_bytes(first + second[:-1])
    [damage] = lines_in(path)
    assert isinstance(damage, Rejected)
    for padding in (4, 9000):
        path.write_bytes(first + bytes(padding) + second + bytes(padding))
        assert lines_in(path) == [b"1", b"2", b"3"]


def test_a_failing_disk_is_not_reported_as_a_damaged_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(CONTENT))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gzip.GzipFile, "read1", fail)
    with pytest.raises(OSError, match="Input/output error"):
        lines_in(path)


def test_files_are_recognized_by_their_suffixes(tmp_path):
    read = ["b.jsonl", "c.v2.JSONL.GZ", "d.json.zst", "e.ndjson.xz", "f.csv.bz2", "g.tsv", "h.arrow"]
    read.append("i.json")
    for name in (*read, "f.gz", "g.txt.gz", "00000_stats.json", "dataset_info.json", "state.json"):
        (tmp_path / name).write_bytes(b"")
    source = TextSource.of([tmp_path])
    assert [file.name for file in source.files] == read
    assert not source.passed_over
    assert TextSource.of([tmp_path / "state.json"]).files == (tmp_path / "state.json",)


def test_a_file_with_a_window_beyond_the_limit_is_refused(tmp_path):
    """`zstd --long=31` writes such files."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\xa8" + ((2 << 3) | 1).to_bytes(3, "little") + b"5\n"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frame)
    with pytest.raises(InputError, match=r"a.jsonl.zst must be compressed without --long"):
        TextSource.of([path]).units()
    path.write_bytes(frame.replace(b"\xa8", b"\x50"))  # a window of 1 MB
    assert lines_in(path.rename(tmp_path / os.fsdecode(b"caf\xe9.jsonl.zst"))) == [b"5"]


def test_an_xz_file_that_needs_much_memory_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    path.write_bytes(lzma.compress(b"5\n", filters=filters))
    with pytest.raises(InputError, match=r"a.jsonl.xz must be compressed without --long"):
        TextSource.of([path]).units()
