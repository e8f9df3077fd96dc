"""The stream of training batches, whose whole state is one integer: packs consumed.

With B packs per global batch, M per micro-batch and W ranks, step s takes the packs s B to (s + 1) B - 1 of the endless
order, and rank r takes in accumulation step a the M of them that begin at offset (a W + r) M. A run therefore sees the
same global batches on any number of ranks and workers. N ranks that share packs take the place of one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch.utils import data

from transfusion_fast.config import Config
from transfusion_fast.config_reading import parse
from transfusion_fast.data.batch import BatchBuilder, KeyedPack
from transfusion_fast.data.folder import FetchError, ShardCache
from transfusion_fast.data.index import Index
from transfusion_fast.data.mixture import Mixture, MixtureReader, open_mixture
from transfusion_fast.data.pack import empty_pack
from transfusion_fast.errors import InputError
from transfusion_fast.modalities import ModalityConfig
from transfusion_fast.model.diffusion import Diffusion
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.model.sequence import Vocabulary
from transfusion_fast.model.sequence_parallel import split_batch

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
"""Signals by which terminals, launchers and clusters ask a job to end."""
_SHARED_MEMORY = "/dev/shm"
_MAX_POSITIONS = 2**31 - 1  # layouts are int32


@dataclass(frozen=True)
class BatchSplit:
    """How ranks divide every global batch, and the part of one of them; batch sizes are in packs."""

    rank: int
    world_size: int
    micro_batch: int
    global_batch: int
    sequence_parallel: int = 1
    """Number of consecutive ranks that share each pack."""

    def __post_init__(self) -> None:
        """Raise InputError for a global batch that ranks and micro-batches do not divide."""
        if self.world_size % self.sequence_parallel:
            raise InputError(
                f"train.sequence_parallel must divide the number of ranks, {self.world_size}, "
                f"got {self.sequence_parallel}; give a divisor, or start more ranks"
            )
        if self.global_batch % (self.groups * self.micro_batch):
            ranks = "ranks" if self.sequence_parallel == 1 else "ranks / train.sequence_parallel"
            raise InputError(
                f"train.global_batch must be a multiple of {ranks} x train.micro_batch = {self.groups} x "
                f"{self.micro_batch}, got {self.global_batch}"
            )

    @property
    def groups(self) -> int:
        """Number of groups of ranks that share packs; without sequence parallelism, the number of ranks."""
        return self.world_size // self.sequence_parallel

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in a global batch."""
        return self.global_batch // (self.groups * self.micro_batch)

    def micro_batches(self, packs_consumed: int) -> Iterator[list[int]]:
        """Yield without end the positions of each micro-batch; a global batch begins at `packs_consumed`."""
        start = packs_consumed + self.rank // self.sequence_parallel * self.micro_batch
        while True:
            yield list(range(start, start + self.micro_batch))
            start += self.groups * self.micro_batch

    def part_of(self, batch: PackedBatch) -> PackedBatch:
        """Return the positions of a micro-batch that this rank holds."""
        if self.sequence_parallel == 1:
            return batch
        return split_batch(batch, self.rank % self.sequence_parallel, self.sequence_parallel)


class LoadedBatch(NamedTuple):
    """A micro-batch, and an error message for each pack that it lacks."""

    batch: PackedBatch
    unreadable: tuple[str, ...]
    """Errors of damaged packs."""
    unfetched: tuple[str, ...]
    """Errors of packs whose shard could not be fetched, and which may be intact."""


class _PackDataset(data.Dataset):
    """Packs by position. An unreadable one becomes an empty pack and its error: only the trainer may stop the run."""

    def __init__(self, mixture: Mixture, seed: int, window: int) -> None:
        self.reader, self.order = MixtureReader(mixture, window), mixture.order(seed, window)
        self.empty = empty_pack(mixture.modalities)

    def __getitem__(self, position: int) -> tuple[KeyedPack, InputError | None]:
        epoch, number = self.order[position]
        try:
            return KeyedPack(self.reader.read(number), epoch, number), None
        except InputError as error:
            return KeyedPack(self.empty, epoch, number), error


