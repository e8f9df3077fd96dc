"""Data folders at URLs: the packs of a plain folder, each shard fetched once, in a cache that keeps its bound."""

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from remote_cases import assert_reads, at, lines_of, log_fetches, refusal, shard_bytes, write_source

from transfusion_fast.data import folder as remote
from transfusion_fast.data.folder import FetchError, ShardCache, data_folder
from transfusion_fast.data.index import INDEX_NAME, parse_index
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import TOKENIZER_NAME, load_tokenizer


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


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long fetching would have waited before each further attempt."""
    found: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


def test_a_folder_at_a_url_is_read_like_a_plain_one(source, tmp_path):
    far = at(source, tmp_path / "cache")
    assert parse_index(far) == parse_index(source)
    assert_reads(PackReader(far), source)
    tokenizer = load_tokenizer(parse_index(far).tokenizer, far)
    assert tokenizer.describe() == load_tokenizer(parse_index(source).tokenizer, source).describe()


def test_a_folder_in_memory_is_read_like_a_plain_one(source, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/test_remote/packs", recursive=True)
    far = data_folder("memory://test_remote/packs/", ShardCache(tmp_path / "cache", 10**9))
    assert_reads(PackReader(far), source)
    memory.rm("/test_remote", recursive=True)
    assert "FileNotFoundError" in refusal(parse_index, far, kind=FetchError)


def test_a_shard_is_fetched_on_first_use_and_then_lies_in_the_cache(source, tmp_path, fetches):
    reader = PackReader(at(source, tmp_path / "cache"))
    assert lines_of(fetches) == []
    reader.read(4)
    assert lines_of(fetches) == ["shard-000001.tar"]
    for _ in range(2):
        assert_reads(PackReader(at(source, tmp_path / "cache")), source)
    assert sorted(lines_of(fetches)) == [f"shard-{number:06d}.tar" for number in range(6)]
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    assert found == {".lock", *(f"{shard.sha256}.tar" for shard in parse_index(source).shards)}


def test_a_shard_that_was_replaced_is_fetched_anew(folder, tmp_path):
    PackReader(at(folder, tmp_path / "cache")).read(0)
    entry = json.loads((folder / INDEX_NAME).read_text())
    one, other = entry["shards"][0], entry["shards"][1]
    (folder / other["file"]).rename(folder / "spare")
    (folder / one["file"]).rename(folder / other["file"])
    (folder / "spare").rename(folder / one["file"])
    one["file"], other["file"] = other["file"], one["file"]
    entry["shards"][:2] = [other, one]
    (folder / INDEX_NAME).write_text(json.dumps(entry))
    assert_reads(PackReader(at(folder, tmp_path / "cache")), folder)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer"])
def test_a_damaged_shard_is_named_for_each_of_its_packs_and_fetched_twice_in_all(
    source, folder, tmp_path, fetches, damage
):
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes({"flipped": content, "truncated": path.read_bytes()[:-1024], "longer": content + b"x"}[damage])
    reader = PackReader(at(folder, tmp_path / "cache"))
    for number in (3, 4, 5):
        message = refusal(reader.read, number)
        assert f"pack {number - 3} of shard file://{path} (pack {number} of its folder)" in message
        assert "as its index says" in message
    assert lines_of(fetches) == [path.name] * 2
    assert_reads(reader, source, [0, 6])
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2 and not list((tmp_path / "cache").glob(".*.partial"))


def test_a_shard_that_came_damaged_once_is_fetched_again(source, tmp_path, monkeypatch):
    copy, turns = remote._copy, []

    def flawed(url, stream, most):
        size, sha256 = copy(url, stream, most)
        turns.append(url)
        return size, sha256 if len(turns) > 1 else "0" * 64

    monkeypatch.setattr(remote, "_copy", flawed)
    assert_reads(PackReader(at(source, tmp_path / "cache")), source, [0])
    assert len(turns) == 2


def test_a_shard_that_is_gone_is_no_damaged_data(source, folder, tmp_path, waits):
    reader = PackReader(at(folder, tmp_path / "cache"))
    (folder / "shard-000002.tar").unlink()
    message = refusal(reader.read, 7, kind=FetchError)
    assert f"file://{folder}/shard-000002.tar must be fetched, and cannot be (FileNotFoundError" in message
    assert waits == [], "waiting brings no file back"
    assert_reads(reader, source, [0])


@pytest.mark.parametrize("faults", [1, 3, 4])
def test_a_fault_of_the_network_is_waited_out_three_times(source, tmp_path, monkeypatch, waits, faults):
    opened, left = remote._open_url, [faults]

    def faulty(url):
        if url.endswith(".tar") and left[0]:
            left[0] -= 1
            raise ConnectionResetError("Connection reset by\npeer")
        return opened(url)

    monkeypatch.setattr(remote, "_open_url", faulty)
    reader = PackReader(at(source, tmp_path / "cache"))
    if faults <= 3:
        assert_reads(reader, source, [0])
        assert waits == [1, 2, 4][:faults]
    else:
        message = refusal(reader.read, 0, kind=FetchError)
        assert "shard-000000.tar" in message and "ConnectionResetError: Connection reset by peer" in message
        assert waits == [1, 2, 4]
        assert_reads(reader, source, [0])


def test_an_error_of_a_client_library_is_waited_out_too(monkeypatch, waits):
    class BotoCoreError(Exception):
        """Such as botocore raises, which need not be here."""

    def action():
        raise BotoCoreError("too slow")

    with pytest.raises(BotoCoreError):
        remote._retrying("s3://x", action)
    library = SimpleNamespace(BotoCoreError=BotoCoreError, ClientError=OSError)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", library)
    assert "BotoCoreError: too slow" in refusal(remote._retrying, "s3://x", action, kind=FetchError)
    assert len(waits) == 3


def test_a_cache_that_cannot_be_written_is_no_damaged_data(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    message = refusal(PackReader(at(source, tmp_path / "cache")).read, 0, kind=FetchError)
    assert f"data.cache must be a folder to keep shards in, got '{tmp_path / 'cache'}'" in message


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "pipe://cat",
        "simplecache::s3://bucket/folder",
        "zip://x::file:///a.zip",
        "file:///a::memory://b",
        "ftp://host/folder",
        "github://owner:repo@main/folder",
        "://folder",
        "FILE:///folder",
    ],
)
def test_urls_of_other_kinds_are_refused(url, tmp_path):
    assert f"got {url!r}; give another, or a local folder" in refusal(data_folder, url, ShardCache(tmp_path, 1))


@pytest.mark.parametrize("url", ["https://host/folder?sig=abc", "http://host/folder#1", "https://host/?"])
def test_a_url_that_names_of_files_cannot_be_put_after_is_refused(url, tmp_path):
    message = refusal(data_folder, url, ShardCache(tmp_path, 1))
    assert f"must have no ? and no #, got {url!r}" in message and "give the folder's own URL" in message


@pytest.mark.parametrize("url", ["https:///folder", "http://host:99999/folder", "http://[1/folder", "http://h:x/f"])
def test_a_url_of_no_server_is_refused(url, tmp_path):
    assert f"must name a host, and a port that can be, got {url!r}" in refusal(
        data_folder, url, ShardCache(tmp_path, 1)
    )


def test_a_protocol_whose_package_is_missing_is_refused_naming_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    folder = data_folder("s3://bucket/folder", ShardCache(tmp_path, 1))
    assert "needs a package that is missing (Install s3fs to access S3); install it" in refusal(parse_index, folder)


def test_a_plain_folder_is_a_path(tmp_path):
    assert data_folder("data/digits:2/train", ShardCache(tmp_path, 1)) == Path("data/digits:2/train")


def test_a_shard_cannot_be_kept_outside_the_cache(folder, tmp_path):
    entry = json.loads((folder / INDEX_NAME).read_text())
    entry["shards"][0]["sha256"] = "../../" + "a" * 58
    (folder / INDEX_NAME).write_text(json.dumps(entry))
    assert "must be 64 hexadecimal digits" in refusal(PackReader, at(folder, tmp_path / "cache"))


def test_a_tokenizer_that_is_gone_is_named(folder, tmp_path):
    far = at(folder, tmp_path / "cache")
    (folder / TOKENIZER_NAME).unlink()
    assert TOKENIZER_NAME in refusal(load_tokenizer, parse_index(far).tokenizer, far, kind=FetchError)


def test_a_reader_opens_nothing_it_does_not_close(source, tmp_path):
    gc.collect()  # readers of other tests
    before = len(os.listdir("/proc/self/fd"))
    reader = PackReader(at(source, tmp_path / "cache", 2 * shard_bytes(source)))
    assert_reads(reader, source)
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
