"""Losses of held-out packs: the same packs, noise and timesteps at every measurement. Needs no ranks or DeepSpeed.

Training's validation (validation.py) divides the packs among its ranks; `measure_losses` takes all of them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from transfusion_fast.config import Config
from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.index import Index
from transfusion_fast.data.loader import batch_builder
from transfusion_fast.data.mixture import Mixture, MixtureReader
from transfusion_fast.data.pack import ModalityInfo, empty_pack
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.training.counters import QuarterLosses, mean_losses

_EPOCH = 0  # with the seed 0 and a pack's number the key of its noise, so that runs can be compared


class HeldOutPacks:
    """Packs of held-out data as micro-batches, laid out as in training."""

    def __init__(self, config: Config, heldout: Mixture, packed: Mixture | Index) -> None:
        """Read packs of `heldout`; `packed` has the length, vocabulary and modalities of the batches."""
        self.reader, self.size = MixtureReader(heldout, config.data.shuffle_window), config.train.micro_batch
        fixed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 0})})
        self.builder = batch_builder(fixed, packed, self.size)
        self.empty = KeyedPack(empty_pack(packed.modalities), _EPOCH, 0)

    def batch(self, numbers: Sequence[int]) -> PackedBatch:
        """Return the micro-batch of at most `size` packs, filled up with empty packs."""
        packs = [KeyedPack(self.reader.read(number), _EPOCH, number) for number in numbers]
        return self.builder([*packs, *[self.empty] * (self.size - len(packs))])


class LossSums:
    """Sums of the losses of micro-batches, and of their counts."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.tokens, self.images = device, 0.0, 0.0
        self.sums, self.quarters = torch.zeros(2, dtype=torch.float64, device=device), QuarterLosses(device)

    @torch.no_grad()
    def add(self, model: Transfusion, batch: PackedBatch) -> None:
        """Add the losses of a micro-batch in host memory."""
        counts = Counts.of(batch)
        self.tokens, self.images = self.tokens + float(counts.tokens), self.images + float(counts.images)
        batch = batch.to(self.device)
        losses = model(batch, counts=Counts(1, 1))
        self.quarters.add(batch, losses.per_image)
        self.sums += torch.stack([losses.text, losses.diffusion])

    def pop(self) -> list[float]:
        """Return the numbers that `mean_of` takes; those of several ranks can be summed."""
        return [*self.sums.tolist(), self.tokens, self.images, *self.quarters.pop()]


def mean_of(sums: Sequence[float], diffusion_weight: float) -> dict[str, Any]:
    """Return the losses per token and per image, their weighted sum, and the loss of images by quarter of timesteps."""
    text_sum, diffusion_sum, tokens, images, *quarters = sums
    text, diffusion = text_sum / (tokens or 1), diffusion_sum / (images or 1)
    by_quarter = {f"diffusion_loss_q{q}": mean for q, mean in enumerate(mean_losses(quarters), start=1)}
    return {"loss": text + diffusion_weight * diffusion, "text_loss": text, "diffusion_loss": diffusion, **by_quarter}


def measure_losses(
    model: Transfusion, config: Config, heldout: Mixture, numbers: Sequence[int], modalities: tuple[ModalityInfo, ...]
) -> dict[str, float | None]:
    """Return what `mean_of` does of a model in evaluation mode; None for losses of which there are no tokens or images.

    Args:
        config: the settings of the run, which lay the packs out.
        heldout: one folder, of which `numbers` are the packs.
        modalities: those of the run; the folder has the same ones, or none.
    """
    packs = HeldOutPacks(config, heldout, replace(heldout.datasets[0].index, modalities=modalities))
    sums = LossSums(model.head.weight.device)
    for start in range(0, len(numbers), packs.size):
        sums.add(model, packs.batch(numbers[start : start + packs.size]))
    found = mean_of(sums.pop(), config.model.diffusion_weight)
    present = {"text_loss": sums.tokens, "diffusion_loss": sums.images}
    return {name: loss if present.get(name, 1) else None for name, loss in found.items()}
