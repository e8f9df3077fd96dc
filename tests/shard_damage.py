"""A data folder, and every kind of damage to one of its shards."""

import io
import itertools
import json
import os
import tarfile
import zlib

import numpy as np

from transfusion_fast.data.index import INDEX_NAME, file_sha256, parse_index, read_index, schema_of
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment, make_pack
from transfusion_fast.data.shards import PackTable, encode_table, padded, read_table, tar_ending
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.inspect import verify

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
SCHEMA = schema_of(64, ByteTokenizer().describe(), (GREY,))
SHARD = "shard-000001.tar"
TRUNCATIONS = 20


def documents(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        caption = TextSegment(rng.integers(0, 256, 9, dtype=np.int32))
        yield caption, ImageSegment(rng.integers(0, 256, (4, 6, 1), dtype=np.uint8))


def small_pack(number):
    """Return a pack of one caption and one image that hold its number, 9 positions in all."""
    caption = TextSegment(np.arange(number, number + 3, dtype=np.int32))
    return make_pack([(caption, ImageSegment(np.full((2, 4, 1), number, np.uint8)))], (GREY,))


def assert_same_pack(got, expected):
    for field in ("tokens", "segments", "latents"):
        np.testing.assert_array_equal(getattr(got, field), getattr(expected, field), strict=True)


def write_folder(folder, seed=0):
    prepare(
        list(documents(seed)), folder,
        sequence_length=64, tokenizer=ByteTokenizer(), modalities=(GREY,), packs_per_shard=5,
    )  # fmt: skip
    return folder


def patch(folder, start, data):
    path = folder / SHARD
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)


def flip(folder, at):
    patch(folder, at, bytes([(folder / SHARD).read_bytes()[at] ^ 0x10]))


def members(folder):
    with tarfile.open(folder / SHARD) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]


def rewrite(folder, entries):
    """Replace the shard by a plain tar of these (name, data)."""
    with tarfile.open(folder / SHARD, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def rewrite_packs(folder, entries):
    """Replace the shard, with a table and an index that match it, so that only decoding can fail."""
    rewrite(folder, entries)
    content, ends, position = (folder / SHARD).read_bytes(), {}, 0
    for name, data in entries:
        position += tarfile.BLOCKSIZE + padded(len(data))
        ends[name.partition(".")[0]] = position
    spans = itertools.pairwise([0, *ends.values()])
    rows = np.array([(end, zlib.crc32(content[start:end])) for start, end in spans])
    table = encode_table(PackTable(SCHEMA, rows))
    (folder / SHARD).write_bytes(content[:position] + table + tar_ending(position + len(table)))
    align_index(folder)


def align_index(folder):
    path = folder / SHARD
    content, table = path.read_bytes(), read_table(path)
    packs, begin = len(table.rows), table.ends[-1]
    end = begin + tarfile.BLOCKSIZE + padded(32 + 16 * packs)
    crc32 = zlib.crc32(content[begin:end])
    edit_index(
        folder, bytes=len(content), sha256=file_sha256(path), packs=packs, table=begin, table_crc32=crc32
    )  # fmt: skip


def replace_member(folder, data, number=3):
    *entries, _ = members(folder)
    rewrite_packs(folder, [(name, data if i == number else old) for i, (name, old) in enumerate(entries)])


def pack_start(folder, number):
    return read_table(folder / SHARD).span(number)[0]


def table_row_start(folder, number):
    return read_index(folder).shards[1].table + tarfile.BLOCKSIZE + 32 + 16 * number


def other_checksum_in_the_table(folder):
    flip(folder, table_row_start(folder, 2) + 8)
    align_index(folder)


def rewrite_row(folder, number, end=None, crc32=None):
    """Change a row of the table, and the index as if the row were right."""
    for column, value in enumerate((end, crc32)):
        if value is not None:
            patch(folder, table_row_start(folder, number) + 8 * column, value.to_bytes(8, "little", signed=True))
    begin, stop = read_index(folder).shards[1].table_span
    content = (folder / SHARD).read_bytes()
    edit_index(folder, sha256=file_sha256(folder / SHARD), table_crc32=zlib.crc32(content[begin:stop]))


def rewrite_schema(folder):
    flip(folder, table_row_start(folder, 0) - 1)
    rewrite_row(folder, 0)


def rewrite_ends(folder, *ends):
    for number, end in enumerate(ends):
        rewrite_row(folder, number, end=end)


def shard_without_its_table(folder):
    rewrite(folder, members(folder)[:-1])


def shard_of_another_folder(folder):
    other = write_folder(folder.with_name("another"), seed=1)
    (folder / SHARD).write_bytes((other / SHARD).read_bytes())


def append_header(folder, **fields):
    """Insert a member that no shard has, with a valid header, before the end blocks."""
    member = tarfile.TarInfo("x.npy")
    for name, value in fields.items():
        setattr(member, name, value)
    end = read_index(folder).shards[1].table
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:end] + member.tobuf(tarfile.GNU_FORMAT) + content[end:])


