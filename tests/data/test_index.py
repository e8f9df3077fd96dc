"""index.json and the reader: every kind of damage is one line naming what is wrong, and none is read past."""

import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import tracemalloc
import zlib

import numpy as np
import pytest

from transfusion_fast.data.index import (
    INDEX_NAME,
    decode_index,
    read_index,
    schema_of,
    table_place,
    write_index,
)
from transfusion_fast.data.order import PackOrder
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment, make_pack
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import read_table, write_shard
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.inspect import build_index

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
SCHEMA = schema_of(16, ByteTokenizer().describe(), (GREY,))
PACKS_PER_SHARD = 3
NUM_PACKS = 7


def make(number):
    caption = TextSegment(np.arange(number, number + 3, dtype=np.int32))
    return make_pack([(caption, ImageSegment(np.full((2, 4, 1), number, np.uint8)))], (GREY,))


def write_folder(folder, num_packs=NUM_PACKS, packs_per_shard=PACKS_PER_SHARD):
    folder.mkdir()
    starts = range(0, num_packs, packs_per_shard)
    numbers = [range(start, min(start + packs_per_shard, num_packs)) for start in starts]
    files = [write_shard(map(make, own), folder, shard, SCHEMA).file for shard, own in enumerate(numbers)]
    write_index(folder, build_index(folder, files, 16, ByteTokenizer(), (GREY,)))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def edit_index(folder, change):
    path = folder / INDEX_NAME
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


def refusal(action, *arguments):
    with pytest.raises(InputError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_holds(pack, number):
    expected = make(number)
    for field in ("tokens", "segments", "latents"):
        np.testing.assert_array_equal(getattr(pack, field), getattr(expected, field), strict=True)


def test_the_index_comes_back_as_it_was_written(folder):
    index = read_index(folder)
    files = [shard.file for shard in index.shards]
    assert index == build_index(folder, files, 16, ByteTokenizer(), (GREY,))
    assert index.pack_counts == [3, 3, 1]
    assert (index.num_packs, index.documents, index.tokens) == (7, 7, 7 * 9)
    assert index.waste == pytest.approx(1 - 9 / 16)


def test_the_index_tells_the_truth_about_the_bytes(folder):
    for shard in read_index(folder).shards:
        content = (folder / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        table = read_table(folder / shard.file)
        spans = list(itertools.pairwise([0, *table.ends]))
        assert spans == [table.span(place) for place in range(shard.packs)] and spans[-1][1] == shard.table
        assert [zlib.crc32(content[start:end]) for start, end in spans] == table.rows[:, 1].tolist()
        begin, end = shard.table_span
        assert zlib.crc32(content[begin:end]) == shard.table_crc32
        assert content[end:].strip(b"\0") == b"", "something follows the table"


def test_a_billion_packs_take_a_line_a_shard_and_little_memory(folder):
    """Index and order together: what every rank of a run holds."""
    entry = json.loads((folder / INDEX_NAME).read_text())
    shard = entry["shards"][0] | {"bytes": 2**40, "packs": 10_000, "table": 2**39}
    many = {
        **entry,
        "shards": [
            {**shard, "file": f"shard-{number:06d}.tar", "sha256": f"{number:064x}"} for number in range(100_000)
        ],
    }
    content = json.dumps(many).encode()
    del many
    assert len(content) < 30e6
    tracemalloc.start()
    index = decode_index(content, "here")
    order = PackOrder(0, index.pack_counts)
    assert order.num_packs == index.num_packs == 10**9
    assert order[10**9 + 5][0] == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + len(content) < 200e6


def test_the_index_has_a_line_a_shard(folder):
    lines = (folder / INDEX_NAME).read_text().splitlines()
    assert len(lines) == 3 + 6 + 3 + 2
    assert sum('"file": "shard-' in line for line in lines) == 3


def test_packs_are_numbered_in_file_order(folder):
    reader = PackReader(folder)
    assert len(reader) == NUM_PACKS
    for position in (6, 0, 3, 2, 5, 1, 4):
        assert_holds(reader.read(position), position)
    assert [reader.locate(position) for position in (0, 2, 3, 6)] == [(0, 0), (0, 2), (1, 0), (2, 0)]
    for position in (-1, NUM_PACKS):
        with pytest.raises(IndexError, match=f"got {position}"):
            reader.read(position)


def test_a_reader_survives_pickling_and_closing(folder):
    reader = PackReader(folder)
    assert_holds(reader.read(0), 0)
    assert_holds(pickle.loads(pickle.dumps(reader)).read(4), 4)
    reader.close()
    assert_holds(reader.read(5), 5)


def test_forked_workers_read_beside_their_parent(folder):
    reader = PackReader(folder)
    reader.read(0)

    def read_all():
        for position in [*range(NUM_PACKS)] * 20:
            assert_holds(reader.read(position), position)

    workers = [multiprocessing.get_context("fork").Process(target=read_all) for _ in range(2)]
    for worker in workers:
        worker.start()
    read_all()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_few_shards_are_open_at_once(tmp_path):
    reader = PackReader(write_folder(tmp_path / "data", num_packs=50, packs_per_shard=1))
    before = len(os.listdir("/proc/self/fd"))
    for position in range(50):
        assert_holds(reader.read(position), position)
    assert len(os.listdir("/proc/self/fd")) - before <= 32
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_as_many_shards_stay_open_as_are_read_in_turns(tmp_path, monkeypatch):
    reader = PackReader(write_folder(tmp_path / "data", num_packs=50, packs_per_shard=1), open_shards=50)
    opened, really = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments) or really(*arguments))
    for position in [*range(50)] * 3:
        reader.read(position)
    assert len(opened) == 50


