"""The cache of shards: it keeps its bound and outlives crashes, and what rots in it is fetched again."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from remote_cases import FORK, assert_reads, at, lines_of, log_fetches, refusal, shard_bytes, write_source

from transfusion_fast.data import folder as remote
from transfusion_fast.data.folder import FetchError
from transfusion_fast.data.index import INDEX_NAME, file_sha256, parse_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import read_table


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "packs")


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(source, tmp_path / "far")
    return tmp_path / "far"


@pytest.fixture
def fetches(tmp_path, monkeypatch) -> Path:
    return log_fetches(tmp_path / "fetches", monkeypatch)


def test_the_cache_keeps_its_bound_and_what_was_opened_last(source, tmp_path, fetches):
    size = shard_bytes(source)
    cache = tmp_path / "cache"
    for number in (0, 3, 6, 0, 9):  # of the shards 0, 1, 2, 0, 3
        PackReader(at(source, cache, 3 * size)).read(number)
        assert sum(path.stat().st_size for path in cache.iterdir()) <= 3 * size
        time.sleep(0.01)  # the clock of a file system may tick slowly
    shards = parse_index(source).shards
    assert {path.name for path in cache.glob("*.tar")} == {f"{shards[number].sha256}.tar" for number in (2, 0, 3)}
    assert len(lines_of(fetches)) == 4


def test_a_shard_that_is_removed_stays_readable_where_it_is_open_and_gives_its_disk_back(source, tmp_path):
    size = shard_bytes(source)
    reader, other = (PackReader(at(source, tmp_path / "cache", size)) for _ in range(2))
    assert_reads(reader, source, [0])
    assert_reads(other, source, [3])
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    assert_reads(reader, source, [1, 2])
    assert_reads(reader, source, [6])
    assert len(reader._open) == 1


def test_processes_that_want_one_shard_fetch_it_once(source, tmp_path, fetches):
    barrier = FORK.Barrier(4)

    def read():
        barrier.wait()
        assert_reads(PackReader(at(source, tmp_path / "cache")), source)

    readers = [FORK.Process(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert sorted(lines_of(fetches)) == [f"shard-{number:06d}.tar" for number in range(6)]


def test_processes_that_crowd_a_small_cache_wait_for_room(source, tmp_path):
    """Each wants another shard at a time, and the cache has room for two."""
    size, cache = shard_bytes(source), tmp_path / "cache"

    def read(first):
        reader = PackReader(at(source, cache, 2 * size))
        for turn in range(12):
            number = 3 * ((first + turn) % 6)
            assert_reads(reader, source, [number])
            reader.close()

    readers = [FORK.Process(target=read, args=(first,)) for first in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=60)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 2 * size


KILLED = """
import sys, time
from pathlib import Path
from transfusion_fast.data import folder as remote
from transfusion_fast.data.reader import PackReader

