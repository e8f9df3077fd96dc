"""Packs as WebDataset shards: plain uncompressed tars, one sample a pack, two to four npy files a sample, no pickles.

The last file of a shard is its table, which gives the location and checksum of every pack, and a digest of the
tokenizer, modalities and pack length. The index of a folder therefore has one line a shard, however many packs
there are. WebDataset skips the table, as its name is that of metadata.
"""

from __future__ import annotations

import hashlib
import math
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field

from transfusion_fast.data.pack import SEGMENT_COLUMNS, Pack
from transfusion_fast.errors import InputError

PACKS_PER_SHARD = 1024
MAX_PACKS = 1 << 20
"""Packs of a shard, at most: memory for their table is allocated before it is read."""
PLAIN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
"""File names that an index may contain: none leads out of its folder or has a special meaning to a reader of tars."""
TABLE = "__packs__"
SCHEMA_BYTES, _ROW_BYTES = 32, 16  # the table is the schema digest, then a row for each pack
_FIELDS = ("latents", "segments", "tokens", "weights")  # files of a pack, in the order of a shard
_REQUIRED = ("segments", "tokens")  # weights are left out if all are 1, and latents if they are empty and uint8
_DTYPES = {"latents": ("|u1", "<f2"), "segments": ("<i4",), "tokens": ("|u1", "<u2", "<i4"), "weights": ("<f4",)}
_NPY_HEADER_BYTES = 128
_MIN_PACK_BYTES = len(_REQUIRED) * 2 * tarfile.BLOCKSIZE  # a header and at least one block of data each


@dataclass(frozen=True, eq=False)
class PackTable:
    """Location and checksum of a shard's packs, which lie end to end from byte 0."""

    schema: bytes
    """Digest of the settings that give the packs' numbers their meaning, 32 bytes."""
    rows: np.ndarray
    """End byte and crc32 of each pack, int64 [n, 2]."""

    @property
    def location(self) -> tuple[int, int]:
        """Offset of the table in its shard in bytes, and crc32 of its tar member."""
        return int(self.rows[-1, 0]), zlib.crc32(encode_table(self))

    def span(self, number: int) -> tuple[int, int]:
        """Return the first and the end byte of a pack, tar headers included."""
        return int(self.rows[number - 1, 0]) if number else 0, int(self.rows[number, 0])

    def decode(self, number: int, payload: bytes) -> Pack:
        """Return a pack from its bytes; raise InputError if they are corrupt."""
        start, end = self.span(number)
        if len(payload) != end - start:
            raise InputError(f"pack must have {end - start} bytes, got {len(payload)}")
        if (crc32 := zlib.crc32(payload)) != self.rows[number, 1]:
            raise InputError(f"checksum of its bytes must be {self.rows[number, 1]}, got {crc32}")
        return decode_pack(payload)


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
        return self.table, self.table + tarfile.BLOCKSIZE + padded(SCHEMA_BYTES + self.packs * _ROW_BYTES)


def write_shard(
    packs: Iterable[Pack], folder: Path, number: int, schema: bytes, tokens: DTypeLike = np.int32
) -> ShardInfo:
    """Write the shard of that number, and return its entry of the index; it gets its name once it is on disk.

    Equal packs give equal bytes. `schema` is a digest of `SCHEMA_BYTES` bytes. `tokens` is the dtype in which text ids
    are stored, which must hold all of them.
    """
    name = f"shard-{number:06d}.tar"
    partial = folder / f".{name}.partial"
    sha256 = hashlib.sha256()
    rows: list[tuple[int, int]] = []
    with partial.open("wb") as stream:
        for i, pack in enumerate(packs):
            stored = replace(pack, tokens=pack.tokens.astype(tokens))
            data = _encode_pack(f"{number:06d}-{i:06d}", stored)
            stream.write(data)
            sha256.update(data)
            rows.append((stream.tell(), zlib.crc32(data)))
        table = PackTable(schema, np.array(rows, np.int64))
        data = encode_table(table)
        data += tar_ending(stream.tell() + len(data))
        stream.write(data)
        sha256.update(data)
        size = stream.tell()
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(folder / name)
    return ShardInfo(name, size, sha256.hexdigest(), len(rows), *table.location)


def _encode_pack(key: str, pack: Pack) -> bytes:
    """Return the tar members of a pack, headers included."""
    members: list[bytes | memoryview] = []
    for field in _FIELDS:
        array = getattr(pack, field)
        if field in _REQUIRED or (array is not None and (array.size or array.dtype != np.uint8)):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            members += _tar_member(f"{key}.{field}.npy", _npy_header(array), content)
    return b"".join(members)


