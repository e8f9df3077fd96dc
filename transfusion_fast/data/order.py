"""The order in which a run reads its packs: a pure function of seed, epoch and position.

Shards are shuffled, then packs within windows of consecutive shuffled shards. Reads stay nearly sequential, memory is
one number a shard plus the packs of one window, and the number of packs consumed is all that resuming needs.
"""

from collections.abc import Sequence

import numpy as np

from transfusion_fast.errors import InputError

_SHARD_STREAM = 0  # window w draws from stream 1 + w


def keyed_permutation(length: int, seed: int, *key: int) -> np.ndarray:
    """Return a permutation of range(length), int64, that depends on `seed` and `key` alone.

    It sorts the raw output of PCG64, which is the same in every release of numpy, unlike `Generator.permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=key)).random_raw(length)
    return np.argsort(raw, kind="stable")


class PackOrder:
    """The endless stream of packs: `order[i]` is the (epoch, pack) that is read after i packs were consumed.

    Packs are numbered in file order, shard 0's first. Every epoch has each pack once.
    """

    def __init__(self, seed: int, pack_counts: Sequence[int] | np.ndarray, window: int = 16) -> None:
        """Raise InputError for settings that define no order; `pack_counts` are the packs of each shard."""
        counts = np.array(pack_counts, dtype=np.int64)
        if seed < 0:
            raise InputError(f"data seed must be 0 or more, got {seed}; give another")
        if window < 1:
            raise InputError(f"shuffle window must be 1 shard or more, got {window}; give a larger one")
        if counts.size == 0 or counts.min() < 1:
            raise InputError(f"pack counts must be one or more positive numbers, got {counts}; prepare the data again")
        self.num_packs = int(counts.sum())
        self._seed, self._window, self._counts = seed, window, counts
        self._first_pack = np.cumsum(counts) - counts
        self._epoch = self._current = -1

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position must be 0 or more, got {position}")
        epoch, within = divmod(position, self.num_packs)
        if epoch != self._epoch:
            self._epoch, self._current = epoch, -1
            self._shards = keyed_permutation(self._counts.size, self._seed, epoch, _SHARD_STREAM)
            firsts = np.arange(0, self._counts.size, self._window)
            self._ends = np.cumsum(np.add.reduceat(self._counts[self._shards], firsts))
        window = int(np.searchsorted(self._ends, within, side="right"))
        if window != self._current:
            self._current, self._packs = window, self._shuffled_window(window)
        return epoch, int(self._packs[within - self._ends[window]])  # a negative index, counted from the window's end

    def _shuffled_window(self, window: int) -> np.ndarray:
        shards = self._shards[window * self._window : (window + 1) * self._window]
        packs = np.concatenate([np.arange(self._counts[shard]) + self._first_pack[shard] for shard in shards])
        return packs[keyed_permutation(packs.size, self._seed, self._epoch, 1 + window)]
