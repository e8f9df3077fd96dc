"""Packs as WebDataset shards: plain uncompressed tars, one sample a pack, three npy files a sample, no pickles."""

import io
import itertools
import math
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import webdataset as wds

from transfusion_fast.data.pack import Pack
from transfusion_fast.errors import InputError

PACKS_PER_SHARD = 1024
_DTYPES = {
    "tokens": (np.dtype(np.int32),),
    "segments": (np.dtype(np.int32),),
    "latents": (np.dtype(np.uint8), np.dtype(np.float16)),
}
_NDIM = {"tokens": 1, "segments": 2, "latents": 1}


def write_shards(packs: Iterable[Pack], folder: Path, packs_per_shard: int = PACKS_PER_SHARD) -> list[str]:
    """Write shard-000000.tar, shard-000001.tar, ... into `folder`, and return their names."""
    if packs_per_shard < 1:
        raise InputError(f"packs per shard must be positive, got {packs_per_shard}; give a larger number")
    remaining = iter(packs)
    return [
        write_shard(itertools.chain([first], itertools.islice(remaining, packs_per_shard - 1)), folder, number)
        for number, first in enumerate(remaining)
    ]


def write_shard(packs: Iterable[Pack], folder: Path, number: int) -> str:
    """Write the shard of that number, and return its name, which it bears only once it is whole.

    Equal packs give equal bytes.
    """
    name = f"shard-{number:06d}.tar"
    unfinished = folder / f".{name}.partial"
    with unfinished.open("wb") as stream, _tar_writer(stream) as writer:
        for i, pack in enumerate(packs):
            writer.write({"__key__": f"{number:06d}-{i:06d}", **_members(pack)})
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(folder / name)
    return name


def _tar_writer(stream: io.BufferedWriter) -> wds.TarWriter:
    return wds.TarWriter(stream, encoder=False, mtime=0, user="root", group="root", mode=0o644)


def _members(pack: Pack) -> dict[str, bytes]:
    members = {}
    for name in _DTYPES:
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(getattr(pack, name)), allow_pickle=False)
        members[f"{name}.npy"] = stream.getvalue()
    return members


def padded(size: int) -> int:
    """Bytes that `size` bytes of data take in a tar: whole blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def decode_pack(payload: bytes) -> Pack:
    """The pack whose three tar members, headers included, are `payload`; its arrays are its own.

    Nothing is unpickled and no length is believed; InputError for anything but what `write_shards` writes.
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


def pack_spans(shard: Path) -> list[tuple[int, int]]:
    """First and end byte of each sample of a shard: members that follow each other under one key.

    InputError where the tar is not whole, holds anything but plain files, holds nothing, or comes back to a key.
    """
    spans: list[tuple[int, int]] = []
    keys: set[str] = set()
    last = None
    for key, start, end in _files(shard):
        if key == last:
            spans[-1] = (spans[-1][0], end)
            continue
        if key in keys:
            raise InputError(f"keys of shard {shard} must differ, got {key!r:.80} twice; prepare the data again")
        keys.add(key)
        spans.append((start, end))
        last = key
    if not spans:
        raise InputError(f"shard {shard} must hold packs, and holds none; copy it again or remove it")
    return spans


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
