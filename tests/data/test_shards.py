"""Shards on disk: plain WebDataset tars, reproducible, and decoded without trusting a byte."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment, make_pack
from transfusion_fast.data.shards import decode_pack, write_shard
from transfusion_fast.errors import InputError

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
SCHEMA = bytes(range(32))
FIELDS = ("tokens", "segments", "latents")


def make(number):
    caption = TextSegment(np.arange(number, number + 3, dtype=np.int32))
    return make_pack([(caption, ImageSegment(np.full((2, 4, 1), number, np.uint8)))], (GREY,))


def assert_same(got, expected):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(got, field), getattr(expected, field), strict=True)


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npy_claiming(header, body=b""):
    """An npy file of version 1.0 with any header text."""
    header = header.encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def payload(members):
    """The bytes of tar members as they lie in a shard: no end-of-archive blocks."""
    blocks = []
    for name, data in members:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        blocks += [member.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join(blocks)


def good_members(pack):
    return {f"k.{field}.npy": npy(getattr(pack, field)) for field in FIELDS}


GOOD = payload(good_members(make(1)).items())


def refusal(data):
    with pytest.raises(InputError) as error:
        decode_pack(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shards_are_read_by_a_plain_webdataset(tmp_path):
    packs = [make(number) for number in range(5)]
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
        file = write_shard(map(make, range(3)), tmp_path / run, 0, SCHEMA).file
        contents.append((tmp_path / run / file).read_bytes())
    assert contents[0] == contents[1]


def test_a_shard_is_named_only_once_it_is_whole(tmp_path):
    def packs():
        yield from map(make, range(3))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_shard(packs(), tmp_path, 0, SCHEMA)
    assert not list(tmp_path.glob("*.tar"))


def test_a_payload_gives_its_pack_in_arrays_of_its_own():
    pack = decode_pack(GOOD)
    assert_same(pack, make(1))
    pack.tokens[0] = 9  # writable


def test_a_pack_without_text_or_images_is_decoded():
    only_text = make_pack([(TextSegment(np.array([1], np.int32)),)], (GREY,))
    assert_same(decode_pack(payload(good_members(only_text).items())), only_text)
    only_image = make_pack([(ImageSegment(np.zeros((2, 2, 1), np.uint8)),)], (GREY,))
    assert_same(decode_pack(payload(good_members(only_image).items())), only_image)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_refused_and_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    array = np.empty(1, dtype=object)
    array[0] = Trap(sprung)
    for bait in (npy(array, allow_pickle=True), pickle.dumps(Trap(sprung))):
        assert "tokens.npy must" in refusal(payload({**good_members(make(1)), "k.tokens.npy": bait}.items()))
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
    assert "tokens.npy" in refusal(payload({**good_members(make(1)), "k.tokens.npy": tokens}.items()))


def test_other_members_than_the_three_are_refused():
    members = good_members(make(1))
    assert "three of one key" in refusal(payload(list(members.items())[:2]))
    assert "three of one key" in refusal(b"")
    assert "one each" in refusal(payload([*members.items(), ("k.extra.npy", npy(np.arange(3)))]))
    assert "one each" in refusal(payload([*members.items(), ("k.tokens.npy", members["k.tokens.npy"])]))
    assert "one each" in refusal(payload([("k.tokens.pkl", b"")]))
    other = {name.replace("k.t", "j.t"): data for name, data in members.items()}
    assert "of keys ['j', 'k']" in refusal(payload(other.items()))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.DIRTYPE])
def test_a_member_that_is_no_file_is_refused(kind):
    member = tarfile.TarInfo("k.tokens.npy")
    member.type = kind
    assert "must be a file" in refusal(member.tobuf(tarfile.USTAR_FORMAT))


@given(st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_refused(length):
    refusal(GOOD[:length])


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_gives_a_pack_or_an_input_error(position, flip):
    damaged = bytearray(GOOD)
    damaged[position] ^= flip
    try:
        decode_pack(bytes(damaged))
    except InputError as error:
        assert "\n" not in str(error)
