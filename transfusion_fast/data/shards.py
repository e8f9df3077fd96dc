"""Packs as WebDataset shards: plain uncompressed tars, one sample a pack, three npy files a sample, no pickles.

Behind the packs lies the shard's table, by which any of them is found and checked, and which tells shards apart that
look alike and mean something else. So the index of a folder has a line a shard, however many packs there are. The
table's name is of the kind that WebDataset passes over as metadata.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds

from transfusion_fast.data.pack import Pack
from transfusion_fast.errors import InputError

PACKS_PER_SHARD = 1024
MAX_PACKS = 1 << 20
"""Of a shard: what an index says is believed so far that memory is taken for it."""
LEAST_BYTES = 3 * 2 * tarfile.BLOCKSIZE
"""That any pack takes in a tar: three headers, and a block behind each."""
_DTYPES = {
    "tokens": (np.dtype(np.int32),),
    "segments": (np.dtype(np.int32),),
    "latents": (np.dtype(np.uint8), np.dtype(np.float16)),
}
_NDIM = {"tokens": 1, "segments": 2, "latents": 1}
TABLE = "__packs__"
SCHEMA_BYTES, _ROW_BYTES = 32, 16  # of the table: first the one, then of each pack the other


@dataclass(frozen=True, eq=False)
class PackTable:
    """What is known of a shard's packs, which follow each other from byte 0."""

    schema: bytes
    """Digest of what makes sense of the packs' numbers."""
    rows: np.ndarray
    """Of each pack the byte it ends before and its crc32, int64 [n, 2]."""

    @property
    def ends(self) -> list[int]:
        """The byte that each pack ends before."""
        return self.rows[:, 0].tolist()

    def span(self, place: int) -> tuple[int, int]:
        """First and end byte of a pack, tar headers included."""
        return int(self.rows[place - 1, 0]) if place else 0, int(self.rows[place, 0])

    def check(self, place: int, payload: bytes) -> None:
        """InputError where these are not the bytes of that pack."""
        start, end = self.span(place)
        if len(payload) != end - start:
            raise InputError(f"pack must have {end - start} bytes, got {len(payload)}")
        if (crc32 := zlib.crc32(payload)) != self.rows[place, 1]:
            raise InputError(f"checksum of its bytes must be {self.rows[place, 1]}, got {crc32}")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard."""

    file: str
    bytes: int
    sha256: str
    packs: int
    table: int
    """Byte that its table begins at, and its packs end before."""
    table_crc32: int
    """Of the table, tar header included."""

    @property
    def table_span(self) -> tuple[int, int]:
        """First and end byte of the table, tar header included."""
        return self.table, self.table + table_bytes(self.packs)


def write_shard(packs: Iterable[Pack], folder: Path, number: int, schema: bytes) -> ShardInfo:
    """Write the shard of that number, and return its entry of the index; it gets its name once it is on disk.

    Equal packs give equal bytes. `schema` is a digest of `SCHEMA_BYTES` bytes.
    """
    name = f"shard-{number:06d}.tar"
    staged = folder / f".{name}.partial"
    sha256, size = hashlib.sha256(), 0
    rows: list[tuple[int, int]] = []
    with staged.open("wb") as stream:

        def append(data: bytes) -> int:
            nonlocal size
            stream.write(data)
            sha256.update(data)
            size += len(data)
            return zlib.crc32(data)

        for i, pack in enumerate(packs):
            crc32 = append(_encode_pack(f"{number:06d}-{i:06d}", pack))
            rows.append((size, crc32))
        table = size
        table_crc32 = append(encode_table(PackTable(schema, np.array(rows, np.int64).reshape(-1, 2))))
        append(tar_ending(size))
        stream.flush()
        os.fsync(stream.fileno())
    staged.rename(folder / name)
    return ShardInfo(name, size, sha256.hexdigest(), len(rows), table, table_crc32)


def _encode_pack(key: str, pack: Pack) -> bytes:
    """Return the tar members of a pack, headers included."""
    sample: dict[str, str | bytes] = {"__key__": key}
    for name in _DTYPES:
        array = io.BytesIO()
        np.save(array, np.ascontiguousarray(getattr(pack, name)), allow_pickle=False)
        sample[f"{name}.npy"] = array.getvalue()
    stream = io.BytesIO()
    with wds.TarWriter(stream, encoder=False, mtime=0, user="root", group="root", mode=0o644) as writer:
        writer.write(sample)
        end = writer.tarstream.offset
    return stream.getvalue()[:end]


def encode_table(table: PackTable) -> bytes:
    """Return the tar member of a table, header included; the inverse of `decode_table`."""
    assert len(table.schema) == SCHEMA_BYTES
    data = table.schema + table.rows.astype("<i8").tobytes()
    member = tarfile.TarInfo(TABLE)
    member.size, member.uname, member.gname = len(data), "root", "root"
    return member.tobuf(tarfile.USTAR_FORMAT) + data.ljust(padded(len(data)), b"\0")


def tar_ending(size: int) -> bytes:
    """Return the zeros that end a tar whose members take `size` bytes."""
    end = 2 * tarfile.BLOCKSIZE
    return bytes(end + -(size + end) % tarfile.RECORDSIZE)


def padded(size: int) -> int:
    """Bytes that `size` bytes of data take in a tar: whole blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def table_bytes(packs: int) -> int:
    """What the table of so many packs takes in a tar, header included."""
    return tarfile.BLOCKSIZE + padded(SCHEMA_BYTES + packs * _ROW_BYTES)