def test_a_folder_that_is_missing_or_foreign_is_refused_with_what_to_do(tmp_path):
    assert "run: python train/prepare.py digits OUT" in refusal(read_index, tmp_path / "nowhere")
    assert "not a prepared data folder" in refusal(read_index, tmp_path)
    (tmp_path / INDEX_NAME).write_text("{")
    assert "must be JSON" in refusal(read_index, tmp_path)
    for foreign in ("[]", "null", '{"format": "safetensors"}', "{}"):
        (tmp_path / INDEX_NAME).write_text(foreign)
        assert "format of" in refusal(read_index, tmp_path)


def test_another_version_is_refused_naming_both(folder):
    edit_index(folder, lambda entry: entry.update(version=1))
    assert "must be 3, the one supported, got 1" in refusal(read_index, folder)


@pytest.mark.parametrize("name", ["../data/shard-000000.tar", "/etc/passwd", "..", "", "a/b.tar", "a\n.tar", ".hidden"])
def test_a_shard_outside_of_the_folder_is_refused(folder, name):
    edit_index(folder, lambda entry: entry["shards"][0].update(file=name))
    assert "must be a plain name" in refusal(read_index, folder)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["version"], "1", "version"),
        (["sequence_length"], None, "sequence_length"),
        (["sequence_length"], True, "sequence_length"),
        (["sequence_length"], 0, "must be positive"),
        (["sequence_length"], 2**24 + 1, "must be at most 16777216, got 16777217"),
        (["tokens"], 10**30, "must be below 2**63"),
        (["tokenizer"], "bytes", "tokenizer"),
        (["tokenizer", "num_text_tokens"], 256.0, "num_text_tokens"),
        (["modalities"], {}, "modalities"),
        (["modalities", 0], "grey", "name"),
        (["modalities", 0, "patch_size"], 0, "patch_size"),
        (["modalities", 0, "encoding"], "objects", "encoding"),
        (["documents"], "7", "documents"),
        (["tokens"], [], "tokens"),
        (["shards"], [], "must be positive"),
        (["shards", 0], 5, "file"),
        (["shards", 0, "bytes"], "x", "bytes"),
        (["shards", 0, "sha256"], 5, "sha256"),
        (["shards", 0, "packs"], 0, "must be in 1..1048576, got 0"),
        (["shards", 0, "packs"], 2**60, "must be in 1..1048576, got"),
        (["shards", 0, "packs"], 10, "must lie behind its 10 packs"),
        (["shards", 0, "packs"], [3], "packs"),
        (["shards", 0, "table"], 10**12, "must lie behind its 3 packs and within its"),
        (["shards", 0, "table"], -512, "must lie behind its 3 packs"),
        (["shards", 0, "table"], None, "table"),
        (["shards", 0, "bytes"], 2**63, "must be below 2**63, got 9223372036854775808"),
        (["shards", 0, "table"], -(10**30), "must be below 2**63"),
        (["shards", 0, "table_crc32"], 2**32, "in 0..4294967295"),
        (["shards", 0, "table_crc32"], -1, "in 0..4294967295"),
    ],
)
def test_an_index_with_a_field_that_is_wrong_is_refused_naming_it(folder, path, value, reason):
    def change(entry):
        for step in path[:-1]:
            entry = entry[step]
        entry[path[-1]] = value

    edit_index(folder, change)
    assert reason in refusal(read_index, folder)


