"""Measurements of training between two logged rows: work, seconds, losses by timestep, and memory."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from transfusion_fast.config import Config
from transfusion_fast.model.diffusion import NUM_TIMESTEPS
from transfusion_fast.model.loss import Counts
from transfusion_fast.model.packed_batch import PackedBatch
from transfusion_fast.training.flops import training_flops

QUARTERS = 4


class Work(NamedTuple):
    """Weights of supervised tokens and of trained images, trained images, positions of documents with their noised
    copies, all positions, and floating point operations.

    They can be summed. Without weights of losses, the first two are numbers.
    """

    token_weights: float = 0
    image_weights: float = 0
    images: float = 0
    tokens: float = 0
    positions: float = 0
    flops: float = 0

    @classmethod
    def of(cls, batch: PackedBatch, config: Config, *, common: bool = True) -> Work:
        """Count the work of a micro-batch in host memory.

        Args:
            common: count also what the ranks that share packs have in common; true on one rank of them.
        """
        supervised, patches = len(batch.supervised), [len(images.latents) for images in batch.modalities]
        images, tokens, area = (common * x for x in (batch.num_images, batch.num_tokens, batch.layout.area))
        frozen = config.train.freeze == "text"
        trained = [images.trained_patches for images in batch.modalities]
        flops = training_flops(config.model, tokens, supervised, patches, area, decoded=trained, frozen_text=frozen)
        own = Counts.of(batch, common=common)
        return cls(float(own.tokens), float(own.images), images, tokens, len(batch.tokens), flops)


@dataclass
class Interval:
    """The work of all ranks since the last logged row, and the seconds of this rank."""

    work: Work = field(default_factory=Work)
    waited: float = 0.0
    """Seconds for data."""
    stalled: float = 0.0
    """Seconds for checkpoints."""
    start: float = field(default_factory=time.perf_counter)

    def add(self, work: Work) -> None:
        """Count a finished step."""
        self.work = Work(*map(operator.add, self.work, work))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out the seconds within, which are not those of training."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the seconds within as time that training waited for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Count the seconds within as time that training waited for a checkpoint."""
        start = time.perf_counter()
        yield
        self.stalled += time.perf_counter() - start


class QuarterLosses:
    """Sums of image losses and of their weights by quarter of the timestep range, on the device: adding never waits."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=device)
        self.quarters = torch.arange(QUARTERS, device=device)[:, None]

    def add(self, batch: PackedBatch, losses: Tensor) -> None:
        """Add the weighted losses [N] of a micro-batch's images, or pieces of them, in the order of its modalities."""
        timesteps = [images.timesteps[: images.num_trained] for images in batch.modalities]
        if not timesteps:
            return
        quarter = (torch.cat(timesteps) * (QUARTERS / NUM_TIMESTEPS)).ceil().long() - 1
        chosen = quarter.clamp(0, QUARTERS - 1) == self.quarters
        # Sums of masks, since index_add_ on CUDA would add in another order each time.
        self.sums[0] += torch.where(chosen, losses.double(), 0).sum(1)
        self.sums[1] += torch.where(chosen, torch.cat([images.weights for images in batch.modalities]), 0).sum(1)

    def pop(self) -> list[float]:
        """Return the sums of losses and then of weights, and begin again. Waits for the device."""
        sums = self.sums.flatten().tolist()
        self.sums.zero_()
        return sums


def mean_losses(sums: list[float]) -> list[float | None]:
    """Return the mean loss of each quarter, None without images, from what `QuarterLosses.pop` returns."""
    return [total / number if number else None for total, number in zip(sums[:QUARTERS], sums[QUARTERS:], strict=True)]


def peak_memory(device: torch.device) -> float:
    """Return what tensors took on a CUDA device at the peak since the last call; on a CPU, the resident set. Bytes."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
