"""The cache of shards keeps its bound, survives crashes, and replaces shards that become corrupt in it."""

import os
import time
from functools import partial

import pytest
from remote_cases import FORK, assert_reads, at, intercept_fetches, refusal, run_forked
from shard_damage import change_table

from transfusion_fast.data.folder import FetchError
from transfusion_fast.data.index import file_sha256, parse_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import read_table


@pytest.fixture
def size(source):
    (size,) = {shard.bytes for shard in parse_index(source).shards}
    return size


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_the_cache_keeps_its_bound_and_the_shards_opened_last(source, cache, size, fetches):
    for number in (0, 3, 6, 0, 9):  # of the shards 0, 1, 2, 0, 3
        PackReader(at(source, cache, 3 * size)).read(number)
        assert sum(path.stat().st_size for path in cache.iterdir()) <= 3 * size
        time.sleep(0.01)  # the clock of a file system may be coarse
    shards = parse_index(source).shards
    assert {path.name for path in cache.glob("*.tar")} == {f"{shards[number].sha256}.tar" for number in (2, 0, 3)}
    assert len(fetches()) == 4


def test_an_evicted_shard_stays_readable_while_it_is_open_and_then_frees_its_disk_space(source, cache, size):
    reader, other = (PackReader(at(source, cache, size)) for _ in range(2))
    assert_reads(reader, source, [0])
    assert_reads(other, source, [3])
    assert len(list(cache.glob("*.tar"))) == 1
    before = len(os.listdir("/proc/self/fd"))
    assert_reads(reader, source, [1, 2])
    assert_reads(reader, source, [6])
    assert len(os.listdir("/proc/self/fd")) == before, "the evicted shard is still open"


def test_processes_that_want_one_shard_fetch_it_once(source, cache, fetches):
    run_forked(*[lambda: assert_reads(PackReader(at(source, cache)), source)] * 4)
    assert sorted(fetches()) == [f"shard-{number:06d}.tar" for number in range(6)]


def test_processes_that_share_a_small_cache_wait_for_space(source, cache, size):
    """Each wants another shard at a time, and the cache holds two."""

    def read(first):
        reader = PackReader(at(source, cache, 2 * size))
        for turn in range(8):
            assert_reads(reader, source, [3 * ((first + turn) % 6)])
            reader.close()

    run_forked(*(partial(read, first) for first in range(3)))
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 2 * size


@pytest.mark.parametrize("following", [[3, 0], [0, 3]], ids=["another shard", "the same shard"])
def test_a_killed_fetch_leaves_no_shard_and_its_space_is_taken_by_the_next_one(source, cache, size, following):
    waiting, half = at(source, cache, size), FORK.Event()

    def fetch(name, really_open):
        stream = really_open()

        def read(size, really_read=stream.read):
            if stream.tell():
                half.set()
                time.sleep(600)
            return really_read(size // 2)

        stream.read = read
        return stream

    def fetch_half():
        with pytest.MonkeyPatch.context() as patch:
            intercept_fetches(patch, fetch)
            PackReader(waiting).read(0)

    fetching = FORK.Process(target=fetch_half, daemon=True)
    fetching.start()
    assert half.wait(30)
    (partial_file,) = cache.glob(".*.partial")
    # The cache holds one shard: another process waits for as long as the first lives.
    with pytest.raises(AssertionError, match="hangs"):
        run_forked(lambda: assert_reads(PackReader(waiting), source, [3]), timeout=0.7)
    assert partial_file.exists() and list(cache.glob("*.tar")) == []
    fetching.kill()
    fetching.join()
    assert partial_file.exists()
    run_forked(lambda: assert_reads(PackReader(waiting), source, following), timeout=30)
    assert [path.name for path in cache.glob(".*")] == [".lock"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_that_becomes_corrupt_in_the_cache_is_fetched_again_once(source, cache, fetches, damage, opened):
    far, shard = at(source, cache), parse_index(source).shards[1]
    reader = PackReader(far)
    assert_reads(reader, source, [3])
    kept = cache / f"{shard.sha256}.tar"
    content = bytearray(kept.read_bytes())
    content[read_table(source / shard.file).span(2)[0] - 700] ^= 1
    kept.write_bytes({"flipped": content, "cut": content[:700], "emptied": b""}[damage])
    reader = reader if opened else PackReader(far)
    assert_reads(reader, source, [4, 3, 5])
    assert file_sha256(kept) == shard.sha256 and fetches() == [shard.file] * 2
    assert_reads(PackReader(far), source, [4])
    assert fetches() == [shard.file] * 2


def test_a_corrupt_shard_that_another_process_has_replaced_is_left_alone(source, cache, fetches):
    far, shard = at(source, cache), parse_index(source).shards[0]
    reader = PackReader(far)
    assert_reads(reader, source, [0])
    kept = cache / f"{shard.sha256}.tar"
    os.truncate(kept, 0)
    assert_reads(PackReader(far), source, [0])
    replaced = kept.stat().st_ino
    assert_reads(reader, source, [0])
    assert kept.stat().st_ino == replaced and len(fetches()) == 2


def test_a_corrupt_shard_whose_source_is_gone_does_not_count_as_damaged(folder, cache):
    reader = PackReader(at(folder, cache))
    reader.read(0)
    (kept,) = cache.glob("*.tar")
    os.truncate(kept, 600)
    (folder / "shard-000000.tar").unlink()
    assert "must be fetched, got FileNotFoundError" in refusal(reader.read, 0, kind=FetchError)


def test_a_pack_that_differs_from_its_table_costs_no_other_pack_and_no_fetch(source, folder, cache, fetches):
    change_table(folder, (1, 1), 5, shard=0)
    reader = PackReader(at(folder, cache))
    for _ in range(2):
        assert "checksum of its bytes" in refusal(reader.read, 1)
        assert_reads(reader, source, [0, 2])
    assert fetches() == ["shard-000000.tar"]