def _collate(
    builder: BatchBuilder, split: BatchSplit, items: Sequence[tuple[KeyedPack, InputError | None]]
) -> LoadedBatch | InputError:
    errors = [error for _, error in items if error]
    unfetched = tuple(str(error) for error in errors if isinstance(error, FetchError))
    unreadable = tuple(str(error) for error in errors if not isinstance(error, FetchError))
    try:
        return LoadedBatch(split.part_of(builder([pack for pack, _ in items])), unreadable, unfetched)
    except InputError as error:  # raised here, it would reach the user with the traceback of the worker
        return error


def open_data(config: Config) -> Mixture:
    """Return the mixture of the run's data folders, checked against the cache. No shard is opened."""
    cache, heldout = _cache(config), config.data.heldout
    mixture = open_mixture(config.data.weights, cache)
    mixture.check_cache(cache, config.data.shuffle_window)
    if isinstance(heldout, float):
        mixture = replace(mixture, held_out_every=round(1 / heldout))
        if not mixture.held_out:
            packs = f"{mixture.num_packs} packs of {mixture}"
            raise InputError(
                f"data.heldout must hold out at least one of the {packs}, got {heldout}; give a larger share"
            )
    return mixture


def open_heldout(config: Config, mixture: Mixture) -> tuple[Mixture, list[int]]:
    """Return the data that `data.heldout` names, and the numbers of the packs that validation measures.

    Raises:
        InputError: the folder does not fit the data of training.
    """
    heldout, packs = mixture, mixture.held_out
    if isinstance(config.data.heldout, str):
        heldout = open_mixture({config.data.heldout: 1.0}, _cache(config))
        packs = list(range(heldout.num_packs))
        Mixture((*mixture.datasets, *heldout.datasets))  # fails unless they go together
        if heldout.datasets[0].sha256 in {dataset.sha256 for dataset in mixture.datasets}:
            raise InputError(f"data.heldout must be other data than data.path, got {heldout}; give another, or a share")
        if heldout.modalities and not mixture.modalities:
            raise InputError(f"data.heldout must be text alone, as {mixture} is, got images in {heldout}; give another")
    return heldout, spread(packs, config.train.validate_packs)