def truncate_at_fraction(part):
    def damage(folder):
        os.truncate(folder / SHARD, (folder / SHARD).stat().st_size * part // TRUNCATIONS)

    return damage


def truncate_between_packs(folder):
    os.truncate(folder / SHARD, pack_start(folder, 2))


def truncate_between_members(folder):
    """Truncate after the first of a pack's three files."""
    start = pack_start(folder, 2)
    with (folder / SHARD).open("rb") as stream:
        stream.seek(start)
        size = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "strict").size
    os.truncate(folder / SHARD, start + tarfile.BLOCKSIZE + padded(size))


def truncate_before_the_end_blocks(folder):
    os.truncate(folder / SHARD, read_index(folder).shards[1].table_span[1])


def edit_index(folder, **changes):
    entry = json.loads((folder / INDEX_NAME).read_text())
    entry["shards"][1] |= changes
    (folder / INDEX_NAME).write_text(json.dumps(entry))


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def absurd_shape():
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    return b"\x93NUMPY\x01\x00" + len(header.ljust(117) + b"\n").to_bytes(2, "little") + header.ljust(117) + b"\n"


def rename_key(folder, like):
    """Give the third pack the key of the member `like`."""
    entries = members(folder)
    old, new = (entries[number][0].partition(".")[0] for number in (6, like))
    rewrite(folder, [(name.replace(old, new), data) for name, data in entries])


IN_PACKS = {
    **{f"truncated at {part}/{TRUNCATIONS}": truncate_at_fraction(part) for part in range(TRUNCATIONS)},
    "truncated between packs": truncate_between_packs,
    "truncated between members of a pack": truncate_between_members,
    "header flipped": lambda folder: flip(folder, pack_start(folder, 1) + 3),
    "checksum of a header flipped": lambda folder: flip(folder, pack_start(folder, 1) + 150),
    "payload flipped": lambda folder: flip(folder, pack_start(folder, 1) + 512 + 140),
    "block of zeros": lambda folder: patch(folder, pack_start(folder, 1), bytes(512)),
    "empty file": lambda folder: (folder / SHARD).write_bytes(b""),
    "missing file": lambda folder: (folder / SHARD).unlink(),
    "npy with a pickle": lambda folder: replace_member(folder, npy(np.array([{"a": 1}], dtype=object))),
    "npy of absurd shape": lambda folder: replace_member(folder, absurd_shape()),
    "equal keys of neighbours": lambda folder: rename_key(folder, 3),
    "equal keys of distant packs": lambda folder: rename_key(folder, 0),
    "shard of another folder": shard_of_another_folder,
    "zeros from a pack on": lambda folder: patch(
        folder, (start := pack_start(folder, 2)), bytes((folder / SHARD).stat().st_size - start)
    ),
    "table flipped": lambda folder: flip(folder, table_row_start(folder, 1)),
    "header of the table flipped": lambda folder: flip(folder, read_index(folder).shards[1].table + 3),
    "table of zeros": lambda folder: patch(folder, table_row_start(folder, 0), bytes(16 * 5)),
    "table with another checksum": other_checksum_in_the_table,
    "table of ends that wrap around": lambda folder: rewrite_ends(folder, 10**12, -(2**63), -1),
    "table of another schema": lambda folder: rewrite_schema(folder),
    "table of falling ends": lambda folder: rewrite_ends(folder, 6144, 3072),
    "table of a checksum beyond 32 bits": lambda folder: rewrite_row(folder, 1, crc32=2**40),
    "no table": shard_without_its_table,
    "a header of a hundred terabytes": lambda folder: append_header(folder, size=10**14),
    "a long name of a hundred terabytes": lambda folder: append_header(folder, size=10**14, type=b"L"),
    "a link": lambda folder: append_header(folder, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "index with an absurd size": lambda folder: edit_index(folder, bytes=10**15, table=10**14),
    "index with another table": lambda folder: edit_index(folder, table=read_index(folder).shards[1].table + 512),
    "index with another checksum": lambda folder: edit_index(folder, table_crc32=0),
    "index with another size": lambda folder: edit_index(folder, bytes=10**9),
}
ELSEWHERE = {
    "no end blocks": truncate_before_the_end_blocks,
    "index with another sha256": lambda folder: edit_index(folder, sha256="0" * 64),
}
COUNTS = {  # shifts the numbers of packs in other shards
    "index with fewer packs": lambda folder: edit_index(folder, packs=4),
    "index with one pack": lambda folder: edit_index(folder, packs=1),
}


def findings_of(folder):
    found = [finding for findings in verify(folder, parse_index(folder)) for finding in findings]
    assert all("\n" not in finding for finding in found)
    return found
