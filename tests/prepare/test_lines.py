"""Lines of files: each is read once, however the file is cut or compressed, and damage is named."""

import gzip
import io
import json
import os

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources import lines as reading
from transfusion_fast.prepare.sources.lines import line_units, read_lines
from transfusion_fast.prepare.sources.text import TextSource

LINES = [json.dumps({"text": f"line {number} " + "of text " * (number % 50)}).encode() for number in range(4000)]
CONTENT = b"\n".join(LINES) + b"\n"


def zstandard(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


COMPRESS = {".gz": gzip.compress, ".zst": zstandard}


def lines_in(path):
    return [line for unit in line_units(path) for _, line in read_lines(unit)]


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=9))
def test_every_line_is_in_one_unit_wherever_the_file_is_cut(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    content = path.read_bytes()
    expected = [line for line in content.split(b"\n") if line.strip()]
    for size in (1, 2, 3, 7, 1000):
        found = [line for unit in line_units(path, size) for line in read_lines(unit)]
        assert [line for _, line in found] == expected
        assert all(content[at:].startswith(line) for at, line in found)


def test_an_endless_line_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 40)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 99}) + '\n{"text": "next"}\n', encoding="utf-8")
    first, second = (line for unit in line_units(tmp_path / "a.jsonl") for _, line in read_lines(unit))
    assert isinstance(first, Rejected) and first.reason == "line too long"
    assert second == b'{"text": "next"}'


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
    found = [line for unit in line_units(path, 10_000) for _, line in read_lines(unit)]
    assert isinstance(found[0], Rejected) and found[1:] == [b"next"]
    assert sum(read_bytes) < 4_000_000


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_lines_equal_plain_ones(tmp_path, compression):
    """In one piece and in several one after another, as tools that compress in parallel write them."""
    for name, cuts in (("one", [0]), ("several", [0, 1000, 7777])):
        path = tmp_path / f"{name}.jsonl{compression}"
        pieces = [CONTENT[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]
        path.write_bytes(b"".join(map(COMPRESS[compression], pieces)))
        [unit] = line_units(path)
        found = list(read_lines(unit))
        assert [line for _, line in found] == LINES
        assert all(CONTENT[at:].startswith(line) for at, line in found)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "followed by something else", "something else", "nothing"])
def test_nothing_is_read_of_a_compressed_file_that_is_damaged(tmp_path, compression, damage):
    path = tmp_path / f"a.jsonl{compression}"
    whole = COMPRESS[compression](CONTENT)
    half = len(whole) // 2
    damaged = {
        "cut": whole[:half],
        "followed by something else": whole + b"something else",
        "something else": b"something else",
        "nothing": b"",
    }
    path.write_bytes(damaged[damage])
    source = TextSource.of([path])
    [found] = [document for unit in source.units() for document in source.documents(unit)]
    assert isinstance(found, Rejected) and found.reason == "file damaged" and str(path) in str(found)


def test_a_flipped_bit_anywhere_in_a_file_with_a_checksum_is_found(tmp_path):
    path, whole = tmp_path / "a.jsonl.gz", gzip.compress(CONTENT, mtime=0)
    for at in range(10, len(whole), len(whole) // 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        [found] = lines_in(path)
        assert isinstance(found, Rejected)


def test_an_endless_compressed_line_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    for compression, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl{compression}"
        path.write_bytes(compress(bytes(100_000) + b"\nnext\n"))
        first, second = lines_in(path)
        assert isinstance(first, Rejected) and first.reason == "line too long" and second == b"next"


def test_a_failing_disk_is_not_reported_as_a_damaged_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(CONTENT))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gzip.GzipFile, "read1", fail)
    monkeypatch.setattr(gzip.GzipFile, "readinto", fail)
    with pytest.raises(OSError, match="Input/output error"):
        lines_in(path)


def test_files_are_recognized_by_their_suffixes(tmp_path):
    for name in ("b.jsonl", "c.v2.JSONL.GZ", "d.json.zst", "e.json", "f.gz", "g.txt.gz"):
        (tmp_path / name).write_bytes(b"")
    assert [os.path.basename(file) for file in TextSource.of([tmp_path]).files] == [
        "b.jsonl",
        "c.v2.JSONL.GZ",
        "d.json.zst",
    ]


def test_a_file_with_a_window_beyond_the_limit_is_refused(tmp_path):
    """`zstd --long=31` writes such files."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\xa8" + ((2 << 3) | 1).to_bytes(3, "little") + b"5\n"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frame)
    with pytest.raises(InputError, match=r"a.jsonl.zst must be compressed without --long"):
        TextSource.of([path]).units()
    path.write_bytes(frame.replace(b"\xa8", b"\x50"))  # a window of 1 MB
    assert lines_in(path) == [b"5"]
    assert lines_in(path.rename(tmp_path / os.fsdecode(b"caf\xe9.jsonl.zst"))) == [b"5"]