@pytest.mark.parametrize("field", ["version", "tokenizer", "modalities", "documents", "shards"])
def test_an_index_without_a_field_is_refused_naming_it(folder, field):
    edit_index(folder, lambda entry: entry.pop(field))
    assert f"{field} in " in refusal(read_index, folder)


def test_a_truncated_shard_is_found_before_reading_and_while_reading(folder):
    reader = PackReader(folder)
    shard = folder / "shard-000001.tar"
    size = shard.stat().st_size
    os.truncate(shard, 3000)
    assert f"must have {size} bytes as its index says, got 3000" in refusal(read_index, folder)
    for number in (3, 4, 5):
        message = refusal(reader.read, number)
        assert f"shard-000001.tar (pack {number} of its folder)" in message
        assert f"must have {size} bytes as its index says, got 3000" in message
    assert_holds(reader.read(2), 2)


def test_a_shard_that_was_cut_while_it_was_open_costs_the_packs_that_it_lacks(folder):
    reader = PackReader(folder)
    assert_holds(reader.read(3), 3)
    os.truncate(folder / "shard-000001.tar", read_table(folder / "shard-000001.tar").span(1)[0] + 600)
    assert_holds(reader.read(3), 3)
    assert "got 600" in refusal(reader.read, 4) and "got 0" in refusal(reader.read, 5)


def test_a_missing_shard_is_found_before_reading_and_while_reading(folder):
    reader = PackReader(folder)
    (folder / "shard-000002.tar").unlink()
    assert "shard-000002.tar must exist" in refusal(read_index, folder)
    assert "pack 0 of shard" in refusal(reader.read, 6)


def test_a_flipped_byte_costs_its_own_pack_only(folder):
    shard = read_index(folder).shards[1]
    content = bytearray((folder / shard.file).read_bytes())
    content[read_table(folder / shard.file).span(2)[0] - 700] ^= 1
    (folder / shard.file).write_bytes(content)
    reader = PackReader(folder)
    message = refusal(reader.read, 4)
    assert "pack 1 of shard" in message and shard.file in message and "checksum" in message
    for position in (3, 5):
        assert_holds(reader.read(position), position)


def test_a_shard_that_is_there_twice_under_two_names_is_refused(folder):
    edit_index(folder, lambda entry: entry["shards"].append(entry["shards"][0] | {"file": "copy.tar"}))
    assert "got shard-000000.tar and copy.tar of the same bytes; remove one" in refusal(read_index, folder)


def test_a_shard_that_is_named_twice_is_refused(folder):
    edit_index(folder, lambda entry: entry["shards"].append(entry["shards"][0]))
    assert "must differ, got shard-000000.tar twice" in refusal(read_index, folder)


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "", "x" * 101, "ünlaut\u202e"])
def test_a_modality_whose_name_could_forge_lines_is_refused(folder, name):
    edit_index(folder, lambda entry: entry["modalities"][0].update(name=name))
    assert "name of a modality must be letters" in refusal(read_index, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"modalities": []},
        {"sequence_length": 65},
        {"tokenizer": {"name": "bytes", "num_text_tokens": 256, "sha256": "other"}},
    ],
)
def test_packs_of_a_shard_of_another_schema_are_not_read(folder, change):
    edit_index(folder, lambda entry: entry.update(change))
    assert "of another tokenizer, pack length or other modalities" in refusal(PackReader(folder).read, 0)


def test_a_pack_that_breaks_the_settings_of_its_index_is_refused(folder):
    (folder / "shard-000000.tar").unlink()
    write_shard(map(make, range(3)), folder, 0, schema_of(8, ByteTokenizer().describe(), (GREY,)))
    table_crc32 = table_place(folder / "shard-000000.tar", read_table(folder / "shard-000000.tar"))[1]
    edit_index(folder, lambda entry: entry.update(sequence_length=8))
    edit_index(folder, lambda entry: entry["shards"][0].update(table_crc32=table_crc32))
    assert "at most 8 positions, got 9" in refusal(PackReader(folder).read, 0)


def test_token_ids_beyond_the_tokenizer_are_not_indexed(tmp_path):
    file = write_shard([make(254)], tmp_path, 0, SCHEMA).file
    assert "in 0..255" in refusal(build_index, tmp_path, [file], 16, ByteTokenizer(), (GREY,))
