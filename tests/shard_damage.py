"""A data folder, and every kind of damage to one of its shards."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from transfusion_fast.data.index import INDEX_NAME, parse_index, schema_of
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment, make_pack
from transfusion_fast.data.shards import PackTable, encode_table, padded, read_table, tar_ending
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.inspect import verify

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
SCHEMA = schema_of(64, ByteTokenizer().describe(), (GREY,))
SHARD = "shard-000001.tar"


class Planted:
    """A pickle that creates a file when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


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
    settings = {"sequence_length": 64, "tokenizer": ByteTokenizer(), "modalities": (GREY,), "packs_per_shard": 5}
    prepare(list(documents(seed)), folder, **settings)
    return folder


def edit_index(folder, shard=1, /, **changes):
    """Change fields of the entry of a shard in the index."""
    entry = json.loads((folder / INDEX_NAME).read_text())
    entry["shards"][shard] |= changes
    (folder / INDEX_NAME).write_text(json.dumps(entry))


def patch(folder, start, data):
    content = bytearray((folder / SHARD).read_bytes())
    content[start : start + len(data)] = data
    (folder / SHARD).write_bytes(content)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def members(folder):
    """Return the (name, data) of the shard's packs, three for each."""
    with tarfile.open(folder / SHARD) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive][:-1]


def tar_members(entries):
    """Return the bytes of (name, data) as in the middle of a tar."""
    blocks = []
    for name, data in entries:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        blocks += [member.tobuf(tarfile.USTAR_FORMAT), data.ljust(padded(len(data)), b"\0")]
    return b"".join(blocks)


def replace_shard(folder, content, table, shard=1):
    """Replace a shard by packs and any table, with an index that matches them."""
    member = encode_table(table)
    whole = content + member + tar_ending(len(content) + len(member))
    path = folder / parse_index(folder).shards[shard].file
    path.write_bytes(whole)
    sizes = {"bytes": len(whole), "packs": len(table.rows), "table": len(content)}
    edit_index(folder, shard, sha256=hashlib.sha256(whole).hexdigest(), table_crc32=zlib.crc32(member), **sizes)


def replace_packs(folder, entries):
    """Replace the packs of the shard by any files, so that only decoding can fail."""
    content, rows = b"", []
    for first in range(0, len(entries), 3):
        payload = tar_members(entries[first : first + 3])
        content += payload
        rows.append((len(content), zlib.crc32(payload)))
    replace_shard(folder, content, PackTable(SCHEMA, np.array(rows)))


def change_table(folder, where=None, value=None, schema=None, shard=1):
    """Change numbers of the table of a shard, or its schema, and the index as if they were right."""
    path = folder / parse_index(folder).shards[shard].file
    table = read_table(path)
    rows = table.rows.copy()
    if where is not None:
        rows[where] = value
    replace_shard(folder, path.read_bytes()[: table.location[0]], PackTable(schema or table.schema, rows), shard)


def pack_start(folder, number):
    return read_table(folder / SHARD).span(number)[0]


def table_start(folder):
    return parse_index(folder).shards[1].table


def shard_of_another_folder(folder):
    other = write_folder(folder.with_name("another"), seed=1)
    (folder / SHARD).write_bytes((other / SHARD).read_bytes())


def with_a_pickle(folder):
    *others, (name, _) = members(folder)
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    replace_packs(folder, [*others, (name, stream.getvalue())])


def insert_header(folder, **fields):
    """Insert a member that no shard has, with a valid header, before the table."""
    member = tarfile.TarInfo("x.npy")
    for name, value in fields.items():
        setattr(member, name, value)
    content, end = (folder / SHARD).read_bytes(), table_start(folder)
    (folder / SHARD).write_bytes(content[:end] + member.tobuf(tarfile.GNU_FORMAT) + content[end:])


def cut(where):
    """Return the damage of a shard that ends at byte `where(folder)`."""
    return lambda folder: os.truncate(folder / SHARD, where(folder))


IN_PACKS = {
    **{
        f"truncated at {part}/5": cut(lambda folder, part=part: (folder / SHARD).stat().st_size * part // 5)
        for part in range(5)
    },
    "truncated between packs": cut(lambda folder: pack_start(folder, 2)),
    "truncated between members of a pack": cut(lambda folder: pack_start(folder, 2) + 1024),
    "header flipped": lambda folder: flip(folder / SHARD, pack_start(folder, 1) + 3),
    "payload flipped": lambda folder: flip(folder / SHARD, pack_start(folder, 1) + 512 + 140),
    "block of zeros": lambda folder: patch(folder, pack_start(folder, 1), bytes(512)),
    "zeros from a pack on": lambda folder: patch(
        folder, (start := pack_start(folder, 2)), bytes((folder / SHARD).stat().st_size - start)
    ),
    "missing file": lambda folder: (folder / SHARD).unlink(),
    "npy with a pickle": with_a_pickle,
    "shard of another folder": shard_of_another_folder,
    "table flipped": lambda folder: flip(folder / SHARD, table_start(folder) + 512 + 32 + 16),
    "header of the table flipped": lambda folder: flip(folder / SHARD, table_start(folder) + 3),
    "table with another checksum": lambda folder: change_table(folder, (2, 1), 5),
    "table of a checksum beyond 32 bits": lambda folder: change_table(folder, (1, 1), 2**40),
    "table of ends that wrap around": lambda folder: change_table(folder, np.s_[:3, 0], (10**12, -(2**63), -1)),
    "table of falling ends": lambda folder: change_table(folder, np.s_[:2, 0], (6144, 3072)),
    "table of another schema": lambda folder: change_table(folder, schema=bytes(32)),
    "no table": lambda folder: (folder / SHARD).write_bytes(tar_members(members(folder)) + bytes(10240)),
    "a header of a hundred terabytes": lambda folder: insert_header(folder, size=10**14),
    "a long name of a hundred terabytes": lambda folder: insert_header(folder, size=10**14, type=b"L"),
    "a link": lambda folder: insert_header(folder, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "index with an absurd size": lambda folder: edit_index(folder, bytes=10**15, table=10**14),
    "index with another table": lambda folder: edit_index(folder, table=table_start(folder) + 512),
    "index with another checksum": lambda folder: edit_index(folder, table_crc32=0),
    "index with another size": lambda folder: edit_index(folder, bytes=10**9),
}
ELSEWHERE = {
    "no end blocks": cut(lambda folder: parse_index(folder).shards[1].table_span[1]),
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