def spread(packs: Sequence[int], most: int) -> list[int]:
    """Return at most that many of the packs, spread over all of them."""
    count = min(most, len(packs))
    return [packs[i * len(packs) // count] for i in range(count)]


def _cache(config: Config) -> ShardCache:
    return ShardCache(Path(config.data.cache).expanduser(), round(config.data.cache_gb * 1e9))


def complete_config(config: Config, mixture: Mixture) -> Config:
    """Return the config with the vocabulary and modalities of the data; raise InputError if it gives others."""
    model, known = config.model, mixture.num_text_tokens
    if "num_text_tokens" in model.model_fields_set and model.num_text_tokens != known:
        raise InputError(
            f"model.num_text_tokens must be {known} for {mixture}, got {model.num_text_tokens}; correct it or leave it "
            "out"
        )
    update = {"num_text_tokens": known, "modalities": _complete_modalities(model.modalities, mixture)}
    config = config.model_copy(update={"model": model.model_copy(update=update)})
    most = _MAX_POSITIONS // (mixture.sequence_length * _longest(config))
    if config.train.micro_batch > most:
        raise InputError(
            f"train.micro_batch must be at most {most} for packs of {mixture.sequence_length} positions, "
            f"got {config.train.micro_batch}; lower it"
        )
    _check_sequence_parallel(config, mixture)
    return config


def _complete_modalities(given: tuple[ModalityConfig, ...], mixture: Mixture) -> tuple[ModalityConfig, ...]:
    """Return the modalities of the data with the settings given for them, and the widths and patch sizes of the data.

    Raises:
        InputError: they do not fit the data.
    """
    widths = tuple(m.channels * m.patch_size**2 for m in mixture.modalities)
    if len(given) == 1 and "dim_latent" not in given[0].model_fields_set:
        given = given * len(widths)
    got = tuple(one.dim_latent for one in given)
    fits = (x == y or "dim_latent" not in one.model_fields_set for one, x, y in zip(given, got, widths, strict=False))
    if len(given) != len(widths) or not all(fits):
        raise InputError(f"model.dim_latent must be {widths} for {mixture}, got {got}; correct it or leave it out")
    completed = []
    for number, (one, info) in enumerate(zip(given, mixture.modalities, strict=True)):
        patch_size = info.patch_size if one.codec == "unet" else None
        for name, value, needed in (("dims", one.dims, 2), ("patch_size", one.patch_size, patch_size)):
            if value not in (None, needed):
                rule = f"model.modalities.{number}.{name} must be {needed} for {mixture}"
                raise InputError(f"{rule}, got {value}; correct it or leave it out")
        known = {"dim_latent": widths[number]} | ({"patch_size": patch_size} if patch_size else {})
        source = f"model.modalities.{number} for {mixture}"
        completed.append(parse(ModalityConfig, one.model_dump(exclude_unset=True) | known, source))
    return tuple(completed)


def _longest(config: Config) -> int:
    """Return the most positions that training makes of a pack, in lengths of the pack."""
    return 1 + config.data.added_copies + (config.model.size_tokens > 0)  # size tokens are fewer than other positions


def _check_sequence_parallel(config: Config, mixture: Mixture) -> None:
    """Raise InputError if positions or heads cannot be divided among the ranks that share a pack."""
    parts = config.train.sequence_parallel
    positions, heads = config.train.micro_batch * mixture.sequence_length, config.model.transformer.num_kv_heads
    for what, number in (("train.micro_batch x positions of a pack", positions), ("key/value heads", heads)):
        if number % parts:
            raise InputError(f"train.sequence_parallel must divide {what} = {number}, got {parts}; give a divisor")
    if parts > 1 and any(one.codec == "unet" for one in config.model.modalities):
        raise InputError(f"train.sequence_parallel must be 1 with codec=unet, which takes whole images, got {parts}")


def training_batches(
    config: Config, mixture: Mixture, split: BatchSplit, packs_consumed: int, *, pin_memory: bool = False
) -> Iterator[LoadedBatch]:
    """Yield this rank's micro-batches endlessly, from the global batch after `packs_consumed` packs on.

    A pack that cannot be read is left out of its micro-batch and named with shard and reason; no other pack changes.

    Raises:
        InputError: an image is larger than the model's size tokens can say.
    """
    loader = data.DataLoader(
        _PackDataset(mixture, config.train.seed, config.data.shuffle_window),
        batch_sampler=split.micro_batches(packs_consumed),
        collate_fn=partial(_collate, batch_builder(config, mixture, split.micro_batch), split),
        num_workers=config.data.workers,
        worker_init_fn=_ignore_signals,
        prefetch_factor=config.data.prefetch if config.data.workers else None,
        pin_memory=pin_memory,
    )
    for loaded in loader:
        if isinstance(loaded, InputError):
            raise loaded
        yield loaded


def check_shared_memory(config: Config, mixture: Mixture, ranks_on_node: int) -> None:
    """Raise InputError if loader processes could not hand their batches over: they would wait for ever.

    Batches travel through /dev/shm, which is often small in a container.
    """
    settings, packs = config.data, config.train.micro_batch
    if not settings.workers or not os.path.isdir(_SHARED_MEMORY):
        return
    # Tokens, labels, positions, the layout and indices, and at most a patch of latents and noise for each position.
    values = max((m.channels * m.patch_size**2 for m in mixture.modalities), default=0)
    batch = packs * mixture.sequence_length * _longest(config) * (64 + 2 * 4 * values)
    needed = ranks_on_node * settings.workers * (settings.prefetch + 1) * batch
    found = os.statvfs(_SHARED_MEMORY)
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise InputError(
            f"{_SHARED_MEMORY} must have {needed / 1e6:.0f} MB free for batches of data.workers={settings.workers}, "
            f"got {free / 1e6:.0f} MB; give the container more (docker: --shm-size), or lower data.workers or "
            "data.prefetch"
        )


def _ignore_signals(_: int) -> None:
    """Ignore requests to stop in a worker: its rank finishes a step first, then ends the worker."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batch_builder(config: Config, packed: Mixture | Index, packs: int) -> BatchBuilder:
    """Return the run's builder of batches of `packs` packs.

    Batches have one length, unless noised copies or size tokens are added: their number differs from pack to pack, and
    padding to the most that is possible would double the work of text. Then lengths are multiples of an eighth.
    """
    length, ranks = packs * packed.sequence_length, config.train.sequence_parallel
    step = -(-length // (8 * ranks)) * ranks if config.lengths_vary else length
    return BatchBuilder(
        modalities=packed.modalities,
        vocabulary=Vocabulary.of(config.model),
        diffusion=Diffusion(config.model.diffusion),
        settings=config.data,
        seed=config.train.seed,
        configs=config.model.modalities,
        causal_images=config.model.image_attention == "causal",
        length_step=step,
    )