copy = remote._copy
def half(url, stream, most):
    stream.write(b"x" * (most // 2))
    stream.flush()
    print("half", flush=True)
    time.sleep(600)
remote._copy = half
PackReader(remote.data_folder(sys.argv[1], remote.ShardCache(Path(sys.argv[2]), int(sys.argv[3])))).read(0)
"""


def test_a_fetch_that_is_killed_leaves_no_shard_and_is_cleaned_up_by_the_next(source, tmp_path):
    size, cache = shard_bytes(source), tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, f"file://{source}", str(cache), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fetching:
        assert fetching.stdout.readline() == "half\n"
        (unfinished,) = cache.glob(".*.partial")
        assert list(cache.glob("*.tar")) == []
        remote._remove_if_stale(unfinished)
        assert unfinished.exists(), "its process lives"
        fetching.send_signal(signal.SIGKILL)
    assert unfinished.exists() and list(cache.glob("*.tar")) == []
    # There is room for one shard: another one needs what the dead process had taken.
    reader = FORK.Process(target=assert_reads, args=(PackReader(at(source, cache, size)), source, [3, 0]), daemon=True)
    reader.start()
    reader.join(timeout=30)
    assert reader.exitcode == 0, "it waits for room for ever"
    assert list(cache.glob(".*.partial")) == []


@pytest.mark.parametrize("shards", [1, 1.5])
def test_a_fetch_after_one_of_the_same_shard_that_was_killed_does_not_wait_for_it(source, tmp_path, shards):
    cache, (first, *_) = tmp_path / "cache", parse_index(source).shards
    cache.mkdir()
    (cache / f".{first.sha256}.partial").write_bytes(b"x" * first.bytes)
    far = at(source, cache, int(shards * first.bytes))
    reader = FORK.Process(target=assert_reads, args=(PackReader(far), source, [0]), daemon=True)
    reader.start()
    reader.join(timeout=30)
    assert reader.exitcode == 0, "it waits for room for ever"
    assert (cache / f"{first.sha256}.tar").read_bytes() == (source / first.file).read_bytes()


def test_what_an_attempt_brought_too_much_is_not_kept(source, tmp_path, monkeypatch):
    opened, turns = remote._open_url, []

    def longer(url):
        if not url.endswith(".tar") or turns:
            return opened(url)
        turns.append(url)
        return io.BytesIO((source / url.rpartition("/")[2]).read_bytes() + b"more")

    monkeypatch.setattr(remote, "_open_url", longer)
    assert_reads(PackReader(at(source, tmp_path / "cache")), source, [0])
    (kept,) = (tmp_path / "cache").glob("*.tar")
    assert file_sha256(kept) == kept.stem


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_that_rots_in_the_cache_is_fetched_again_once(source, tmp_path, fetches, damage, opened):
    far, shard = at(source, tmp_path / "cache"), parse_index(source).shards[1]
    reader = PackReader(far)
    assert_reads(reader, source, [3])
    kept = tmp_path / "cache" / f"{shard.sha256}.tar"
    content = bytearray(kept.read_bytes())
    content[read_table(source / shard.file).span(2)[0] - 700] ^= 1
    kept.write_bytes({"flipped": content, "cut": content[:700], "emptied": b""}[damage])
    reader = reader if opened else PackReader(far)
    assert_reads(reader, source, [4, 3, 5])
    assert file_sha256(kept) == shard.sha256 and lines_of(fetches) == [shard.file] * 2
    assert_reads(PackReader(far), source, [4])
    assert lines_of(fetches) == [shard.file] * 2


def test_a_rotten_shard_that_another_process_has_replaced_is_left_to_it(source, tmp_path, fetches):
    far, shard = at(source, tmp_path / "cache"), parse_index(source).shards[0]
    reader = PackReader(far)
    assert_reads(reader, source, [0])
    kept = tmp_path / "cache" / f"{shard.sha256}.tar"
    os.truncate(kept, 0)
    assert_reads(PackReader(far), source, [0])
    replaced = kept.stat().st_ino
    assert_reads(reader, source, [0])
    assert kept.stat().st_ino == replaced and len(lines_of(fetches)) == 2


def test_a_rotten_shard_whose_source_is_gone_is_no_damaged_data(folder, tmp_path):
    reader = PackReader(at(folder, tmp_path / "cache"))
    reader.read(0)
    (kept,) = (tmp_path / "cache").glob("*.tar")
    os.truncate(kept, 600)
    (folder / "shard-000000.tar").unlink()
    assert "must be fetched, and cannot be" in refusal(reader.read, 0, kind=FetchError)


def test_a_pack_that_is_not_as_its_table_says_costs_no_other_and_no_fetch(source, folder, tmp_path, fetches):
    shard = parse_index(folder).shards[0]
    content = bytearray((folder / shard.file).read_bytes())
    content[shard.table + 512 + 32 + 16 + 8] ^= 1  # the second pack's checksum
    (folder / shard.file).write_bytes(content)
    entry, (start, end) = json.loads((folder / INDEX_NAME).read_text()), shard.table_span
    entry["shards"][0] |= {
        "sha256": file_sha256(folder / shard.file),
        "table_crc32": zlib.crc32(content[start:end]),
    }
    (folder / INDEX_NAME).write_text(json.dumps(entry))
    reader = PackReader(at(folder, tmp_path / "cache"))
    for _ in range(2):
        assert "checksum of its bytes" in refusal(reader.read, 1)
        assert_reads(reader, source, [0, 2])
    assert lines_of(fetches) == ["shard-000000.tar"]