def decode_table(payload: bytes, packs: int, end: int) -> PackTable:
    """The table whose tar member, header included, is `payload`: of so many packs, which end before byte `end`.

    InputError for anything else.
    """
    members = dict(_tar_members(payload))
    if members.keys() != {TABLE} or len(members[TABLE]) != SCHEMA_BYTES + packs * _ROW_BYTES:
        raise InputError(f"table must be one file {TABLE} of {packs} packs, got {sorted(members)!r:.80}")
    rows = np.frombuffer(members[TABLE][SCHEMA_BYTES:], "<i8").reshape(packs, 2)
    ends, crc32 = rows.T
    if not (ends[0] > 0 and (ends[1:] > ends[:-1]).all() and ends[-1] == end):
        raise InputError(f"packs of the table must follow each other up to byte {end}, where it begins; they do not")
    if ((crc32 < 0) | (crc32 >> 32 > 0)).any():
        raise InputError("checksums of the table must be of 32 bits, and are not")
    return PackTable(bytes(members[TABLE][:SCHEMA_BYTES]), rows)


def decode_pack(payload: bytes) -> Pack:
    """The pack whose three tar members, headers included, are `payload`; its arrays are its own.

    Nothing is unpickled and no length is believed; InputError for anything but what `write_shard` writes.
    """
    arrays: dict[str, np.ndarray] = {}
    keys = set()
    for name, data in _tar_members(payload):
        key, _, extension = name.partition(".")
        field = extension.removesuffix(".npy")
        if extension != f"{field}.npy" or field not in _DTYPES or field in arrays:
            raise InputError(f"members of a pack must be one each of tokens, segments and latents .npy, got {name!r}")
        keys.add(key)
        arrays[field] = _read_npy(field, data)
    if len(arrays) < len(_DTYPES) or len(keys) != 1:
        raise InputError(f"members of a pack must be three of one key, got {sorted(arrays)} of keys {sorted(keys)}")
    return Pack(**arrays)


def _tar_members(payload: bytes) -> Iterator[tuple[str, memoryview]]:
    view, position = memoryview(payload), 0
    while position < len(view):
        start = position + tarfile.BLOCKSIZE
        try:
            member = tarfile.TarInfo.frombuf(payload[position:start], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeError) as error:
            raise InputError(f"bytes at {position} of a pack must be a tar header, and are not") from error
        position = start + padded(member.size)
        if member.type != tarfile.REGTYPE or member.size < 0 or position > len(view):
            raise InputError(
                f"member {member.name!r} must be a file within the {len(view)} bytes of its pack, "
                f"got type {member.type!r} of {member.size} bytes"
            )
        yield member.name, view[start : start + member.size]


