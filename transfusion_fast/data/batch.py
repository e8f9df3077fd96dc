"""Stored packs to a training batch: keyed order, drop, timesteps and noise, then the flat sequence.

Whatever is random is a pure function of (seed, epoch, pack, image): a generator keyed by the first three draws in the
order in which the pack stores its images. Rank, world size, worker and what was read before have no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.config import DataConfig
from transfusion_fast.data.images import patchify, scale_pixels
from transfusion_fast.data.pack import KIND_TEXT, ModalityInfo, Pack
from transfusion_fast.model.diffusion import NUM_TIMESTEPS, Objective
from transfusion_fast.model.sequence import (
    PackedBatch,
    PositionScheme,
    Segments,
    Vocabulary,
    build_batch,
    frame,
    patch_mask,
    precedes_text,
)


@dataclass(frozen=True)
class KeyedPack:
    """A pack and what its randomness is keyed by."""

    pack: Pack
    epoch: int
    number: int


@dataclass(frozen=True)
class Draws:
    """The randomness of a pack, images in stored order: uniforms in [0, 1) of shape [N], noise like the latents."""

    order: np.ndarray
    drop: np.ndarray
    timestep: np.ndarray
    noise: np.ndarray


def draw(keyed: KeyedPack, seed: int) -> Draws:
    """Everything random of a pack, always drawn in full, so that no setting shifts what comes after it."""
    key = np.random.SeedSequence([seed, keyed.epoch, keyed.number])
    generator = np.random.Generator(np.random.PCG64DXSM(key))
    images = int(np.count_nonzero(keyed.pack.segments[:, 1] != KIND_TEXT))
    order, drop, timestep = generator.random((3, images))
    return Draws(order, drop, timestep, generator.standard_normal(len(keyed.pack.latents), dtype=np.float32))


@dataclass(frozen=True)
class BatchBuilder:
    """Makes a `PackedBatch` of constant length of a list of packs; what a loader's worker runs. Picklable."""

    modalities: tuple[ModalityInfo, ...]
    vocabulary: Vocabulary
    objective: Objective
    settings: DataConfig
    seed: int
    positions: PositionScheme
    total_length: int

    def __call__(self, packs: Sequence[KeyedPack]) -> PackedBatch:
        """Lays the packs out one after another, all padding at the end."""
        draws = [draw(keyed, self.seed) for keyed in packs]
        tables = [self._arranged(keyed.pack, d) for keyed, d in zip(packs, draws, strict=True)]
        documents = np.cumsum([0] + [len(framed) for _, framed in tables])
        rows = np.concatenate([table for table, _ in tables])
        document = np.concatenate([table[:, 0] + first for (table, _), first in zip(tables, documents, strict=False)])
        patch_size = np.array([1] + [m.patch_size for m in self.modalities])[rows[:, 1]]
        framed = np.concatenate([framed for _, framed in tables])
        grid_rows, grid_columns = rows[:, 4] // patch_size, rows[:, 5] // patch_size
        segments = Segments(document, rows[:, 1], rows[:, 3], grid_rows, grid_columns, framed)
        sequenced = frame(segments, np.concatenate([k.pack.tokens for k in packs]), self.vocabulary)

        capped = precedes_text(sequenced, self.vocabulary, patch_mask(sequenced))
        cap = torch.from_numpy(np.where(capped, self.settings.noise_cap, float(NUM_TIMESTEPS)))
        uniform = torch.from_numpy(np.concatenate([d.timestep for d in draws]))
        timesteps = self.objective.timesteps(uniform, cap)
        latents = [self._patches(k.pack.segments, self._scaled(k.pack.latents)) for k in packs]
        noise = [self._patches(k.pack.segments, d.noise) for k, d in zip(packs, draws, strict=True)]
        tensors = [
            (_cat(latents, m), _cat(noise, m), timesteps[torch.from_numpy(sequenced.modality == m)])
            for m in range(len(self.modalities))
        ]
        return build_batch(sequenced, self.vocabulary, tensors, self.positions, self.total_length)

    def _arranged(self, pack: Pack, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """The segment rows in the order drawn, int64, and which documents have <bos> and <eos>.

        A document of one text and one image is a caption-image pair: kept, image first, or taken apart so that the
        image is trained without its caption. Nothing changes length: <boi> patches <eoi> and <bos> text <eos> apart
        take as many positions as together.
        """
        rows = pack.segments.astype(np.int64)
        is_image = rows[:, 1] != KIND_TEXT
        size = np.bincount(rows[:, 0])
        second = np.flatnonzero(is_image & (size[rows[:, 0]] == 2))
        second = second[(second > 0)]
        second = second[(rows[second - 1, 0] == rows[second, 0]) & ~is_image[second - 1]]
        number = np.cumsum(is_image)[second] - 1
        dropped = draws.drop[number] < self.settings.guidance_drop
        image_first = second[dropped | (draws.order[number] >= self.settings.caption_first)]
        order = np.arange(len(rows))
        order[image_first], order[image_first - 1] = image_first - 1, image_first
        rows = rows[order]
        alone = second[dropped] - 1  # where a dropped image now stands, its caption right behind it
        split = np.zeros(len(rows), dtype=np.int64)
        split[alone + 1] = 1
        rows[:, 0] += np.cumsum(split)
        framed = np.ones(rows[-1, 0] + 1 if len(rows) else 0, dtype=bool)
        framed[rows[alone, 0]] = False
        return rows, framed

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """Pixels to fp32 in [-1, 1]; latents to fp32 as they are."""
        return scale_pixels(values) if values.dtype == np.uint8 else values.astype(np.float32)

    def _patches(self, segments: np.ndarray, values: np.ndarray) -> list[Tensor]:
        """fp32 [P, C] of each modality: flat image values in stored order, cut into patches."""
        return [torch.from_numpy(_cut(segments, values, m, info)) for m, info in enumerate(self.modalities)]


def _cut(segments: np.ndarray, values: np.ndarray, modality: int, info: ModalityInfo) -> np.ndarray:
    own = segments[segments[:, 1] == 1 + modality].astype(np.int64)
    width = info.channels * info.patch_size**2
    patches = np.empty((own[:, 3].sum(), width), dtype=np.float32)
    end = np.cumsum(own[:, 3])
    for height, columns in np.unique(own[:, 4:6], axis=0).tolist():
        alike = np.flatnonzero((own[:, 4] == height) & (own[:, 5] == columns))
        index = own[alike, 2][:, None] + np.arange(height * columns * info.channels)
        images = values[index].reshape(-1, height, columns, info.channels)
        place = (end - own[:, 3])[alike][:, None] + np.arange(own[alike[0], 3])
        patches[place.reshape(-1)] = patchify(images, info.patch_size)
    return patches


def _cat(patches: Sequence[Sequence[Tensor]], modality: int) -> Tensor:
    return torch.cat([p[modality] for p in patches])
