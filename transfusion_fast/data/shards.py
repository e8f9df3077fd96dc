"""Packs as WebDataset shards: plain uncompressed tars, one sample a pack, three npy files a sample, no pickles.

The last file of a shard is its table, which gives the location and checksum of every pack, and a digest of the settings
under which their numbers have a meaning. The index of a folder therefore has one line a shard, however many packs
there are. WebDataset skips the table, as its name is that of metadata.
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
from typing import Annotated, BinaryIO

import numpy as np
import webdataset as wds
from pydantic import Field

from transfusion_fast.data.pack import Pack
from transfusion_fast.errors import InputError

PACKS_PER_SHARD = 1024
MAX_PACKS = 1 << 20
"""Packs of a shard, at most: memory for their table is allocated before it is read."""
PLAIN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
"""File names that an index may contain: none leads out of its folder or has a special meaning to a reader of tars."""
TABLE = "__packs__"
SCHEMA_BYTES, _ROW_BYTES = 32, 16  # the table is the schema digest, then a row for each pack
_MIN_PACK_BYTES = 3 * 2 * tarfile.BLOCKSIZE  # three headers, each with at least one block of data
_DTYPES = {
    "tokens": (np.dtype(np.int32),),
    "segments": (np.dtype(np.int32),),
    "latents": (np.dtype(np.uint8), np.dtype(np.float16)),
}
_NDIM = {"tokens": 1, "segments": 2, "latents": 1}


@dataclass(frozen=True, eq=False)
class PackTable:
    """Location and checksum of a shard's packs, which lie end to end from byte 0."""

    schema: bytes
    """Digest of the settings that give the packs' numbers their meaning, 32 bytes."""
    rows: np.ndarray
    """End byte and crc32 of each pack, int64 [n, 2]."""

    @property
    def ends(self) -> list[int]:
        """End byte of each pack."""
        return self.rows[:, 0].tolist()

    def span(self, number: int) -> tuple[int, int]:
        """Return the first and the end byte of a pack, tar headers included."""
        return int(self.rows[number - 1, 0]) if number else 0, int(self.rows[number, 0])

    def check(self, number: int, payload: bytes) -> None:
        """Raise InputError if `payload` is not the bytes of that pack."""
        start, end = self.span(number)
        if len(payload) != end - start:
            raise InputError(f"pack must have {end - start} bytes, got {len(payload)}")
        if (crc32 := zlib.crc32(payload)) != self.rows[number, 1]:
            raise InputError(f"checksum of its bytes must be {self.rows[number, 1]}, got {crc32}")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard, as the index of its folder describes it."""

    file: Annotated[str, Field(pattern=PLAIN_NAME)]
    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    packs: Annotated[int, Field(ge=1, le=MAX_PACKS)]
    table: Annotated[int, Field(ge=0, lt=1 << 63)]
    """Offset of the table in bytes, which is where the packs end."""
    table_crc32: Annotated[int, Field(ge=0, lt=1 << 32)]
    """Checksum of the table, tar header included."""

    def __post_init__(self) -> None:
        """Raise InputError for a table that overlaps the packs or the end of the shard."""
        if self.table < self.packs * _MIN_PACK_BYTES or self.table_span[1] > self.bytes:
            raise InputError(
                f"table of {self.file} must lie behind its {self.packs} packs and within its {self.bytes} bytes, "
                f"got {self.table_span[0]}..{self.table_span[1]}; prepare the data again"
            )

    @property
    def table_span(self) -> tuple[int, int]:
        """First and end byte of the table, tar header included."""
        return self.table, self.table + table_bytes(self.packs)


def write_shard(packs: Iterable[Pack], folder: Path, number: int, schema: bytes) -> ShardInfo:
    """Write the shard of that number, and return its entry of the index; it gets its name once it is on disk.

    Equal packs give equal bytes. `schema` is a digest of `SCHEMA_BYTES` bytes.
    """
    name = f"shard-{number:06d}.tar"
    partial = folder / f".{name}.partial"
    sha256, size = hashlib.sha256(), 0
    rows: list[tuple[int, int]] = []
    with partial.open("wb") as stream:

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
    partial.rename(folder / name)
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
    """Return the bytes that `size` bytes of data take in a tar, which consists of blocks of 512."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def table_bytes(packs: int) -> int:
    """Return the bytes that the table of `packs` packs takes in a tar, header included."""
    return tarfile.BLOCKSIZE + padded(SCHEMA_BYTES + packs * _ROW_BYTES)


def decode_table(payload: bytes, packs: int, end: int) -> PackTable:
    """Decode the tar member, header included, that holds the table of `packs` packs which end at byte `end`.

    Raises:
        InputError: The payload is anything else.
    """
    members = dict(_payload_members(payload))
    if members.keys() != {TABLE} or len(members[TABLE]) != SCHEMA_BYTES + packs * _ROW_BYTES:
        raise InputError(f"table must be one file {TABLE} of {packs} packs, got {sorted(members)!r:.80}")
    rows = np.frombuffer(members[TABLE][SCHEMA_BYTES:], "<i8").reshape(packs, 2)
    ends = rows[:, 0]
    if not (ends[0] > 0 and (ends[1:] > ends[:-1]).all() and ends[-1] == end):
        raise InputError(f"offsets in the table must increase and end at byte {end}, got {ends.tolist()!r:.60}")
    return PackTable(bytes(members[TABLE][:SCHEMA_BYTES]), rows)


