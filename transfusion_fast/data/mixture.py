"""Datasets in one stream of packs, each with a share of the tokens: a pure function of the position in the stream.

A dataset whose packs hold t tokens on average takes packs in proportion to m = share / t. Of the first n positions the
first dataset takes floor(n m_0 / (m_0 + m_1 + ...)), the second floor(n' m_1 / (m_1 + ...)) of the n' that are left,
and so on; the last takes what remains. So which dataset a position falls to, and how many packs that one has given
before it, is exact arithmetic with whole numbers, equally fast anywhere in the stream; and at no position is the number
of packs of any of D datasets off its proportion by D. Each dataset goes through its own order, epoch after epoch.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from transfusion_fast.data.folder import DataFolder, RemoteFolder, ShardCache, data_folder
from transfusion_fast.data.index import (
    INDEX_NAME,
    Index,
    check_shard_files,
    decode_index,
    read_index_bytes,
)
from transfusion_fast.data.order import PackOrder
from transfusion_fast.data.pack import ModalityInfo, Pack
from transfusion_fast.data.reader import OPEN_SHARDS, PackReader
from transfusion_fast.errors import InputError

_MAX_OPEN_SHARDS = 512  # of a process; systems allow 1,024 files as a rule


@dataclass(frozen=True)
class Dataset:
    """A data folder, and its share of the tokens of a mixture."""

    folder: DataFolder
    index: Index
    sha256: str
    """Of the index, as hexadecimal digits: what the data is."""
    share: Fraction


@dataclass(frozen=True)
class Mixture:
    """One dataset or more that train one model. Packs are numbered through all of them, in their order."""

    datasets: tuple[Dataset, ...]

    def __post_init__(self) -> None:
        """InputError naming two folders that cannot be mixed."""
        for other in self.datasets[1:]:
            _check_alike(self.datasets[0], other)
        pictured = [dataset for dataset in self.datasets if dataset.index.modalities]
        for other in pictured[1:]:
            _check_same("modalities", pictured[0], other)

    @property
    def sequence_length(self) -> int:
        """Positions of a pack."""
        return self.datasets[0].index.sequence_length

    @property
    def num_text_tokens(self) -> int:
        """Text ids are below this."""
        return self.datasets[0].index.num_text_tokens

    @property
    def modalities(self) -> tuple[ModalityInfo, ...]:
        """Of the images, which a dataset of text alone has none of."""
        return next((dataset.index.modalities for dataset in self.datasets if dataset.index.modalities), ())

    @property
    def num_packs(self) -> int:
        """Packs in all folders."""
        return sum(dataset.index.num_packs for dataset in self.datasets)

    @property
    def shares(self) -> tuple[str, ...]:
        """Of the tokens, exact, such as 1/4."""
        return tuple(str(dataset.share) for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """Equal for equal data wherever it lies: the sha256 of the index, or of those of all indexes."""
        digests = [dataset.sha256 for dataset in self.datasets]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def check_shards(self, part: int = 0, parts: int = 1) -> None:
        """InputError naming a local shard that is missing or cut, of the `part`-th of so many parts of them all."""
        for dataset in self.datasets:
            check_shard_files(dataset.folder, dataset.index.shards[part::parts])

    def order(self, seed: int, window: int) -> MixtureOrder:
        """The order of the packs of a run."""
        counts = [dataset.index.pack_counts for dataset in self.datasets]
        weights = [d.share * Fraction(d.index.num_packs, d.index.tokens) for d in self.datasets]
        return MixtureOrder(seed, counts, weights, window)

    def __str__(self) -> str:
        if len(self.datasets) == 1:
            return str(self.datasets[0].folder)
        return ", ".join(f"{d.folder} ({100 * float(d.share):.4g} % of the tokens)" for d in self.datasets)


def open_mixture(weights: Mapping[str, float], cache: ShardCache) -> Mixture:
    """The datasets at these paths or URLs, the shares of tokens as the weights; `cache` is for remote shards.

    Raises:
        InputError: no data folder, or folders that cannot be mixed.
        FetchError: an index at a URL that cannot be fetched.
    """
    exact = {path: Fraction(repr(weight)) for path, weight in weights.items()}  # 0.1 as 1/10, which no float is
    total = sum(exact.values())
    return Mixture(tuple(_open(data_folder(path, cache), weight / total) for path, weight in exact.items()))


def _open(folder: DataFolder, share: Fraction) -> Dataset:
    content = read_index_bytes(folder)
    index = decode_index(content, str(folder / INDEX_NAME))
    return Dataset(folder, index, hashlib.sha256(content).hexdigest(), share)


def check_cache(mixture: Mixture, cache: ShardCache, window: int) -> None:
    """InputError where the remote shards whose packs are shuffled together exceed the cache: each pack would fetch."""
    remote = [dataset.index.shards for dataset in mixture.datasets if isinstance(dataset.folder, RemoteFolder)]
    needed = sum(sum(heapq.nlargest(window, (shard.bytes for shard in shards))) for shards in remote)
    if needed > cache.max_bytes:
        raise InputError(
            f"data.cache_gb must be at least {needed / 1e9}, for a window of data.shuffle_window = {window} shards of "
            f"each remote folder, got {cache.max_bytes / 1e9}; raise it, or lower data.shuffle_window"
        )


def _check_alike(one: Dataset, other: Dataset) -> None:
    for name in ("sequence_length", "tokenizer"):
        _check_same(name, one, other)


def _check_same(name: str, one: Dataset, other: Dataset) -> None:
    first, second = getattr(one.index, name), getattr(other.index, name)
    if first != second:
        cure = "repack one of them" if name == "sequence_length" else "prepare one of them again as the other"
        raise InputError(
            f"{name} of mixed data folders must be the same, got {_shown(first)} in {one.folder} and {_shown(second)} "
            f"in {other.folder}; {cure}"
        )


def _shown(value: object) -> str:
    return " and ".join(map(_in_words, value)) if isinstance(value, tuple) else str(value)


def _in_words(modality: ModalityInfo) -> str:
    made = f", autoencoder {modality.autoencoder[:12]}" if modality.autoencoder else ""
    return (
        f"{modality.name} ({modality.encoding}, {modality.channels} channels, patches of {modality.patch_size}{made})"
    )


class MixtureOrder:
    """The endless stream of packs: `order[i]` is the (epoch, pack) that is read after i packs were consumed.

    The epoch is that of the pack's own dataset. Of one dataset, the order is `PackOrder`'s.
    """

    def __init__(
        self, seed: int, pack_counts: Sequence[Sequence[int]], weights: Sequence[Fraction], window: int = 16
    ) -> None:
        """`pack_counts` of each dataset's shards; `weights`, positive: the packs that a dataset takes are so many."""
        self._splits = _splits(weights)
        self._orders = [PackOrder(_own_seed(seed, i), counts, window) for i, counts in enumerate(pack_counts)]
        self._starts = [0, *itertools.accumulate(order.num_packs for order in self._orders)]

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position must be 0 or more, got {position}")
        dataset, before = self.locate(position)
        epoch, number = self._orders[dataset][before]
        return epoch, self._starts[dataset] + number

    def locate(self, position: int) -> tuple[int, int]:
        """The dataset that a position falls to, and how many positions before it do."""
        for dataset, (part, whole) in enumerate(self._splits):
            before = position * part // whole
            if (position + 1) * part // whole > before:
                return dataset, before
            position -= before
        return len(self._splits), position


