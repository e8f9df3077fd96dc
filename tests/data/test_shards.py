"""Shards on disk: plain WebDataset tars, reproducible, and decoded without trusting a byte."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from recording import record_durability
from remote_cases import refusal
from shard_damage import GREY, assert_same_pack, small_pack

from transfusion_fast.data.pack import ImageSegment, TextSegment, make_pack
from transfusion_fast.data.shards import decode_pack, read_table, write_shard
from transfusion_fast.errors import InputError

SCHEMA = bytes(range(32))
FIELDS = ("tokens", "segments", "latents")


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npy_claiming(header, body=b""):
    """Return an npy file of version 1.0 with any header text."""
    header = header.encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def payload(members):
    """Return the bytes of tar members as in the middle of a shard, without end-of-archive blocks."""
    blocks = []
    for name, data in members:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        blocks += [member.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join(blocks)


def good_members(pack):
    return {f"k.{field}.npy": npy(getattr(pack, field)) for field in FIELDS}


def with_tokens(data):
    """Return a good pack's payload, with `data` as its tokens.npy."""
    return payload({**good_members(small_pack(1)), "k.tokens.npy": data}.items())


GOOD = payload(good_members(small_pack(1)).items())


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
            stored = np.load(io.BytesIO(sample[f"{field}.npy"]), allow_pickle=False)
            np.testing.assert_array_equal(stored, getattr(pack, field), strict=True)


def test_equal_packs_give_equal_bytes(tmp_path):
    contents = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        file = write_shard(map(small_pack, range(3)), tmp_path / run, 0, SCHEMA).file
        contents.append((tmp_path / run / file).read_bytes())
    assert contents[0] == contents[1]


def test_a_shard_is_complete_and_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = record_durability(monkeypatch)
    write_shard(map(small_pack, range(3)), tmp_path, 0, SCHEMA)
    partial, size = ".shard-000000.tar.partial", (tmp_path / "shard-000000.tar").stat().st_size
    assert events == [("fsync", partial, str(size)), ("rename", partial, "shard-000000.tar")]


def test_an_interrupted_shard_has_no_name(tmp_path):
    def packs():
        yield from map(small_pack, range(3))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(packs(), tmp_path, 0, SCHEMA)
    assert not list(tmp_path.glob("*.tar"))


def test_the_table_of_a_shard_locates_its_packs(tmp_path):
    info = write_shard(map(small_pack, range(5)), tmp_path, 0, SCHEMA)
    path = tmp_path / info.file
    table, content = read_table(path), path.read_bytes()
    assert table.schema == SCHEMA
    assert (info.packs, info.bytes, info.sha256) == (5, len(content), hashlib.sha256(content).hexdigest())
    for number in (3, 0, 4, 1, 2):
        start, end = table.span(number)
        table.check(number, content[start:end])
        assert_same_pack(decode_pack(content[start:end]), small_pack(number))


def test_a_decoded_pack_owns_its_arrays():
    pack = decode_pack(GOOD)
    assert_same_pack(pack, small_pack(1))
    pack.tokens[0] = 9  # writable


def test_a_pack_without_text_or_images_is_decoded():
    only_text = make_pack([(TextSegment(np.array([1], np.int32)),)], (GREY,))
    assert_same_pack(decode_pack(payload(good_members(only_text).items())), only_text)
    only_image = make_pack([(ImageSegment(np.zeros((2, 2, 1), np.uint8)),)], (GREY,))
    assert_same_pack(decode_pack(payload(good_members(only_image).items())), only_image)


class Trap:
    """A pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_refused_and_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    array = np.empty(1, dtype=object)
    array[0] = Trap(sprung)
    for bait in (npy(array, allow_pickle=True), pickle.dumps(Trap(sprung))):
        assert "tokens.npy must" in refusal(
            decode_pack, payload({**good_members(small_pack(1)), "k.tokens.npy": bait}.items())
        )
    assert not sprung.exists()


@pytest.mark.parametrize(
    "tokens",
    [
        npy(np.arange(3)),
        npy(np.arange(3, dtype=">i4")),
        npy(np.zeros((1, 3), np.int32)),
        npy(np.int32(3)),
        npy(np.arange(3, dtype=np.int32)) + b"\0\0\0\0",
        npy(np.arange(3, dtype=np.int32))[:-1],
        npy_claiming("{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904,), }\n"),
        npy_claiming("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }\n", bytes(4)),
        npy_claiming("{'descr': '<i4', 'fortran_order': False, 'shape': (0x" + "f" * 9000 + ",), }\n"),
        npy_claiming("{'descr': '<i4', 'fortran_order': True, 'shape': (1,), }\n", bytes(4)),
        npy_claiming("{'descr': '<i4', 'fortran_order': False, 'shape': (2.0,), }\n", bytes(8)),
        npy_claiming("{1: 2, 'a': 3}\n"),
        npy_claiming("(" * 5000 + ")" * 5000 + "\n"),
        npy_claiming("'''\n"),
        npy_claiming("import os\n"),
        b"",
        b"\x93NUMPY\x02\x00",
    ],
)
def test_a_malformed_npy_is_refused(tokens):
    assert "tokens.npy" in refusal(
        decode_pack, payload({**good_members(small_pack(1)), "k.tokens.npy": tokens}.items())
    )


def test_other_members_than_the_three_are_refused():
    members = good_members(small_pack(1))
    assert "three of one key" in refusal(decode_pack, payload(list(members.items())[:2]))
    assert "three of one key" in refusal(decode_pack, b"")
    assert "one each" in refusal(decode_pack, payload([*members.items(), ("k.extra.npy", npy(np.arange(3)))]))
    assert "one each" in refusal(decode_pack, payload([*members.items(), ("k.tokens.npy", members["k.tokens.npy"])]))
    assert "one each" in refusal(decode_pack, payload([("k.tokens.pkl", b"")]))
    other = {name.replace("k.t", "j.t"): data for name, data in members.items()}
    assert "of keys ['j', 'k']" in refusal(decode_pack, payload(other.items()))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.DIRTYPE])
def test_a_member_that_is_no_file_is_refused(kind):
    member = tarfile.TarInfo("k.tokens.npy")
    member.type = kind
    assert "must be a file" in refusal(decode_pack, member.tobuf(tarfile.USTAR_FORMAT))


@given(st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_refused(length):
    refusal(decode_pack, GOOD[:length])


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_gives_a_pack_or_an_input_error(position, flip):
    damaged = bytearray(GOOD)
    damaged[position] ^= flip
    try:
        decode_pack(bytes(damaged))
    except InputError as error:
        assert "\n" not in str(error)
