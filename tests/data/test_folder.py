"""Data folders at URLs: the packs of a local folder, with each shard fetched once, and which faults are retried."""

import gc
import json
import os
import shutil
import sys
import types
from pathlib import Path

import fsspec
import pytest
from recording import record_durability
from remote_cases import assert_reads, at, intercept_fetches, refusal

from transfusion_fast.data.folder import FetchError, LocalFolder, ShardCache, as_folder
from transfusion_fast.data.index import INDEX_NAME, parse_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, load_tokenizer


def test_a_folder_in_memory_is_read_like_a_local_one(source, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/test_remote/packs", recursive=True)
    far = as_folder("memory://test_remote/packs/", ShardCache(tmp_path / "cache", 10**9))
    assert_reads(PackReader(far), source)
    memory.rm("/test_remote", recursive=True)
    assert "FileNotFoundError" in refusal(parse_index, far, kind=FetchError)


def test_a_shard_is_fetched_on_first_use_and_is_then_cached(source, tmp_path, fetches):
    gc.collect()  # readers of other tests
    before, cache = len(os.listdir("/proc/self/fd")), tmp_path / "cache"
    reader = PackReader(at(source, cache))
    assert fetches() == []
    reader.read(4)
    assert fetches() == ["shard-000001.tar"]
    for each in (reader, PackReader(at(source, cache))):
        assert_reads(each, source)
        each.close()
    assert sorted(fetches()) == [f"shard-{number:06d}.tar" for number in range(6)]
    assert {path.name for path in cache.iterdir()} == {
        ".lock",
        *(f"{shard.sha256}.tar" for shard in parse_index(source).shards),
    }
    assert len(os.listdir("/proc/self/fd")) == before
    shutil.rmtree(cache)
    assert_reads(PackReader(at(source, cache)), source, [0])
    assert len(fetches()) == 7


def test_a_fetched_shard_is_flushed_to_disk_before_it_gets_its_name(source, tmp_path, monkeypatch):
    reader, shard = PackReader(at(source, tmp_path / "cache")), parse_index(source).shards[0]
    events = record_durability(monkeypatch)
    reader.read(0)
    partial = f".{shard.sha256}.partial"
    assert events == [("fsync", partial, str(shard.bytes)), ("rename", partial, f"{shard.sha256}.tar")]


def test_a_replaced_shard_is_fetched_although_its_predecessor_is_cached(folder, tmp_path):
    PackReader(at(folder, tmp_path / "cache")).read(0)
    entry = json.loads((folder / INDEX_NAME).read_text())
    one, other = entry["shards"][:2]
    contents = [(folder / each["file"]).read_bytes() for each in (other, one)]
    for each, content in zip((one, other), contents, strict=True):
        (folder / each["file"]).write_bytes(content)
    one["file"], other["file"] = other["file"], one["file"]
    entry["shards"][:2] = [other, one]
    (folder / INDEX_NAME).write_text(json.dumps(entry))
    assert_reads(PackReader(at(folder, tmp_path / "cache")), folder)


def damaged(content, damage):
    flipped = bytearray(content)
    flipped[700] ^= 1
    return {"flipped": bytes(flipped), "truncated": content[:-1024], "longer": content + b"x"}[damage]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer"])
def test_a_damaged_shard_is_named_for_each_of_its_packs_and_fetched_only_twice(
    source, folder, tmp_path, fetches, damage
):
    path = folder / "shard-000001.tar"
    path.write_bytes(damaged(path.read_bytes(), damage))
    reader = PackReader(at(folder, tmp_path / "cache"))
    for number in (3, 4, 5):
        message = refusal(reader.read, number)
        assert f"pack {number - 3} of shard file://{path} (pack {number} of its folder)" in message
        assert "as its index says" in message
    assert fetches() == [path.name] * 2 and not list((tmp_path / "cache").glob(".*.partial"))
    assert_reads(reader, source, [0, 6])
    shards = parse_index(source).shards
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    assert found == {".lock", *(f"{shards[number].sha256}.tar" for number in (0, 2))}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer"])
def test_a_shard_that_arrives_damaged_once_is_fetched_again(source, tmp_path, monkeypatch, damage):
    broken, attempts = tmp_path / "broken.tar", []
    content = (source / "shard-000000.tar").read_bytes()
    broken.write_bytes(damaged(content, damage))

    def fetch(name, really_open):
        attempts.append(name)
        return broken.open("rb") if len(attempts) == 1 else really_open()

    intercept_fetches(monkeypatch, fetch)
    assert_reads(PackReader(at(source, tmp_path / "cache")), source, [0])
    assert len(attempts) == 2
    (kept,) = (tmp_path / "cache").glob("*.tar")
    assert kept.read_bytes() == content


class BotoCoreError(Exception):
    """An error of a file system's package that is no OSError."""


@pytest.mark.parametrize("fault", [ConnectionResetError("reset by\npeer"), BotoCoreError("reset by\npeer")])
@pytest.mark.parametrize("faults", [1, 3, 4])
def test_a_fault_of_the_network_is_retried_three_times(source, tmp_path, monkeypatch, waits, faults, fault):
    errors = types.SimpleNamespace(BotoCoreError=BotoCoreError, ClientError=BotoCoreError)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", errors)
    left = [fault] * faults

    def fetch(name, really_open):
        if left:
            raise left.pop()
        return really_open()

    intercept_fetches(monkeypatch, fetch)
    reader = PackReader(at(source, tmp_path / "cache"))
    if faults == 4:
        message = refusal(reader.read, 0, kind=FetchError)
        assert f"shard-000000.tar must be fetched, got {type(fault).__name__}: reset by peer;" in message
    assert_reads(reader, source, [0])
    assert waits == [1, 2, 4][:faults]
    left.append(TypeError("a mistake"))
    with pytest.raises(TypeError, match="a mistake"):  # of the program: neither retried nor called a fault
        reader.read(3)
    assert len(waits) == min(faults, 3)


def test_a_cache_that_cannot_be_written_does_not_mean_damaged_data(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    message = refusal(PackReader(at(source, tmp_path / "cache")).read, 0, kind=FetchError)
    assert f"data.cache must be a writable folder, got '{tmp_path / 'cache'}'" in message


@pytest.mark.parametrize(
    ("urls", "reason"),
    [
        (
            "pipe:cat|pipe://cat|simplecache::s3://bucket/f|zip://x::file:///a.zip|file:///a::memory://b|ftp://host/f|"
            "github://owner:repo@main/f|://f|FILE:///f",
            "must use one of the protocols file, http, https, s3",
        ),
        (
            "https://host/f?sig=abc|http://host/f#1|https://host/?|https:///f|http://host:99999/f|http://host:0/f|"
            "http://[1/f|http://h:x/f",
            "must have a host, a valid port, no ? and no #",
        ),
    ],
)
def test_other_urls_are_refused(urls, reason, tmp_path):
    for url in urls.split("|"):
        message = refusal(as_folder, url, ShardCache(tmp_path, 1))
        assert reason in message and f"got {url!r}; give a" in message


def test_a_protocol_whose_package_is_missing_is_refused_naming_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    folder = as_folder("s3://bucket/folder", ShardCache(tmp_path, 1))
    assert "needs a package that is missing (Install s3fs to access S3); install it" in refusal(parse_index, folder)


def test_a_path_is_a_local_folder_and_a_folder_stays_itself(tmp_path):
    assert as_folder("data/digits:2/train") == as_folder(Path("data/digits:2/train"))
    assert as_folder(tmp_path) == LocalFolder(tmp_path)
    far = as_folder("file:///f/", ShardCache(tmp_path, 1))
    assert as_folder(far) is far and str(far) == "file:///f"
    assert "must have a cache, got none for 'file:///f'" in refusal(as_folder, "file:///f")


def test_a_missing_tokenizer_is_named(folder, tmp_path):
    (folder / TOKENIZER_NAME).unlink()
    description = parse_index(folder).tokenizer
    far = at(folder, tmp_path / "cache")
    assert TOKENIZER_NAME in refusal(load_tokenizer, description, far, kind=FetchError)
    assert f"must hold a readable {TOKENIZER_NAME}" in refusal(load_tokenizer, description, folder)
