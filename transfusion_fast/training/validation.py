"""The loss of packs that are held out of training, measured by all ranks."""

from __future__ import annotations

import time
from functools import partial

from transfusion_fast.config import Config
from transfusion_fast.data.loader import open_heldout
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import DataError
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.training.heldout_losses import HeldOutPacks, LossSums, mean_of
from transfusion_fast.training.metrics import ValidationRow
from transfusion_fast.training.ranks import Ranks


class Validation:
    """The held-out packs of a run, which its ranks divide among themselves."""

    def __init__(self, config: Config, data: Mixture, ranks: Ranks):
        """Open the held-out data; raise InputError if it does not fit the data of training."""
        self.ranks, self.weight = ranks, config.model.diffusion_weight
        heldout, self.numbers = open_heldout(config, data)
        self.packs = HeldOutPacks(config, heldout, data)

    def measure(self, model: Transfusion, step: int) -> ValidationRow:
        """Return the losses per token and per image, the latter also by quarter of the timesteps. Collective.

        Raises:
            DataError: on all ranks, if a pack cannot be read.
        """
        began = time.perf_counter()
        model.eval()
        sums = LossSums(self.ranks.device)
        # All ranks take as many forward passes, in which ZeRO gathers weights.
        for start in range(0, len(self.numbers), self.packs.size * self.ranks.world_size):
            sums.add(model, self.ranks.together(partial(self._read, start), DataError))
        model.train()
        losses = mean_of(self.ranks.sum(sums.pop()), self.weight)
        return ValidationRow(step, **losses, seconds=time.perf_counter() - began)

    def _read(self, start: int) -> PackedBatch:
        """Return this rank's packs of those from `start` on."""
        end = start + self.packs.size * self.ranks.world_size
        return self.packs.batch(self.ranks.own(self.numbers[start:end]))
