"""The reader of a data folder's packs by byte offset."""

from __future__ import annotations

import bisect
import itertools
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass

from transfusion_fast.data.folder import DataFolder, FetchError, RemoteFolder
from transfusion_fast.data.index import Index, read_index
from transfusion_fast.data.pack import Pack, validate_pack
from transfusion_fast.data.shards import PackTable, ShardInfo, decode_pack, decode_table
from transfusion_fast.errors import InputError

OPEN_SHARDS = 32


@dataclass
class _OpenShard:
    descriptor: int
    table: PackTable | InputError | None = None
    """Once it was looked at, or what is wrong with it: it is not read again for every pack."""


class PackReader:
    """The packs of a data folder by number, in file order: each read checks crc32 and contents.

    Reads are at explicit offsets, so a reader that a forked worker inherits is safe to use there; use one a thread.
    """

    def __init__(self, folder: DataFolder, index: Index | None = None, open_shards: int = OPEN_SHARDS) -> None:
        """`open_shards` at once: as many as reads go back and forth between."""
        self._open_shards = open_shards
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self.folder = folder
        self.index = read_index(self.folder) if index is None else index
        self._schema = self.index.schema
        self._starts = [0, *itertools.accumulate(self.index.pack_counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, position: int) -> tuple[int, int]:
        """The shard of a pack, and its place within; IndexError outside 0..len-1."""
        if not 0 <= position < len(self):
            raise IndexError(f"pack must be in 0..{len(self) - 1}, got {position}")
        shard = bisect.bisect_right(self._starts, position) - 1
        return shard, position - self._starts[shard]

    def read(self, position: int) -> Pack:
        """The pack of that number, validated.

        Raises:
            InputError: naming shard and pack, where it cannot be used.
            FetchError: its shard is remote and cannot be fetched, which says nothing of the pack.
        """
        shard, place = self.locate(position)
        try:
            try:
                return self._pack(shard, place)
            except (OSError, InputError):
                if not self._close_rotten(shard):
                    raise
                return self._pack(shard, place)
        except FetchError:
            raise
        except (OSError, InputError) as error:
            path = self.folder / self.index.shards[shard].file
            raise InputError(
                f"pack {place} of shard {path} (pack {position} of its folder) cannot be read: {error}; "
                "copy the shard again or prepare the data again"
            ) from error

    def _pack(self, shard: int, place: int) -> Pack:
        pack = decode_pack(self._payload(shard, place))
        validate_pack(pack, self.index.modalities, self.index.num_text_tokens, self.index.sequence_length)
        return pack

    def _payload(self, shard: int, place: int) -> bytes:
        opened = self._opened(shard)
        if opened.table is None:
            opened.table = _read_table(opened.descriptor, self.index.shards[shard], self._schema)
        if isinstance(opened.table, InputError):
            raise InputError(str(opened.table))
        payload = _read(opened.descriptor, *opened.table.span(place))
        opened.table.check(place, payload)
        return payload

    def _opened(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            if len(self._open) == self._open_shards:
                os.close(self._open.popitem(last=False)[1].descriptor)
            self._open[shard] = _OpenShard(self._descriptor(self.index.shards[shard]))
        self._open.move_to_end(shard)
        return self._open[shard]

    def _descriptor(self, shard: ShardInfo) -> int:
        if isinstance(self.folder, RemoteFolder):
            self._close_removed()
            return self.folder.open_shard(shard)
        descriptor = os.open(self.folder / shard.file, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:  # or what the index says of its packs may be beyond any memory
            os.close(descriptor)
            raise InputError(f"shard must have {shard.bytes} bytes as its index says, got {size}")
        return descriptor

    def _close_rotten(self, shard: int) -> bool:
        """Whether a remote shard was open whose bytes in the cache are no longer those that were fetched."""
        if not isinstance(self.folder, RemoteFolder) or shard not in self._open:
            return False
        rotten = self.folder.cache.remove_if_rotten(self._open[shard].descriptor, self.index.shards[shard])
        if rotten:
            os.close(self._open.pop(shard).descriptor)
        return rotten

    def _close_removed(self) -> None:
        """A shard that was removed from its cache takes up disk for as long as it is open."""
        for shard, opened in list(self._open.items()):
            if os.fstat(opened.descriptor).st_nlink == 0:
                os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        """Close the shards that are open; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


def _read(descriptor: int, start: int, end: int) -> bytes:
    return os.pread(descriptor, end - start, start)


def _read_table(descriptor: int, shard: ShardInfo, schema: bytes) -> PackTable | InputError:
    payload = _read(descriptor, *shard.table_span)
    if (crc32 := zlib.crc32(payload)) != shard.table_crc32:
        return InputError(f"checksum of its shard's table must be {shard.table_crc32}, got {crc32}")
    try:
        table = decode_table(payload, shard.packs, shard.table)
    except InputError as error:
        return error
    if table.schema != schema:
        return InputError("its shard is of another tokenizer, pack length or other modalities than its index says")
    return table
