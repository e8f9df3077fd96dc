"""The cache of shards keeps its bound, survives crashes, and replaces shards that become corrupt in it."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from functools import partial

import pytest
from remote_cases import assert_reads, at, lines_of, refusal, run_forked, shard_bytes

from transfusion_fast.data.folder import FetchError
from transfusion_fast.data.index import INDEX_NAME, file_sha256, parse_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import read_table


def test_the_cache_keeps_its_bound_and_the_shards_opened_last(source, tmp_path, fetches):
    size = shard_bytes(source)
    cache = tmp_path / "cache"
    for number in (0, 3, 6, 0, 9):  # of the shards 0, 1, 2, 0, 3
        PackReader(at(source, cache, 3 * size)).read(number)
        assert sum(path.stat().st_size for path in cache.iterdir()) <= 3 * size
        time.sleep(0.01)  # the clock of a file system may be coarse
    shards = parse_index(source).shards
    assert {path.name for path in cache.glob("*.tar")} == {f"{shards[number].sha256}.tar" for number in (2, 0, 3)}
    assert len(lines_of(fetches)) == 4


def test_an_evicted_shard_stays_readable_while_it_is_open_and_then_frees_its_disk_space(source, tmp_path):
    size = shard_bytes(source)
    reader, other = (PackReader(at(source, tmp_path / "cache", size)) for _ in range(2))
    assert_reads(reader, source, [0])
    assert_reads(other, source, [3])
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    before = len(os.listdir("/proc/self/fd"))
    assert_reads(reader, source, [1, 2])
    assert_reads(reader, source, [6])
    assert len(os.listdir("/proc/self/fd")) == before, "the evicted shard is still open"


def test_processes_that_want_one_shard_fetch_it_once(source, tmp_path, fetches):
    run_forked(*[lambda: assert_reads(PackReader(at(source, tmp_path / "cache")), source)] * 4)
    assert sorted(lines_of(fetches)) == [f"shard-{number:06d}.tar" for number in range(6)]


def test_processes_that_share_a_small_cache_wait_for_space(source, tmp_path):
    """Each wants another shard at a time, and the cache holds two."""
    size, cache = shard_bytes(source), tmp_path / "cache"

    def read(first):
        reader = PackReader(at(source, cache, 2 * size))
        for turn in range(8):
            assert_reads(reader, source, [3 * ((first + turn) % 6)])
            reader.close()

    run_forked(*(partial(read, first) for first in range(3)))
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 2 * size


# Fetches half of a shard and then waits to be killed.
KILLED = """
import sys, time
from fsspec.implementations.local import LocalFileSystem
from pathlib import Path
from transfusion_fast.data.folder import ShardCache, as_folder
from transfusion_fast.data.reader import PackReader

really_open = LocalFileSystem.open

class Half:
    def __init__(self, stream): self.stream, self.reads = stream, 0
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def read(self, size):
        self.reads += 1
        if self.reads == 2:
            print("half", flush=True)
            time.sleep(600)
        return self.stream.read(size // 2)

def opened(self, path, *arguments, **options):
    stream = really_open(self, path, *arguments, **options)
    return Half(stream) if path.endswith(".tar") else stream

LocalFileSystem.open = opened
PackReader(as_folder(sys.argv[1], ShardCache(Path(sys.argv[2]), int(sys.argv[3])))).read(0)
"""


def test_a_killed_fetch_leaves_no_shard_and_its_space_is_taken_by_the_next_one(source, tmp_path):
    size, cache = shard_bytes(source), tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, f"file://{source}", str(cache), str(size)]
    waiting = at(source, cache, size)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fetching:
        assert fetching.stdout.readline() == "half\n"
        (partial_file,) = cache.glob(".*.partial")
        # The cache holds one shard: another process waits for as long as the first lives.
        with pytest.raises(AssertionError, match="hangs"):
            run_forked(lambda: assert_reads(PackReader(waiting), source, [3]), timeout=0.7)
        assert partial_file.exists() and list(cache.glob("*.tar")) == []
        fetching.send_signal(signal.SIGKILL)
    assert partial_file.exists()
    run_forked(lambda: assert_reads(PackReader(waiting), source, [3, 0]), timeout=30)
    assert [path.name for path in cache.glob(".*")] == [".lock"]


@pytest.mark.parametrize("shards", [1, 1.5])
def test_a_fetch_does_not_wait_for_a_dead_one_of_the_same_shard(source, tmp_path, shards):
    cache, (first, *_) = tmp_path / "cache", parse_index(source).shards
    cache.mkdir()
    (cache / f".{first.sha256}.partial").write_bytes(b"x" * first.bytes)
    far = at(source, cache, int(shards * first.bytes))
    run_forked(lambda: assert_reads(PackReader(far), source, [0]), timeout=30)
    assert (cache / f"{first.sha256}.tar").read_bytes() == (source / first.file).read_bytes()


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_that_becomes_corrupt_in_the_cache_is_fetched_again_once(source, tmp_path, fetches, damage, opened):
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


def test_a_corrupt_shard_that_another_process_has_replaced_is_left_alone(source, tmp_path, fetches):
    far, shard = at(source, tmp_path / "cache"), parse_index(source).shards[0]
    reader = PackReader(far)
    assert_reads(reader, source, [0])
    kept = tmp_path / "cache" / f"{shard.sha256}.tar"
    os.truncate(kept, 0)
    assert_reads(PackReader(far), source, [0])
    replaced = kept.stat().st_ino
    assert_reads(reader, source, [0])
    assert kept.stat().st_ino == replaced and len(lines_of(fetches)) == 2


def test_a_corrupt_shard_whose_source_is_gone_does_not_count_as_damaged(folder, tmp_path):
    reader = PackReader(at(folder, tmp_path / "cache"))
    reader.read(0)
    (kept,) = (tmp_path / "cache").glob("*.tar")
    os.truncate(kept, 600)
    (folder / "shard-000000.tar").unlink()
    assert "must be fetched, got" in refusal(reader.read, 0, kind=FetchError)


def test_a_pack_that_differs_from_its_table_costs_no_other_pack_and_no_fetch(source, folder, tmp_path, fetches):
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
