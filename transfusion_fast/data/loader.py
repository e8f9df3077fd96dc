"""The stream of training batches: one integer, packs consumed, is its whole state.

Global step s takes the packs [s B, (s + 1) B) of the endless order; accumulation step a of rank r takes M of them from
(a W + r) M, for W ranks and M packs a micro-batch. So a run sees the same global batches on any ranks and workers.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch.utils import data

from transfusion_fast.config import Config
from transfusion_fast.data.batch import BatchBuilder, KeyedPack
from transfusion_fast.data.folder import FetchError, ShardCache
from transfusion_fast.data.index import Index
from transfusion_fast.data.mixture import Mixture, MixtureOrder, MixtureReader, check_cache, open_mixture
from transfusion_fast.data.pack import empty_pack
from transfusion_fast.errors import InputError
from transfusion_fast.model.diffusion import OBJECTIVES
from transfusion_fast.model.sequence import PackedBatch, Vocabulary

_MAX_POSITION = 2**31 - 1  # which the layouts' int32 hold


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this rank takes."""

    rank: int
    world_size: int
    micro_batch: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.global_batch % (self.world_size * self.micro_batch):
            raise InputError(
                f"train.global_batch must be a multiple of ranks x train.micro_batch = {self.world_size} x "
                f"{self.micro_batch}, got {self.global_batch}"
            )

    @property
    def accumulation_steps(self) -> int:
        return self.global_batch // (self.world_size * self.micro_batch)

    def micro_batches(self, packs_consumed: int) -> Iterator[list[int]]:
        """Positions in the order, a list for each micro-batch, endless, from the global batch that starts there."""
        start = packs_consumed + self.rank * self.micro_batch
        while True:
            yield list(range(start, start + self.micro_batch))
            start += self.world_size * self.micro_batch


class LoadedBatch(NamedTuple):
    """A micro-batch, and why each of the packs that it should hold and does not is not there."""

    batch: PackedBatch
    unreadable: tuple[str, ...]
    unfetched: tuple[str, ...]
    """Of these the packs may be good."""


class _Item(NamedTuple):
    pack: KeyedPack
    error: InputError | None


class PackDataset(data.Dataset):
    """Position in the order -> pack, and why it is empty if it cannot be read: whether to go on is not for a worker."""

    def __init__(self, mixture: Mixture, order: MixtureOrder, window: int):
        self.reader, self.order = MixtureReader(mixture, window), order
        self.empty = empty_pack(mixture.modalities)

    def __getitem__(self, position: int) -> _Item:
        epoch, number = self.order[position]
        try:
            return _Item(KeyedPack(self.reader.read(number), epoch, number), None)
        except InputError as error:
            return _Item(KeyedPack(self.empty, epoch, number), error)


@dataclass(frozen=True)
class _Collate:
    builder: BatchBuilder

    def __call__(self, items: Sequence[_Item]) -> LoadedBatch:
        errors = [item.error for item in items if item.error]
        unfetched = tuple(str(error) for error in errors if isinstance(error, FetchError))
        unreadable = tuple(str(error) for error in errors if not isinstance(error, FetchError))
        return LoadedBatch(self.builder([item.pack for item in items]), unreadable, unfetched)


def check_fits(config: Config, mixture: Mixture) -> None:
    """Raises InputError where the model's vocabulary or latent widths, or the size of a batch, do not fit the data."""
    model = config.model
    if model.num_text_tokens != mixture.num_text_tokens:
        raise InputError(
            f"model.num_text_tokens must be the {mixture.num_text_tokens} of the tokenizer of {mixture}, "
            f"got {model.num_text_tokens}"
        )
    widths = tuple(m.channels * m.patch_size**2 for m in mixture.modalities)
    if model.dim_latent != widths:
        raise InputError(f"model.dim_latent must be {list(widths)} for {mixture}, got {list(model.dim_latent)}")
    most = _MAX_POSITION // mixture.sequence_length
    if config.train.micro_batch > most:
        raise InputError(
            f"train.micro_batch must be at most {most} for packs of {mixture.sequence_length} positions, "
            f"got {config.train.micro_batch}; lower it"
        )


def training_batches(
    config: Config, mixture: Mixture, share: Share, packs_consumed: int, *, pin_memory: bool = False
) -> Iterator[LoadedBatch]:
    """This rank's micro-batches, endless, from the global batch after `packs_consumed`.

    A pack that cannot be read is left out of its micro-batch, changes no other, and is named with shard and reason.
    """
    order = mixture.order(config.train.seed, config.data.shuffle_window)
    yield from data.DataLoader(
        PackDataset(mixture, order, config.data.shuffle_window),
        batch_sampler=_Endless(share, packs_consumed),
        collate_fn=_Collate(batch_builder(config, mixture, share.micro_batch)),
        num_workers=config.data.workers,
        worker_init_fn=_outlive_signals,
        prefetch_factor=config.data.prefetch if config.data.workers else None,
        pin_memory=pin_memory,
    )


def _outlive_signals(_: int) -> None:
    """Ctrl-C and a launcher's SIGTERM reach workers too, whose rank has a step to finish and then ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batch_builder(config: Config, packed: Mixture | Index, packs: int) -> BatchBuilder:
    """The builder of batches of `packs` packs for this run."""
    return BatchBuilder(
        modalities=packed.modalities,
        vocabulary=Vocabulary(packed.num_text_tokens, len(packed.modalities)),
        objective=OBJECTIVES[config.model.objective],
        settings=config.data,
        seed=config.train.seed,
        positions=config.model.positions,
        total_length=packs * packed.sequence_length,
    )


def open_data(config: Config) -> Mixture:
    """The datasets of the run's data folders, checked against the model and the cache; no shard is looked at."""
    settings = config.data
    cache = ShardCache(Path(settings.cache).expanduser(), round(settings.cache_gb * 1e9))
    mixture = open_mixture(settings.weights, cache)
    check_fits(config, mixture)
    check_cache(mixture, cache, settings.shuffle_window)
    return mixture


class _Endless:
    """A batch sampler without end."""

    def __init__(self, share: Share, packs_consumed: int):
        self.share, self.packs_consumed = share, packs_consumed

    def __iter__(self) -> Iterator[list[int]]:
        return self.share.micro_batches(self.packs_consumed)