def _read_npy(field: str, data: memoryview) -> np.ndarray:
    shape, dtype, start = _read_npy_header(field, data)
    body = data[start:]
    if math.prod(shape) * dtype.itemsize != len(body):
        raise InputError(f"{field}.npy of {dtype} and shape {shape} must hold just its values, got {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape).copy()


def _read_npy_header(field: str, data: memoryview) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and the byte at which the values start; no dimension is larger than the data."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # the header is a Python literal: a hostile one may make its parser raise anything
        raise InputError(f"{field}.npy must have a header of numpy.save, and has not") from error
    if version != (1, 0) or fortran_order or dtype not in _DTYPES[field]:
        expected = " or ".join(map(str, _DTYPES[field]))
        raise InputError(f"{field}.npy must be version 1.0, {expected}, C order, got {version}, {dtype}")
    if len(shape) != _NDIM[field] or not all(0 <= extent <= len(data) for extent in shape):
        raise InputError(f"{field}.npy must be of {_NDIM[field]} dimensions that fit its {len(data)} bytes, and is not")
    return tuple(map(int, shape)), dtype, stream.tell()


def read_table(shard: Path) -> PackTable:
    """The table of a shard, once the whole tar was walked through, and is as the table says.

    InputError where the tar is not whole, holds anything but plain files, holds no packs, comes back to a key, or does
    not end in its table.
    """
    samples = _samples(shard)
    key, start, end = samples.pop()
    if key != TABLE or not samples:
        raise InputError(f"shard {shard} must hold packs and, at its end, their table {TABLE}; prepare the data again")
    with shard.open("rb") as stream:
        stream.seek(start)
        payload = stream.read(end - start)
    try:
        table = decode_table(payload, len(samples), start)
    except InputError as error:
        raise InputError(f"shard {shard} cannot be used: {error}; copy it again") from error
    if table.ends != [end for _, _, end in samples]:
        raise InputError(f"packs of shard {shard} must lie where its table says, and do not; copy it again")
    return table


def _samples(shard: Path) -> list[tuple[str, int, int]]:
    """(key, first byte, end byte) of each sample of a shard: members that follow each other under one key."""
    samples: list[tuple[str, int, int]] = []
    keys: set[str] = set()
    for key, start, end in _files(shard):
        if samples and key == samples[-1][0]:
            samples[-1] = (key, samples[-1][1], end)
            continue
        if key in keys:
            raise InputError(f"keys of shard {shard} must differ, got {key!r:.80} twice; prepare the data again")
        keys.add(key)
        samples.append((key, start, end))
    if not samples:
        raise InputError(f"shard {shard} must hold packs, and holds none; copy it again or remove it")
    return samples


def _files(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(key, first byte, end byte) of each file, up to the zeros that end a tar. tarfile would stop at any damage."""
    total, position = shard.stat().st_size, 0
    with shard.open("rb") as stream:
        while True:
            stream.seek(position)
            header = stream.read(tarfile.BLOCKSIZE)
            if not any(header):
                break
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except (tarfile.HeaderError, UnicodeError) as error:
                raise InputError(
                    f"shard {shard} must have a tar header at byte {position}, and has not; copy it again"
                ) from error
            end = position + tarfile.BLOCKSIZE + padded(member.size)
            if member.type != tarfile.REGTYPE or member.size < 0 or end > total:
                raise InputError(
                    f"member {member.name!r:.80} of shard {shard} must be a file that ends within its {total} bytes, "
                    f"got type {member.type!r} of {member.size} bytes; copy it again"
                )
            yield member.name.partition(".")[0], position, end
            position = end
        stream.seek(position)
        least, most = 2 * tarfile.BLOCKSIZE, 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
        rest = stream.read(most + 1)
    if not least <= len(rest) <= most or any(rest):
        raise InputError(
            f"shard {shard} must end in some zeros after byte {position}, and does not; "
            "it is truncated or damaged there: copy it again"
        )