def _splits(weights: Sequence[Fraction]) -> list[tuple[int, int]]:
    """Of every dataset but the last, its part of the positions that those before it leave: (part, whole)."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    parts = [int(weight * scale) for weight in weights]
    return [(part, sum(parts[dataset:])) for dataset, part in enumerate(parts[:-1])]


def _own_seed(seed: int, dataset: int) -> int:
    """The run's seed for the first dataset, which may be the only one; for others one that is independent of it."""
    if dataset == 0:
        return seed
    low, high = np.random.SeedSequence(seed, spawn_key=(dataset,)).generate_state(2, np.uint64).tolist()
    return low | high << 64


class MixtureReader:
    """The packs of all datasets of a mixture by number."""

    def __init__(self, mixture: Mixture, window: int) -> None:
        """`window` shards of each are read at a time, in any order."""
        shards = max(1, min(max(window, OPEN_SHARDS), _MAX_OPEN_SHARDS // len(mixture.datasets)))
        self._readers = [PackReader(dataset.folder, dataset.index, shards) for dataset in mixture.datasets]
        self._starts = [0, *itertools.accumulate(len(reader) for reader in self._readers)]

    def read(self, number: int) -> Pack:
        """The pack of that number, validated; raises as `PackReader.read` does."""
        dataset = bisect.bisect_right(self._starts, number) - 1
        return self._readers[dataset].read(number - self._starts[dataset])
