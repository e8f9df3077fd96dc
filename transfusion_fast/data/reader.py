"""Random access to the packs of a data folder."""

from __future__ import annotations

import bisect
import itertools
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from transfusion_fast.data.folder import FetchError, Folder, as_folder
from transfusion_fast.data.index import Index, read_index
from transfusion_fast.data.pack import Pack
from transfusion_fast.data.shards import PackTable, decode_table
from transfusion_fast.errors import InputError

OPEN_SHARDS = 32


@dataclass
class _OpenShard:
    descriptor: int
    table: PackTable | None = None


class PackReader:
    """The packs of a data folder by number, in file order. Every read checks crc32 and contents.

    Reads use explicit offsets, so a forked worker may use the reader that it inherits. Threads need one each.
    """

    def __init__(self, folder: Folder | Path | str, index: Index | None = None, open_shards: int = OPEN_SHARDS) -> None:
        """Keep at most `open_shards` shards open, the most recently used."""
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._open_shards = open_shards
        self.folder = as_folder(folder)
        self.index = read_index(self.folder) if index is None else index
        self._schema = self.index.schema
        self._starts = [0, *itertools.accumulate(self.index.pack_counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, number: int) -> tuple[int, int]:
        """Return the shard of a pack and its number within; raise IndexError outside 0..len-1."""
        if not 0 <= number < len(self):
            raise IndexError(f"pack must be in 0..{len(self) - 1}, got {number}")
        shard = bisect.bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def read(self, number: int) -> Pack:
        """Return a pack, validated; raise IndexError as `locate` does.

        Raises:
            InputError: The pack cannot be used; the message names shard and pack.
            FetchError: Its remote shard cannot be fetched, so nothing is known about the pack.
        """
        shard, within = self.locate(number)
        info = self.index.shards[shard]
        try:
            try:
                return self._read(shard, within)
            except (OSError, InputError):
                opened = self._open.get(shard)
                if not opened or not self.folder.discard_if_corrupt(opened.descriptor, info):
                    raise
                self._close(shard)
                return self._read(shard, within)
        except FetchError:
            raise
        except (OSError, InputError) as error:
            raise InputError(
                f"pack {within} of shard {self.folder.path_to(info.file)} (pack {number} of its folder) cannot be "
                f"read: {error}; copy the shard again or prepare the data again"
            ) from error

    def _read(self, shard: int, within: int) -> Pack:
        opened = self._opened(shard)
        if opened.table is None:
            opened.table = self._table(opened.descriptor, shard)
        start, end = opened.table.span(within)
        return self.index.decode(opened.table, within, os.pread(opened.descriptor, end - start, start))

    def _table(self, descriptor: int, shard: int) -> PackTable:
        info = self.index.shards[shard]
        start, end = info.table_span
        payload = os.pread(descriptor, end - start, start)
        if (crc32 := zlib.crc32(payload)) != info.table_crc32:
            raise InputError(f"checksum of its shard's table must be {info.table_crc32}, got {crc32}")
        table = decode_table(payload, info.packs, info.table)
        if table.schema != self._schema:
            raise InputError("its shard must be of the tokenizer, modalities and pack length of its index, got others")
        return table

    def _opened(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            removed = [each for each, opened in self._open.items() if os.fstat(opened.descriptor).st_nlink == 0]
            for each in removed:  # evicted from the cache, they take up disk space while they are open
                self._close(each)
            if len(self._open) == self._open_shards:
                self._close(next(iter(self._open)))
            self._open[shard] = _OpenShard(self.folder.open_shard(self.index.shards[shard]))
        self._open.move_to_end(shard)
        return self._open[shard]

    def _close(self, shard: int) -> None:
        os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        """Close all shards; a later read opens them again."""
        for shard in list(self._open):
            self._close(shard)

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}
