"""Data folders mixed into one stream of packs, in proportion to weights: a pure function of the position.

A dataset with t tokens a pack on average is read in proportion to m = share / t. Of the first n positions of the
stream, the first dataset gets floor(n m_0 / (m_0 + m_1 + ...)), the second floor(n' m_1 / (m_1 + ...)) of the n' that
remain, and so on; the last dataset gets the rest. The dataset of a position, and the number of its packs before that
position, are thus exact integer arithmetic, equally fast anywhere in the stream. At every position the packs of each of
D datasets differ from their proportion by less than D. Each dataset repeats in its own order, epoch after epoch.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from transfusion_fast.data.folder import Folder, ShardCache, as_folder
from transfusion_fast.data.index import INDEX_NAME, Index, decode_index
from transfusion_fast.data.order import PackOrder
from transfusion_fast.data.pack import ModalityInfo, Pack
from transfusion_fast.data.reader import OPEN_SHARDS, PackReader
from transfusion_fast.errors import InputError

_MAX_OPEN_SHARDS = 512  # per process; the usual limit is 1,024 open files


@dataclass(frozen=True)
class Dataset:
    """A data folder of a mixture."""

    folder: Folder
    index: Index
    sha256: str
    """sha256 of the index, as hexadecimal digits."""
    share: Fraction
    """Fraction of the mixture's tokens."""


@dataclass(frozen=True)
class Mixture:
    """One or more datasets that train one model. Packs are numbered across all of them, in their order."""

    datasets: tuple[Dataset, ...]
    held_out_every: int = 0
    """Every n-th pack of a dataset is left out of the order of training; 0 leaves out none."""

    def __post_init__(self) -> None:
        """Raise InputError naming two folders that cannot be mixed. Text alone goes with any images."""
        for name, remedy in (("sequence_length", "repack"), ("tokenizer", "prepare"), ("modalities", "prepare")):
            datasets = [d for d in self.datasets if name != "modalities" or d.index.modalities]
            for other in datasets[1:]:
                first, second = getattr(datasets[0].index, name), getattr(other.index, name)
                if first != second:
                    raise InputError(
                        f"{name} of mixed data folders must be the same, got {first} in {datasets[0].folder} "
                        f"and {second} in {other.folder}; {remedy} one of them again"
                    )

    @property
    def sequence_length(self) -> int:
        """Positions of a pack."""
        return self.datasets[0].index.sequence_length

    @property
    def num_text_tokens(self) -> int:
        """Size of the text vocabulary."""
        return self.datasets[0].index.num_text_tokens

    @property
    def modalities(self) -> tuple[ModalityInfo, ...]:
        """Modalities of the datasets with images, or none."""
        return next((dataset.index.modalities for dataset in self.datasets if dataset.index.modalities), ())

    @property
    def num_packs(self) -> int:
        """Packs in all folders."""
        return sum(dataset.index.num_packs for dataset in self.datasets)

    @property
    def shares(self) -> tuple[str, ...]:
        """Exact fraction of the tokens for each dataset, such as "1/4"."""
        return tuple(str(dataset.share) for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """Digest of the data, wherever it is stored: the sha256 of the index, or of those of all indexes."""
        digests = [dataset.sha256 for dataset in self.datasets]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def check_shards(self, part: int = 0, parts: int = 1) -> None:
        """Raise InputError for a missing or truncated local shard; check every `parts`-th shard from `part` on."""
        for dataset in self.datasets:
            dataset.folder.check_shards(dataset.index.shards[part::parts])

    def check_cache(self, cache: ShardCache, window: int) -> None:
        """Raise InputError if the remote shards of a shuffle window do not fit into the cache."""
        needed = sum(dataset.folder.cache_bytes(dataset.index.shards, window) for dataset in self.datasets)
        if needed > cache.max_bytes:
            raise InputError(
                f"data.cache_gb must be at least {needed / 1e9}, for data.shuffle_window = {window} shards of each "
                f"remote folder, got {cache.max_bytes / 1e9}; raise it, or lower data.shuffle_window"
            )

    def describe_pack(self, number: int) -> str:
        """Return the number of a pack in its own folder, and the folder if there are several."""
        for dataset in self.datasets:
            if number < dataset.index.num_packs:
                break
            number -= dataset.index.num_packs
        return str(number) if len(self.datasets) == 1 else f"{number} of {dataset.folder}"

    def order(self, seed: int, window: int) -> MixtureOrder:
        """Return the order in which a run reads the packs."""
        counts = [dataset.index.pack_counts for dataset in self.datasets]
        weights = [d.share * Fraction(d.index.num_packs, d.index.tokens) for d in self.datasets]
        return MixtureOrder(seed, counts, weights, window, self.held_out_every)

    @property
    def held_out(self) -> list[int]:
        """The numbers of the packs that are left out of the order of training."""
        if not self.held_out_every:
            return []
        sizes = [dataset.index.num_packs for dataset in self.datasets]
        starts = [0, *itertools.accumulate(sizes)]
        first, step = self.held_out_every - 1, self.held_out_every
        return [start + n for start, size in zip(starts, sizes, strict=False) for n in range(first, size, step)]

    def __str__(self) -> str:
        if len(self.datasets) == 1:
            return str(self.datasets[0].folder)
        return ", ".join(f"{d.folder} ({100 * float(d.share):.4g} % of the tokens)" for d in self.datasets)


def open_mixture(weights: Mapping[str, float], cache: ShardCache) -> Mixture:
    """Return the datasets at these paths or URLs, whose tokens are mixed by weight; `cache` is for remote shards.

    Raises:
        InputError: A folder has no valid index, or the folders do not fit one model.
        FetchError: A remote index cannot be fetched.
    """
    exact = {path: Fraction(repr(weight)) for path, weight in weights.items()}  # 0.1 is 1/10, unlike the float
    datasets = []
    for path, weight in exact.items():
        folder = as_folder(path, cache)
        content = folder.read_bytes(INDEX_NAME)
        index, sha256 = decode_index(content, folder.path_to(INDEX_NAME)), hashlib.sha256(content).hexdigest()
        datasets.append(Dataset(folder, index, sha256, weight / sum(exact.values())))
    return Mixture(tuple(datasets))


class MixtureOrder:
    """The endless stream of packs: `order[i]` is the (epoch, pack) that is read after i packs were consumed.

    The epoch is that of the pack's own dataset. A single dataset has the order of `PackOrder`.
    """

    def __init__(
        self,
        seed: int,
        pack_counts: Sequence[Sequence[int]],
        weights: Sequence[Fraction],
        window: int = 16,
        held_out_every: int = 0,
    ) -> None:
        """Mix datasets whose shards hold `pack_counts` packs, by positive `weights` of their numbers of packs.

        Every `held_out_every`-th pack of a dataset never appears.
        """
        scale = math.lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]
        self._every = held_out_every
        kept = [_kept(counts, held_out_every) for counts in pack_counts]
        self._orders = [PackOrder(_dataset_seed(seed, i), counts, window) for i, counts in enumerate(kept)]
        self._starts = [0, *itertools.accumulate(int(sum(counts)) for counts in pack_counts)]

    def __getitem__(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"position must be 0 or more, got {position}")
        dataset, before = self.locate(position)
        epoch, number = self._orders[dataset][before]
        held_out = number // (self._every - 1) if self._every else 0  # those before the n-th pack that is kept
        return epoch, self._starts[dataset] + number + held_out

    def locate(self, position: int) -> tuple[int, int]:
        """Return the dataset of a position, and how many earlier positions belong to that dataset."""
        remaining = sum(self._weights)
        for dataset, weight in enumerate(self._weights):
            before = position * weight // remaining
            if (position + 1) * weight // remaining > before:
                return dataset, before
            position -= before
            remaining -= weight
        raise AssertionError("the last dataset takes every position that remains")