def decode_pack(payload: bytes) -> Pack:
    """Decode the three tar members of a pack, headers included, into arrays of their own memory.

    Nothing is unpickled, and no length is trusted.

    Raises:
        InputError: The payload is not what `write_shard` writes.
    """
    arrays: dict[str, np.ndarray] = {}
    keys = set()
    for name, data in _payload_members(payload):
        key, _, extension = name.partition(".")
        field = extension.removesuffix(".npy")
        if extension != f"{field}.npy" or field not in _DTYPES or field in arrays:
            raise InputError(f"members of a pack must be one each of tokens, segments and latents .npy, got {name!r}")
        keys.add(key)
        arrays[field] = _read_npy(field, data)
    if len(arrays) < len(_DTYPES) or len(keys) != 1:
        raise InputError(f"members of a pack must be three of one key, got {sorted(arrays)} of keys {sorted(keys)}")
    return Pack(**arrays)


def _payload_members(payload: bytes) -> Iterator[tuple[str, memoryview]]:
    """Yield name and data of each member of a part of a tar in memory."""
    view, position = memoryview(payload), 0
    while position < len(view):
        start = position + tarfile.BLOCKSIZE
        member, position = _parse_header(payload[position:start], position, len(view))
        yield member.name, view[start : start + member.size]


def _parse_header(header: bytes, start: int, limit: int) -> tuple[tarfile.TarInfo, int]:
    """Return the tar member whose header is at byte `start`, and the byte where it ends, at most `limit`."""
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise InputError(f"byte {start} must begin a tar header, got {error}") from error
    end = start + tarfile.BLOCKSIZE + padded(member.size)
    if member.type != tarfile.REGTYPE or member.size < 0 or end > limit:
        raise InputError(
            f"member {member.name!r:.80} must be a file that ends within {limit} bytes, "
            f"got type {member.type!r} of {member.size} bytes"
        )
    return member, end


def _read_npy(field: str, data: memoryview) -> np.ndarray:
    """Return the array of an npy file, after checking that no dimension is larger than the data."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # the header is a Python literal: a malicious one may make its parser raise anything
        raise InputError(f"{field}.npy must have a header of numpy.save, got {bytes(data[:80])!r:.80}") from error
    if version != (1, 0) or fortran_order or dtype not in _DTYPES[field]:
        expected = " or ".join(map(str, _DTYPES[field]))
        raise InputError(f"{field}.npy must be version 1.0, {expected}, C order, got {version}, {dtype}")
    body = data[stream.tell() :]
    if len(shape) != _NDIM[field] or not all(0 <= extent <= len(data) for extent in shape):
        raise InputError(  # without the shape, which may have too many digits to print
            f"{field}.npy must have {_NDIM[field]} dimensions that fit its {len(data)} bytes, got {len(shape)} others"
        )
    shape = tuple(map(int, shape))
    if math.prod(shape) * dtype.itemsize != len(body):
        raise InputError(f"{field}.npy of {dtype} and shape {shape} must hold just its values, got {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape).copy()


def read_table(shard: Path) -> PackTable:
    """Return the table of a shard, after reading all tar headers and comparing their offsets with the table.

    Raises:
        InputError: The tar is incomplete, holds anything but plain files, holds no packs, repeats a key, or does not
            end in its table.
    """
    try:
        with shard.open("rb") as stream:
            samples = _samples(stream)
            start, end = samples.pop(TABLE, (0, 0))
            if not samples or start != max(samples.values())[1]:
                raise InputError(f"it must hold packs and end in their table {TABLE}, got {len(samples)} packs")
            table = decode_table(_read_at(stream, start, end - start), len(samples), start)
        if table.ends != [end for _, end in samples.values()]:
            raise InputError("packs must lie at the offsets of the table, got others")
    except InputError as error:
        raise InputError(f"shard {shard} cannot be used: {error}; copy it again or prepare the data again") from error
    return table


def _samples(stream: BinaryIO) -> dict[str, tuple[int, int]]:
    """Return the first and end byte of each sample of a shard by key: consecutive files whose names begin alike.

    The module tarfile would stop at any damage without an error.
    """
    samples: dict[str, tuple[int, int]] = {}
    total, position, last = os.fstat(stream.fileno()).st_size, 0, ""
    while any(header := _read_at(stream, position, tarfile.BLOCKSIZE)):
        member, end = _parse_header(header, position, total)
        key = member.name.partition(".")[0]
        if key in samples and key != last:
            raise InputError(f"keys of its samples must differ, got {key!r:.80} twice")
        samples[key] = samples.get(key, (position, 0))[0], end
        last, position = key, end
    shortest, longest = 2 * tarfile.BLOCKSIZE, 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
    rest = _read_at(stream, position, longest + 1)
    if not shortest <= len(rest) <= longest or any(rest):
        raise InputError(
            f"it must end in {shortest} to {longest} zeros after byte {position}, got {len(rest)} bytes: it is "
            "truncated or damaged"
        )
    return samples


def _read_at(stream: BinaryIO, position: int, size: int) -> bytes:
    stream.seek(position)
    return stream.read(size)
