"""Stored packs as a training batch: keyed order, caption drop, timesteps and noise, then the flat sequence.

Everything random is a pure function of (seed, epoch, pack, image): a generator keyed by (seed, epoch, pack) draws for
one image after another, in stored order. Rank, world size, worker and earlier batches play no part.
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
from transfusion_fast.modalities import ModalityConfig
from transfusion_fast.model.diffusion import NUM_TIMESTEPS, Diffusion
from transfusion_fast.model.inputs import draw_timesteps
from transfusion_fast.model.packed_batch import PackedBatch, build_batch, copied_images
from transfusion_fast.model.sequence import Segments, Vocabulary, lay_out, without_context


@dataclass(frozen=True)
class KeyedPack:
    """A pack, and the key of its randomness beside the seed."""

    pack: Pack
    epoch: int
    number: int


@dataclass(frozen=True)
class Draws:
    """The randomness of a pack, images in stored order: uniforms in [0, 1) of shape [N], timesteps [K, N] of K noised
    copies, and noise like the latents for each copy, [K, values]."""

    order: np.ndarray
    drop: np.ndarray
    timestep: np.ndarray
    noise: np.ndarray


def draw(keyed: KeyedPack, seed: int, copies: int = 1) -> Draws:
    """Draw all random numbers of a pack, whatever the settings use, so that no setting shifts the numbers after it."""
    key = np.random.SeedSequence([seed, keyed.epoch, keyed.number])
    generator = np.random.Generator(np.random.PCG64DXSM(key))
    images = int(np.count_nonzero(keyed.pack.segments[:, 1] != KIND_TEXT))
    order, drop, *timesteps = generator.random((3, images))
    noise = [generator.standard_normal(len(keyed.pack.latents), dtype=np.float32)]
    for _ in range(copies - 1):
        timesteps.append(generator.random(images))
        noise.append(generator.standard_normal(len(keyed.pack.latents), dtype=np.float32))
    return Draws(order, drop, np.stack(timesteps), np.stack(noise))


@dataclass(frozen=True)
class BatchBuilder:
    """Builder of `PackedBatch`es from lists of packs; runs in the loader's workers. Picklable.

    length_step: batches are padded to a multiple of it.
    """

    modalities: tuple[ModalityInfo, ...]
    vocabulary: Vocabulary
    diffusion: Diffusion
    settings: DataConfig
    seed: int
    configs: tuple[ModalityConfig, ...]
    causal_images: bool
    length_step: int

    def __call__(self, packs: Sequence[KeyedPack]) -> PackedBatch:
        """Return the micro-batch of `packs`, padded at its end."""
        copies = self.settings.added_copies
        draws = [vars(draw(keyed, self.seed, max(copies, 1))).values() for keyed in packs]
        drawn = Draws(*(np.concatenate(arrays, axis=-1) for arrays in zip(*draws, strict=True)))
        rows = _joined([keyed.pack for keyed in packs])
        tokens = np.concatenate([keyed.pack.tokens for keyed in packs])
        weights = None
        if any(keyed.pack.weights is not None for keyed in packs):
            weights = np.concatenate([_weights(keyed.pack) for keyed in packs])
        sequence = lay_out(self._segments(rows, weights, drawn), tokens, self.vocabulary)
        uniform = torch.from_numpy(drawn.timestep if copies else drawn.timestep[0])
        cap = NUM_TIMESTEPS if copies else self.settings.noise_cap
        timesteps = draw_timesteps(sequence, self.vocabulary, self.diffusion, uniform, cap)
        sequence = without_context(sequence, drawn.drop < self.settings.prob_uncond, self.vocabulary)
        values = np.concatenate([keyed.pack.latents for keyed in packs])
        values = scale_pixels(values) if values.dtype == np.uint8 else values.astype(np.float32)
        images = []
        for kind, info in enumerate(self.modalities, start=1):
            noise = [_patches(rows, noise, kind, info) for noise in drawn.noise]
            images.append((_patches(rows, values, kind, info), torch.stack(noise) if copies else noise[0]))
        used = len(sequence.tokens) + copies * int(sequence.length[copied_images(sequence)].sum())
        total = max(1, -(-used // self.length_step)) * self.length_step
        return build_batch(sequence, images, timesteps, self.configs, total, causal_images=self.causal_images)

    def _segments(self, rows: np.ndarray, weights: np.ndarray | None, draws: Draws) -> Segments:
        """Return the segments in the order drawn: a document of one text and one image, in this order, is a
        caption-image pair, which can be laid out image first."""
        is_image = rows[:, 1] != KIND_TEXT
        segments = np.bincount(rows[:, 0])
        second = np.flatnonzero(is_image & (segments[rows[:, 0]] == 2))  # images of documents of two segments
        second = second[second > 0]
        second = second[(rows[second - 1, 0] == rows[second, 0]) & ~is_image[second - 1]]
        number = np.cumsum(is_image)[second] - 1
        image_first = second[draws.order[number] >= self.settings.caption_first]
        order = np.arange(len(rows))
        order[image_first], order[image_first - 1] = image_first - 1, image_first
        document, kind, _, length, height, width = rows[order].T
        patch_size = np.array([1, *(modality.patch_size for modality in self.modalities)])[kind]
        rows, columns = height // patch_size, width // patch_size
        shape = np.stack([np.ones_like(rows), rows, columns], axis=1)
        return Segments(document, kind, length, shape, None if weights is None else weights[order])


def _weights(pack: Pack) -> np.ndarray:
    """Return the weight of the loss of each segment, fp32 [S]."""
    return np.ones(len(pack.segments), np.float32) if pack.weights is None else pack.weights


def _joined(packs: Sequence[Pack]) -> np.ndarray:
    """Return the segment rows of all packs, int64, with documents and the offsets of images numbered through."""
    tables, documents, values = [], 0, 0
    for pack in packs:
        tables.append(pack.segments + np.array([documents, 0, values, 0, 0, 0]))
        documents += pack.num_documents
        values += pack.latents.size
    return np.concatenate(tables)


def _patches(rows: np.ndarray, values: np.ndarray, kind: int, info: ModalityInfo) -> Tensor:
    """Cut the image values, fp32, into the patches of one modality, fp32 [P, C]; one pass for each size."""
    own = rows[rows[:, 1] == kind]
    patches = np.empty((own[:, 3].sum(), info.channels * info.patch_size**2), dtype=np.float32)
    end = np.cumsum(own[:, 3])
    for height, width in np.unique(own[:, 4:6], axis=0).tolist():
        same_size = np.flatnonzero((own[:, 4] == height) & (own[:, 5] == width))
        index = own[same_size, 2][:, None] + np.arange(height * width * info.channels)
        images = values[index].reshape(-1, height, width, info.channels)
        positions = (end - own[:, 3])[same_size][:, None] + np.arange(own[same_size[0], 3])
        patches[positions.reshape(-1)] = patchify(images, info.patch_size)
    return torch.from_numpy(patches)
