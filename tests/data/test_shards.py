"""Shards on disk: plain WebDataset tars, reproducible, and decoded without trusting a byte."""

import hashlib
import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from recording import record_durability
from remote_cases import refusal
from shard_damage import GREY, assert_same_pack, small_pack, tar_members

from transfusion_fast.data.pack import ImageSegment, TextSegment, make_pack, tokens_dtype
from transfusion_fast.data.shards import decode_pack, read_table, write_shard
from transfusion_fast.errors import InputError

SCHEMA = bytes(range(32))
FIELDS = ("latents", "segments", "tokens")


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def payload(pack, **changes):
    """Return the tar members of a pack, as numpy writes them, with other contents of some fields."""
    return tar_members((f"k.{field}.npy", changes.get(field, npy(getattr(pack, field)))) for field in FIELDS)


GOOD = payload(small_pack(1))
PACKS = [
    small_pack(1),
    make_pack([(TextSegment(np.array([1], np.int32)),)], (GREY,)),
    make_pack([(ImageSegment(np.zeros((2, 2, 1), np.uint8)),)], (GREY,)),
]


def test_shards_are_read_by_a_plain_webdataset(tmp_path):
    packs = [small_pack(number) for number in range(5)]
    files = [write_shard(packs[2 * shard : 2 * shard + 2], tmp_path, shard, SCHEMA).file for shard in range(3)]
    assert files == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    samples = list(wds.WebDataset([str(tmp_path / file) for file in files], shardshuffle=False))
    keys = [sample["__key__"] for sample in samples]
    assert keys == ["000000-000000", "000000-000001", "000001-000000", "000001-000001", "000002-000000"]
    for sample, pack in zip(samples, packs, strict=True):
        for field in FIELDS:
            assert sample[f"{field}.npy"] == npy(getattr(pack, field)), "numpy would write other bytes"


def test_a_shard_is_the_same_each_time_and_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    (tmp_path / "again").mkdir()
    write_shard(map(small_pack, range(3)), tmp_path / "again", 0, SCHEMA)
    events = record_durability(monkeypatch)
    write_shard(map(small_pack, range(3)), tmp_path, 0, SCHEMA)
    content, partial = (tmp_path / "shard-000000.tar").read_bytes(), ".shard-000000.tar.partial"
    assert content == (tmp_path / "again" / "shard-000000.tar").read_bytes()
    assert events == [("fsync", partial, str(len(content))), ("rename", partial, "shard-000000.tar")]


def test_an_interrupted_shard_has_no_name(tmp_path):
    def packs():
        yield from map(small_pack, range(3))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(packs(), tmp_path, 0, SCHEMA)
    assert not list(tmp_path.glob("*.tar"))


def test_the_table_of_a_shard_locates_its_packs(tmp_path):
    info = write_shard(map(small_pack, range(5)), tmp_path, 0, SCHEMA)
    table, content = read_table(tmp_path / info.file), (tmp_path / info.file).read_bytes()
    assert table.schema == SCHEMA and table.location == (info.table, info.table_crc32)
    assert (info.packs, info.bytes, info.sha256) == (5, len(content), hashlib.sha256(content).hexdigest())
    for number in (3, 0, 4, 1, 2):
        start, end = table.span(number)
        assert_same_pack(table.decode(number, content[start:end]), small_pack(number))
    assert table.span(4)[1] == info.table and content[info.table_span[1] :].strip(b"\0") == b""


def test_a_shard_that_does_not_end_as_it_was_written_is_refused(tmp_path):
    path = tmp_path / write_shard([small_pack(1)], tmp_path, 0, SCHEMA).file
    content = path.read_bytes()
    for other in (content[:-512], content + b"x", content[:-1] + b"x"):
        path.write_bytes(other)
        assert f"shard {path} cannot be used: it must end in " in refusal(read_table, path)


