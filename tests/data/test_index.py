"""index.json and the reader: any damage is one line that names what is wrong, and is never read past."""

import json
import os
import pickle
import shutil
import tracemalloc

import pytest
from remote_cases import refusal, run_forked
from shard_damage import GREY, assert_same_pack, change_table, small_pack

from transfusion_fast.data.index import (
    INDEX_NAME,
    Index,
    decode_index,
    read_index,
    schema_of,
    write_index,
)
from transfusion_fast.data.order import PackOrder
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.shards import write_shard
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.inspect import build_index

SCHEMA = schema_of(16, ByteTokenizer().describe(), (GREY,))
SETTINGS = Index(16, ByteTokenizer().describe(), (GREY,), documents=0, tokens=0, shards=())
NUM_PACKS = 7


def write_folder(folder, num_packs=NUM_PACKS, packs_per_shard=3):
    folder.mkdir()
    starts = range(0, num_packs, packs_per_shard)
    numbers = [range(start, min(start + packs_per_shard, num_packs)) for start in starts]
    files = [write_shard(map(small_pack, own), folder, shard, SCHEMA).file for shard, own in enumerate(numbers)]
    write_index(folder, build_index(folder, files, SETTINGS))
    return folder


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("intact") / "data")


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "data")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 50 shards of one pack."""
    return write_folder(tmp_path_factory.mktemp("many") / "data", num_packs=50, packs_per_shard=1)


FIELDS = ("format", "version", "tokenizer", "modalities", "documents", "shards")


def set_field(folder, path, value):
    """Set one field of the index, such as "shards.0.file", or remove it."""
    entry = json.loads((folder / INDEX_NAME).read_text())
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    part = entry
    for step in steps:
        part = part[step]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    (folder / INDEX_NAME).write_text(json.dumps(entry))


def assert_holds(pack, number):
    assert_same_pack(pack, small_pack(number))


def test_an_index_is_read_as_it_was_written_with_a_line_a_shard(folder):
    index = read_index(folder)
    files = [shard.file for shard in index.shards]
    assert index == build_index(folder, files, SETTINGS)
    assert index.pack_counts == [3, 3, 1]
    assert (index.num_packs, index.documents, index.tokens) == (7, 7, 7 * 9)
    assert index.waste == pytest.approx(1 - 9 / 16)
    lines = (folder / INDEX_NAME).read_text().splitlines()
    assert len(lines) == 3 + 6 + 3 + 2
    assert sum('"file": "shard-' in line for line in lines) == 3


def test_a_billion_packs_take_a_line_a_shard_and_little_memory(folder):
    """Index and order together, as every rank of a run holds them."""
    entry = json.loads((folder / INDEX_NAME).read_text())
    shard = entry["shards"][0] | {"bytes": 2**40, "packs": 10_000, "table": 2**39}
    shards = [shard | {"file": f"{number}.tar", "sha256": f"{number:064x}"} for number in range(100_000)]
    content = json.dumps({**entry, "shards": shards}).encode()
    del shards
    assert len(content) < 30e6
    tracemalloc.start()
    index = decode_index(content, "here")
    order = PackOrder(0, index.pack_counts)
    assert order.num_packs == index.num_packs == 10**9
    assert order[10**9 + 5][0] == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + len(content) < 200e6


def test_packs_are_numbered_in_file_order(intact):
    reader = PackReader(intact)
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


def test_forked_workers_read_beside_their_parent(intact):
    reader = PackReader(intact)
    reader.read(0)

    def read_all():
        for position in [*range(NUM_PACKS)] * 20:
            assert_holds(reader.read(position), position)

    run_forked(read_all, read_all)
    read_all()


def test_as_many_shards_stay_open_as_the_reader_was_told_or_32(many, monkeypatch):
    opened, really = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments) or really(*arguments))
    for reader, most in ((PackReader(many), 32), (PackReader(many, open_shards=50), 50)):
        opened.clear()
        before = len(os.listdir("/proc/self/fd"))
        for position in [*range(50)] * 2:
            assert_holds(reader.read(position), position)
        assert len(os.listdir("/proc/self/fd")) - before == most
        assert len(opened) == (50 if most == 50 else 100)
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_shards_that_stay_open_are_those_read_last(many, monkeypatch):
    opened, really = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments) or really(*arguments))
    reader = PackReader(many, open_shards=2)
    for number in (0, 1, 0, 2, 0):
        assert_holds(reader.read(number), number)
    assert len(opened) == 3


def test_a_folder_that_is_missing_or_foreign_is_refused_with_what_to_do(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        message = refusal(read_index, folder)
        assert "not a prepared data folder" in message and "python train/prepare.py digits OUT" in message
    divided = tmp_path / "divided"
    (divided / "train").mkdir(parents=True)
    (divided / "train" / INDEX_NAME).write_text("{}")
    assert refusal(read_index, divided).endswith(f"give its part '{divided / 'train'}'")
    for foreign in ("{", "[]", "null", '{"format": "safetensors"}', "{}"):
        (tmp_path / INDEX_NAME).write_text(foreign)
        message = refusal(read_index, tmp_path)
        assert f"{tmp_path / INDEX_NAME} must be " in message and ("must be JSON" in message) == (foreign == "{")


@pytest.mark.parametrize(
    ("path", "values", "rule"),
    [
        *((field, [...], "must be given, got nothing") for field in FIELDS),
        ("format", [None, "safetensors"], "must be 'transfusion_fast.packs', got "),
        ("version", [1, 5, "4", True], "must be 3 or 4, got "),
        ("sequence_length", [None, True, 16.0, "16"], "must be a valid integer, got "),
        ("sequence_length", [0, -1], "must be greater than or equal to 1, got "),
        ("sequence_length", [2**24 + 1], "must be less than or equal to 16777216, got 16777217"),
        ("tokenizer", ["bytes", None, []], "must be "),
        ("tokenizer.num_text_tokens", [256.0, "256", True], "must be a valid integer, got "),
        ("tokenizer.sha256", [5], "must be a valid string, got 5"),
        ("modalities", [{}, None], "must be "),
        ("modalities.0", ["grey"], "must be "),
        ("modalities.0.patch_size", ["2", 2.0], "must be a valid integer, got "),
        ("modalities.0.autoencoder", [5], "must be a valid string, got 5"),
        ("modalities.0.encoding", ["objects"], "must be 'pixels' or 'latents', got 'objects'"),
        ("documents", ["7", 7.5], "must be a valid integer, got "),
        ("documents", [0], "must be greater than 0, got 0"),
        ("tokens", [10**30, 2**63], "must be less than 9223372036854775808, got "),
        ("shards", [[]], "must have at least 1 item"),
        ("shards", [{}, None], "must be "),
        ("shards.0", [5], "must be "),
        ("shards.0.file", ["../a.tar", "/etc/passwd", "..", "", "a/b.tar", "a\n.tar", ".x"], "must match pattern "),
        ("shards.0.bytes", ["x", None, True], "must be a valid integer, got "),
        ("shards.0.bytes", [2**63], "must be less than 9223372036854775808, got "),
        ("shards.0.sha256", ["A" * 64, "a" * 63, "a" * 64 + "\n", "../" + "a" * 61], "must match pattern "),
        ("shards.1.packs", [0], "must be greater than or equal to 1, got 0"),
        ("shards.0.packs", [2**60], "must be less than or equal to 1048576, got "),
        ("shards.0.packs", [[3]], "must be a valid integer, got [3]"),
        ("shards.0.table", [-512, -(10**30)], "must be greater than or equal to 0, got -"),
        ("shards.0.table_crc32", [2**32], "must be less than 4294967296, got 4294967296"),
        ("shards.0.table_crc32", [-1], "must be greater than or equal to 0, got -1"),
    ],
)
def test_a_wrong_field_of_an_index_is_refused_naming_it(folder, path, values, rule):
    for value in values:
        set_field(folder, path, value)
        message = refusal(read_index, folder)
        assert message.startswith(f"{path} in {folder / INDEX_NAME} {rule}")
        assert message.endswith("; prepare the data again")


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("shards.0.packs", 10, "table of shard-000000.tar must lie behind its 10 packs and within its"),
        ("shards.0.table", 10**12, "table of shard-000000.tar must lie behind its 3 packs and within its"),
        ("shards.0.table", 512, "table of shard-000000.tar must lie behind its 3 packs"),
        *(
            ("modalities.0.name", name, "must be letters")
            for name in ("\x1b[31m", "a\nb", "", "x" * 101, "ünlaut\u202e")
        ),
    ],
)
def test_a_table_outside_of_its_shard_and_a_name_that_could_forge_lines_are_refused(folder, path, value, rule):
    set_field(folder, path, value)
    message = refusal(read_index, folder)
    assert message.startswith(f"{folder / INDEX_NAME}: ") and rule in message


def test_a_folder_of_the_version_before_is_read(folder, intact):
    """Its ids are int32, as `write_shard` stores them by default."""
    set_field(folder, "version", 3)
    assert_same_pack(PackReader(folder).read(4), PackReader(intact).read(4))


def test_unknown_fields_of_an_index_are_ignored(folder, intact):
    for part in ("", "tokenizer.", "modalities.0.", "shards.0."):
        set_field(folder, f"{part}comment", ["of a later version"])
    assert read_index(folder) == read_index(intact)


def test_a_truncated_or_missing_shard_is_found_before_reading_and_while_reading(folder):
    reader, shard = PackReader(folder), folder / "shard-000001.tar"
    rule = f"shard {shard} must have {shard.stat().st_size} bytes as its index says, got 3000"
    os.truncate(shard, 3000)
    assert rule in refusal(read_index, folder)
    for number in (3, 4, 5):
        message = refusal(reader.read, number)
        assert f"shard-000001.tar (pack {number} of its folder)" in message and rule in message
    assert_holds(reader.read(2), 2)
    shard.unlink()
    assert "shard-000001.tar must exist" in refusal(read_index, folder)
    assert "pack 0 of shard" in refusal(reader.read, 3)


@pytest.mark.parametrize(
    "change", [{"file": "copy.tar"}, {"sha256": "a" * 64}, {}], ids=["same bytes", "same name", "same entry"]
)
def test_a_shard_that_occurs_twice_is_refused(folder, change):
    shards = json.loads((folder / INDEX_NAME).read_text())["shards"]
    set_field(folder, "shards", [*shards, shards[0] | change])
    names = f"got shard-000000.tar and {change.get('file', 'shard-000000.tar')} of the same "
    assert names in refusal(decode_index, (folder / INDEX_NAME).read_bytes(), "here")


@pytest.mark.parametrize(
    ("field", "value"), [("modalities", []), ("sequence_length", 65), ("tokenizer.sha256", "other")]
)
def test_packs_of_a_shard_with_another_schema_are_not_read(folder, field, value):
    set_field(folder, field, value)
    assert "must be of the tokenizer, modalities and pack length of its index" in refusal(PackReader(folder).read, 0)


def test_a_pack_that_breaks_the_settings_of_its_index_is_refused(folder):
    set_field(folder, "sequence_length", 8)
    change_table(folder, schema=schema_of(8, ByteTokenizer().describe(), (GREY,)), shard=0)
    assert "at most 8 positions, got 9" in refusal(PackReader(folder).read, 0)


def test_token_ids_beyond_the_tokenizer_are_not_indexed(tmp_path):
    file = write_shard([small_pack(254)], tmp_path, 0, SCHEMA).file
    assert "in 0..255" in refusal(build_index, tmp_path, [file], SETTINGS)
