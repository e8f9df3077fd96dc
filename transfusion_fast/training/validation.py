"""The loss of packs that are held out of training: the same packs, noise and timesteps at every measurement."""

from __future__ import annotations

import time
from functools import partial

import torch

from transfusion_fast.config import Config
from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.loader import batch_builder, open_heldout
from transfusion_fast.data.mixture import Mixture, MixtureReader
from transfusion_fast.data.pack import empty_pack
from transfusion_fast.errors import DataError
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.training.counters import QuarterLosses, mean_losses
from transfusion_fast.training.metrics import ValidationRow
from transfusion_fast.training.ranks import Ranks

_EPOCH = 0  # with the seed 0 and a pack's number the key of its noise, so that runs can be compared


class Validation:
    """The held-out packs of a run, which its ranks divide among themselves."""

    def __init__(self, config: Config, data: Mixture, ranks: Ranks):
        """Open the held-out data; raise InputError if it does not fit the data of training."""
        self.ranks, self.size, self.weight = ranks, config.train.micro_batch, config.model.diffusion_weight
        heldout, self.numbers = open_heldout(config, data)
        self.reader = MixtureReader(heldout, config.data.shuffle_window)
        fixed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 0})})
        self.builder = batch_builder(fixed, data, self.size)
        self.empty = KeyedPack(empty_pack(data.modalities), _EPOCH, 0)

    @torch.no_grad()
    def measure(self, model: Transfusion, step: int) -> ValidationRow:
        """Return the losses per token and per image, the latter also by quarter of the timesteps. Collective.

        Raises:
            DataError: on all ranks, if a pack cannot be read.
        """
        began = time.perf_counter()
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        quarters, tokens, images = QuarterLosses(self.ranks.device), 0.0, 0.0
        # All ranks take as many forward passes, in which ZeRO gathers weights.
        for start in range(0, len(self.numbers), self.size * self.ranks.world_size):
            batch = self.ranks.together(partial(self._read, start), DataError)
            counts = Counts.of(batch)
            tokens, images = tokens + float(counts.tokens), images + float(counts.images)
            batch = batch.to(self.ranks.device)
            losses = model(batch, counts=Counts(1, 1))
            quarters.add(batch, losses.per_image)
            sums += torch.stack([losses.text, losses.diffusion])
        model.train()
        own = [*sums.tolist(), tokens, images, *quarters.pop()]
        text_sum, diffusion_sum, all_tokens, all_images, *all_quarters = self.ranks.sum(own)
        text, diffusion = text_sum / (all_tokens or 1), diffusion_sum / (all_images or 1)
        q1, q2, q3, q4 = mean_losses(all_quarters)
        loss, seconds = text + self.weight * diffusion, time.perf_counter() - began
        return ValidationRow(step, loss, text, diffusion, q1, q2, q3, q4, seconds)

    def _read(self, start: int) -> PackedBatch:
        """Return this rank's packs of those from `start` on; where none are left, empty ones."""
        end = start + self.size * self.ranks.world_size
        packs = [KeyedPack(self.reader.read(n), _EPOCH, n) for n in self.ranks.own(self.numbers[start:end])]
        return self.builder([*packs, *[self.empty] * (self.size - len(packs))])