def _kept(pack_counts: Sequence[int], held_out_every: int) -> np.ndarray:
    """Return how many packs of each shard are not held out, without the shards that have none."""
    ends = np.cumsum(np.asarray(pack_counts, dtype=np.int64))
    kept = np.diff(ends - (ends // held_out_every if held_out_every else 0), prepend=0)
    return kept[kept > 0]


def _dataset_seed(seed: int, dataset: int) -> int:
    """Return the run's seed for the first dataset, which may be the only one, and independent seeds for the others."""
    if dataset == 0:
        return seed
    low, high = np.random.SeedSequence(seed, spawn_key=(dataset,)).generate_state(2, np.uint64).tolist()
    return low | high << 64


class MixtureReader:
    """The packs of all datasets of a mixture by number."""

    def __init__(self, mixture: Mixture, window: int) -> None:
        """Keep `window` shards of each dataset open, as they are read in any order."""
        shards = max(1, min(max(window, OPEN_SHARDS), _MAX_OPEN_SHARDS // len(mixture.datasets)))
        self._readers = [PackReader(dataset.folder, dataset.index, shards) for dataset in mixture.datasets]
        self._starts = [0, *itertools.accumulate(len(reader) for reader in self._readers)]

    def read(self, number: int) -> Pack:
        """Return a pack, validated; raise as `PackReader.read` does."""
        dataset = bisect.bisect_right(self._starts, number) - 1
        return self._readers[dataset].read(number - self._starts[dataset])