@pytest.mark.parametrize("pack", PACKS, ids=["both", "text", "image"])
def test_a_pack_is_decoded_into_arrays_of_its_own(pack):
    decoded = decode_pack(payload(pack))
    assert_same_pack(decoded, pack)
    assert all(getattr(decoded, field).flags.writeable for field in FIELDS)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_text_ids_take_as_few_bytes_as_the_vocabulary_needs(tmp_path, vocabulary, dtype):
    pack = make_pack([(TextSegment(np.array([0, vocabulary - 1], np.int32)),)], (GREY,))
    path = tmp_path / write_shard([pack], tmp_path, 0, SCHEMA, tokens_dtype(vocabulary)).file
    [sample] = wds.WebDataset(str(path), shardshuffle=False)
    assert sample["tokens.npy"] == npy(pack.tokens.astype(dtype)) and "latents.npy" not in sample
    table = read_table(path)
    assert_same_pack(table.decode(0, path.read_bytes()[slice(*table.span(0))]), pack)


def claiming(shape, body=b""):
    """Return an npy file of int32 that claims any shape."""
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n" + body


@pytest.mark.parametrize(
    "tokens",
    [
        npy(np.array([{}], dtype=object)),
        npy(np.arange(3)),
        npy(np.arange(3, dtype=">i4")),
        npy(np.zeros((1, 3), np.int32)),
        npy(np.int32(3)),
        npy(np.arange(3, dtype=np.int32)) + b"\0\0\0\0",
        npy(np.arange(3, dtype=np.int32))[:-1],
        claiming("(4611686018427387904,)"),
        claiming("(-1,)", bytes(4)),
        claiming("(0x" + "f" * 9000 + ",)"),
        claiming("__import__('os').abort()"),
        b"",
        b"\x93NUMPY\x02\x00",
    ],
)
def test_a_malformed_npy_is_refused(tokens):
    assert "tokens.npy must hold |u1 or <u2 or <i4 of shape (-1,)" in refusal(
        decode_pack, payload(PACKS[0], tokens=tokens)
    )


FILES = [(f"k.{field}.npy", npy(getattr(PACKS[0], field))) for field in FIELDS]


def test_packs_with_and_without_weights_share_a_shard(tmp_path):
    pack = replace(PACKS[0], weights=np.array([0.5, 0], np.float32))
    write_shard([PACKS[0], pack, PACKS[1]], tmp_path, 0, SCHEMA)
    table, data = read_table(tmp_path / "shard-000000.tar"), (tmp_path / "shard-000000.tar").read_bytes()
    found = [table.decode(number, data[slice(*table.span(number))]) for number in range(3)]
    assert found[0].weights is found[2].weights is None and found[1].weights.tolist() == [0.5, 0]
    assert_same_pack(found[1], PACKS[0])
    weights = ("k.weights.npy", npy(pack.weights))
    decode_pack(tar_members([*FILES, weights]))
    for files in ([*FILES, weights, weights], [weights, *FILES], [*FILES[:2], weights]):
        assert "must be .npy for" in refusal(decode_pack, tar_members(files))


OTHER_KEY, EXTRA = ("j.tokens.npy", FILES[2][1]), ("k.extra.npy", FILES[0][1])


@pytest.mark.parametrize("files", [[], FILES[:2], [*FILES, FILES[2]], [*FILES, EXTRA], [*FILES[:2], OTHER_KEY]])
def test_other_files_than_those_of_one_key_are_refused(files):
    assert "must be .npy for latents, segments, tokens, weights of one key, got" in refusal(
        decode_pack, tar_members(files)
    )


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.DIRTYPE])
def test_a_member_that_is_no_file_is_refused(kind):
    member = tarfile.TarInfo("k.tokens.npy")
    member.type = kind
    assert "must be a file" in refusal(decode_pack, member.tobuf(tarfile.USTAR_FORMAT))


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_every_truncation_is_refused_and_a_flipped_byte_gives_a_pack_or_an_error(position, flip):
    refusal(decode_pack, GOOD[:position])
    damaged = bytearray(GOOD)
    damaged[position] ^= flip
    try:
        decode_pack(bytes(damaged))
    except InputError as error:
        assert "\n" not in str(error)
