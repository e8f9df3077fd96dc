"""The reader of a data folder's packs by byte offset."""

from __future__ import annotations

import bisect
import itertools
import os
import zlib
from collections import OrderedDict

from transfusion_fast.data.index import Index, ShardInfo, read_index
from transfusion_fast.data.pack import Pack, validate_pack
from transfusion_fast.data.remote import DataFolder, FetchError, RemoteFolder
from transfusion_fast.data.shards import decode_pack
from transfusion_fast.errors import InputError

_MAX_OPEN_SHARDS = 32


class PackReader:
    """The packs of a data folder by number, in file order: each read checks crc32 and contents.

    Reads are at explicit offsets, so a reader that a forked worker inherits is safe to use there; use one a thread.
    """

    def __init__(self, folder: DataFolder, index: Index | None = None) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self.folder = folder
        self.index = read_index(self.folder) if index is None else index
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
        info = self.index.shards[shard]
        start, end = info.span(place)
        payload = os.pread(self._descriptor(shard), end - start, start)
        if len(payload) != end - start:
            raise InputError(f"pack must have {end - start} bytes, got {len(payload)}")
        if zlib.crc32(payload) != info.crc32[place]:
            raise InputError(f"checksum of its bytes must be {info.crc32[place]}, got {zlib.crc32(payload)}")
        return payload

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) == _MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = self._open(self.index.shards[shard])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def _open(self, shard: ShardInfo) -> int:
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
        if not isinstance(self.folder, RemoteFolder) or shard not in self._descriptors:
            return False
        rotten = self.folder.cache.remove_if_rotten(self._descriptors[shard], self.index.shards[shard])
        if rotten:
            os.close(self._descriptors.pop(shard))
        return rotten

    def _close_removed(self) -> None:
        """A shard that was removed from its cache takes up disk for as long as it is open."""
        for shard, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._descriptors.pop(shard))

    def close(self) -> None:
        """Close the shards that are open; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": OrderedDict()}
