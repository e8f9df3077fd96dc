"""The stream of training batches: one integer, packs consumed, is its whole state.

Global step s takes the packs [s B, (s + 1) B) of the endless order; accumulation step a of rank r takes M of them from
(a W + r) M, for W ranks and M packs a micro-batch. So a run sees the same global batches on any ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset

from transfusion_fast.config import Config
from transfusion_fast.data.batch import BatchBuilder, KeyedPack
from transfusion_fast.data.index import Index, PackReader, parse_index, read_index
from transfusion_fast.data.order import PackOrder
from transfusion_fast.data.pack import empty_pack
from transfusion_fast.diffusion import OBJECTIVES
from transfusion_fast.errors import InputError
from transfusion_fast.sequence import PackedBatch, Vocabulary


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
    """A micro-batch, and why each of the packs that it should hold and does not cannot be read."""

    batch: PackedBatch
    unreadable: tuple[str, ...]


class PackDataset(Dataset):
    """Position in the order -> pack, and why it is empty if it cannot be read: whether to go on is not for a worker."""

    def __init__(self, reader: PackReader, order: PackOrder):
        self.reader, self.order = reader, order
        self.empty = empty_pack(reader.index.modalities)

    def __getitem__(self, position: int) -> tuple[KeyedPack, str]:
        epoch, number = self.order[position]
        try:
            return KeyedPack(self.reader.read(number), epoch, number), ""
        except InputError as error:
            return KeyedPack(self.empty, epoch, number), str(error)


@dataclass(frozen=True)
class _Collate:
    builder: BatchBuilder

    def __call__(self, items: Sequence[tuple[KeyedPack, str]]) -> LoadedBatch:
        return LoadedBatch(self.builder([pack for pack, _ in items]), tuple(error for _, error in items if error))


def check_fits(config: Config, index: Index) -> None:
    """Raises InputError where the model's vocabulary or latent widths are not those of the data."""
    path, model = config.data.path, config.model
    if model.num_text_tokens != index.num_text_tokens:
        raise InputError(
            f"model.num_text_tokens must be the {index.num_text_tokens} of the tokenizer of {path}, "
            f"got {model.num_text_tokens}"
        )
    widths = tuple(m.channels * m.patch_size**2 for m in index.modalities)
    if model.dim_latent != widths:
        raise InputError(f"model.dim_latent must be {list(widths)} for {path}, got {list(model.dim_latent)}")


def training_batches(
    config: Config, index: Index, share: Share, packs_consumed: int, *, pin_memory: bool = False
) -> Iterator[LoadedBatch]:
    """This rank's micro-batches, endless, from the global batch after `packs_consumed`.

    A pack that cannot be read is left out of its micro-batch, changes no other, and is named with shard and reason.
    """
    folder = Path(config.data.path)
    order = PackOrder(config.train.seed, index.pack_counts, config.data.shuffle_window)
    yield from DataLoader(
        PackDataset(PackReader(folder, index), order),
        batch_sampler=_Endless(share, packs_consumed),
        collate_fn=_Collate(batch_builder(config, index, share.micro_batch)),
        num_workers=config.data.workers,
        pin_memory=pin_memory,
    )


def batch_builder(config: Config, index: Index, packs: int) -> BatchBuilder:
    """The builder of batches of `packs` packs for this run."""
    return BatchBuilder(
        modalities=index.modalities,
        vocabulary=Vocabulary(index.num_text_tokens, len(index.modalities)),
        objective=OBJECTIVES[config.model.objective],
        settings=config.data,
        seed=config.train.seed,
        positions=config.model.positions,
        total_length=packs * index.sequence_length,
    )


def open_data(config: Config) -> Index:
    """The index of the run's data folder, checked against the model, and whether its shards are there.

    Where packs may be quarantined a missing or cut shard is no more than the packs that it lacks.
    """
    index = (parse_index if config.data.quarantine else read_index)(Path(config.data.path))
    check_fits(config, index)
    return index


class _Endless:
    """A batch sampler without end."""

    def __init__(self, share: Share, packs_consumed: int):
        self.share, self.packs_consumed = share, packs_consumed

    def __iter__(self) -> Iterator[list[int]]:
        return self.share.micro_batches(self.packs_consumed)