def _tar_member(name: str, *data: bytes | memoryview) -> list[bytes | memoryview]:
    """Return the parts of a file of a tar, its header first, as WebDataset's writer writes them."""
    member = tarfile.TarInfo(name)
    member.size, member.uname, member.gname = sum(map(len, data)), "root", "root"
    return [member.tobuf(tarfile.USTAR_FORMAT), *data, bytes(padded(member.size) - member.size)]


def _npy_header(array: np.ndarray) -> bytes:
    """Return the header that `numpy.save` writes before the values of a contiguous array."""
    header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + header.ljust(_NPY_HEADER_BYTES - 11).encode() + b"\n"


def encode_table(table: PackTable) -> bytes:
    """Return the tar member of a table, header included; the inverse of `decode_table`."""
    return b"".join(_tar_member(TABLE, table.schema, table.rows.astype("<i8").tobytes()))


def tar_ending(size: int) -> bytes:
    """Return the zeros that end a tar whose members take `size` bytes."""
    end = 2 * tarfile.BLOCKSIZE
    return bytes(end + -(size + end) % tarfile.RECORDSIZE)


def padded(size: int) -> int:
    """Return the bytes that `size` bytes of data take in a tar, which consists of blocks of 512."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def decode_table(payload: bytes, packs: int, end: int) -> PackTable:
    """Decode the tar member, header included, of the table of `packs` packs which end at byte `end`, or InputError."""
    data = payload[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + SCHEMA_BYTES + packs * _ROW_BYTES]
    rows = np.frombuffer(data[SCHEMA_BYTES : len(data) // _ROW_BYTES * _ROW_BYTES], "<i8").reshape(-1, 2)
    table = PackTable(data[:SCHEMA_BYTES], rows)
    if not packs or payload != encode_table(table):
        raise InputError(f"table must be one file {TABLE} of {packs} packs, got {payload[:100]!r:.80}")
    ends = rows[:, 0]
    if not (ends[0] > 0 and (ends[1:] > ends[:-1]).all() and ends[-1] == end):
        raise InputError(f"offsets in the table must increase and end at byte {end}, got {ends.tolist()!r:.60}")
    return table


def decode_pack(payload: bytes) -> Pack:
    """Decode the tar members of a pack, headers included, into arrays of their own memory; else raise InputError.

    Nothing is unpickled, and no length is trusted.
    """
    view, position = memoryview(payload), 0
    names: list[str] = []
    files: list[memoryview] = []
    while position < len(view):
        start = position + tarfile.BLOCKSIZE
        member, position = _parse_header(payload[position:start], position, len(view))
        names.append(member.name)
        files.append(view[start : start + member.size])
    key = names[0].partition(".")[0] if names else ""
    fields = [field for field in _FIELDS if field in _REQUIRED or f"{key}.{field}.npy" in names]
    if names != [f"{key}.{field}.npy" for field in fields]:
        raise InputError(f"files of a pack must be .npy for {', '.join(_FIELDS)} of one key, got {names!r:.80}")
    arrays = {field: _read_npy(field, data) for field, data in zip(fields, files, strict=True)}
    return Pack(**{"latents": np.empty(0, np.uint8), **arrays})


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
    """Return the array of an npy file. Its header is not parsed: it must be that of the array which the rest holds."""
    shape = (-1, len(SEGMENT_COLUMNS)) if field == "segments" else (-1,)
    body = data[_NPY_HEADER_BYTES:]
    for dtype in map(np.dtype, _DTYPES[field]):
        if len(body) % (dtype.itemsize * abs(math.prod(shape))) == 0:
            array = np.frombuffer(body, dtype).reshape(shape)
            if data[:_NPY_HEADER_BYTES] == _npy_header(array):
                return array.astype(np.int32) if field == "tokens" else array.copy()
    expected = " or ".join(_DTYPES[field])
    raise InputError(
        f"{field}.npy must hold {expected} of shape {shape} as numpy.save writes them, got {bytes(data[:80])!r:.80}"
    )


def read_table(shard: Path) -> PackTable:
    """Return the table of a shard, which is found by following its tar headers; the packs are not read.

    Raises:
        InputError: The tar is incomplete, holds anything but plain files, or does not end in the table of its packs.
    """
    packs, name, end = 0, "", 0
    try:
        with shard.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            while name != TABLE:
                start = stream.seek(end)
                member, end = _parse_header(stream.read(tarfile.BLOCKSIZE), start, size)
                name = member.name
                packs += name.endswith(".tokens.npy")
            stream.seek(start)
            table = decode_table(stream.read(end - start), packs, start)
            rest = stream.read(tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE)
        if rest != tar_ending(end):
            raise InputError(f"it must end in {len(tar_ending(end))} zeros after byte {end}, got {len(rest)} bytes")
    except InputError as error:
        raise InputError(f"shard {shard} cannot be used: {error}; copy it again or prepare the data again") from error
    return table
