"""The flat packed batch that the model is trained on, built from a laid-out sequence. Letters as in sequence.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.modalities import ModalityConfig
from transfusion_fast.model.diffusion import NUM_TIMESTEPS
from transfusion_fast.model.sequence import (
    IGNORED_LABEL,
    TokenSequence,
    documents_of_images,
    labels_of,
    patch_mask,
    positions_of,
    ranges,
)

Shapes = tuple[tuple[int, int, int, int], ...]
"""Numbers of images and their grids of patches, (images, frames, rows, columns) for each shape."""
CLEAN_TIMESTEP = 1.0  # of images that are context only: almost no noise


@dataclass(frozen=True, eq=False)
class ModalityBatch:
    """The images of one modality in a packed batch: N images with P patches in total.

    The first N' of them, with P' patches, are trained. The others are clean images in context, of which the trained
    ones are noised copies; without copies there are none, and N' = N.

    latents: fp32 [P, C], clean; noise: fp32 [P', C]; timesteps: fp32 [N] in (0, 1000]; image_offsets: int32 [N + 1]
    over the patches; sequence_index: int64 [P], the position of each patch in the sequence; weights: fp32 [N'], the
    weight of each trained image's loss times the fraction of its patches that this batch holds, which is 1 unless
    ranks share the pack; by_shape: int64 [N], the trained images and then the others, in the order of their shapes;
    shapes: their shapes in that order, always on the host, so that code for each shape does not wait for the device.
    Both are empty if ranks share the pack, which cuts images.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    image_offsets: Tensor
    sequence_index: Tensor
    weights: Tensor
    by_shape: Tensor
    shapes: Shapes

    @property
    def num_trained(self) -> int:
        """N', the number of images that are trained."""
        return len(self.weights)

    @property
    def trained_patches(self) -> int:
        """P', the number of their patches."""
        return len(self.noise)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch: documents one after another along one axis of constant length T, padding at its end.

    tokens, labels: int64 [T]; positions: int32 [T], [T, 2] or [T, 3]; supervised: int64 [S], the positions that have a
    label; layout: the attention mask; modalities: the images, one entry for every modality, even one without images;
    num_images: the trained images of all modalities, of all ranks that share the pack; token_weights: fp32 [S], the
    weight of each label's loss, or None if those of all labels and images are 1.

    Raises:
        ValueError: a timestep outside (0, 1000]. On a GPU it is not looked at, as the host would have to wait.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    supervised: Tensor
    layout: AttentionLayout
    modalities: tuple[ModalityBatch, ...]
    num_images: int
    token_weights: Tensor | None = None

    def __post_init__(self) -> None:
        for modality, images in enumerate(self.modalities):
            t = images.timesteps
            if t.device.type == "cpu" and len(wrong := (~((t > 0) & (t <= NUM_TIMESTEPS))).nonzero()):
                what = f"modality {modality}, image {wrong[0].item()}: timestep must lie in (0, {NUM_TIMESTEPS}]"
                raise ValueError(f"{what}, got {t[wrong[0]].item():g}; 1 is almost clean")

    @property
    def num_tokens(self) -> int:
        """Number of positions that belong to a document, of all ranks that share the pack."""
        return int(self.layout.document_offsets[-1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> PackedBatch:
        def moved(batch: Any) -> Any:
            return replace(batch, **{k: move(v) for k, v in vars(batch).items() if isinstance(v, Tensor)})

        return replace(moved(self), layout=move(self.layout), modalities=tuple(moved(m) for m in self.modalities))


def build_batch(
    sequence: TokenSequence,
    images: Sequence[tuple[Tensor, Tensor]],
    timesteps: Tensor,
    modalities: Sequence[ModalityConfig],
    total_length: int | None = None,
    *,
    causal_images: bool = False,
) -> PackedBatch:
    """Add noised copies, labels, positions, attention layout and padding to a sequence of tokens.

    Without copies, images are noised where they stand, and what follows sees them noised. With copies, they stay clean
    there and have no loss, and K noised copies of each are added behind the context of its document, unless the weight
    of its loss is 0. A copy has its image's positions, and sees what precedes its image, and itself; nothing else sees
    it.

    Args:
        images: (latents [P, C], noise [P, C]) of each modality, its images in sequence order; with K copies the noise
            is [K, P, C].
        timesteps: fp32 [N] of the images of all modalities, in sequence order; with K copies [K, N].
        modalities: those of the model, for the positions of their patches.
        total_length: T, of which the rest is padding; default: no padding.
        causal_images: let patches see only what precedes them in the sequence, as text does.

    Raises:
        ValueError: as `PackedBatch`.
    """
    copies = len(timesteps) if timesteps.ndim == 2 else 0
    placed = _place_copies(sequence, copies)
    used, trained = len(placed.source), len(placed.places)
    total = used if total_length is None else total_length
    is_patch = patch_mask(sequence)
    labels = labels_of(sequence, is_patch)[placed.source]
    supervised = np.flatnonzero(labels != IGNORED_LABEL)
    weights = np.ones(len(sequence.tokens), np.float32) if sequence.weights is None else sequence.weights
    token_weights = weights[placed.source[supervised] + 1]
    image_weights = weights[sequence.start[placed.image[:trained]]]
    is_weighted = (token_weights != 1).any() or (image_weights != 1).any()
    spans = np.stack([placed.start, placed.length], axis=1)
    if copies:
        clean = timesteps.new_full((len(sequence.start),), CLEAN_TIMESTEP)
        copied = torch.from_numpy(copied_images(sequence))
        timesteps = torch.cat([timesteps.t()[copied].flatten(), clean])

    def padded(array: np.ndarray, value: int) -> Tensor:
        return torch.from_numpy(np.concatenate([array, np.full((total - used, *array.shape[1:]), value, array.dtype)]))

    def modality_batch(modality: int, latents: Tensor, noise: Tensor) -> ModalityBatch:
        own = np.flatnonzero(sequence.modality[placed.image] == modality)
        length, noised = placed.length[own], np.count_nonzero(own < trained)
        if copies:
            lengths = np.where(sequence.modality == modality, sequence.length, 0)
            first = (np.cumsum(lengths) - lengths)[placed.image[own]]
            first_noise = first[:noised] + np.arange(noised) % copies * len(latents)
            noise = noise.flatten(0, 1).index_select(0, torch.from_numpy(ranges(first_noise, length[:noised])))
            latents = latents.index_select(0, torch.from_numpy(ranges(first, length)))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
        index = torch.from_numpy(ranges(placed.start[own], length))
        order, shapes = _by_shape(sequence.shape[placed.image[own]], own >= trained)
        own_timesteps, own_weights = timesteps[torch.from_numpy(own)], torch.from_numpy(image_weights[own[:noised]])
        return ModalityBatch(latents, noise, own_timesteps, offsets, index, own_weights, order, shapes)

    return PackedBatch(
        tokens=padded(sequence.tokens[placed.source], 0),
        labels=padded(labels, IGNORED_LABEL),
        positions=padded(positions_of(sequence, modalities)[placed.source], 0),
        supervised=torch.from_numpy(supervised),
        layout=AttentionLayout.from_spans(
            placed.document_lengths,
            () if causal_images else spans[trained if copies else 0 :],
            total,
            noised_copies=np.concatenate([spans[:trained], placed.places[:, None]], axis=1) if copies else (),
        ),
        modalities=tuple(modality_batch(m, *tensors) for m, tensors in enumerate(images)),
        num_images=trained,
        token_weights=torch.from_numpy(token_weights) if is_weighted else None,
    )


def copied_images(sequence: TokenSequence) -> np.ndarray:
    """Return the numbers of the images that get noised copies: all whose loss has another weight than 0."""
    images = np.arange(len(sequence.start))
    return images if sequence.weights is None else images[sequence.weights[sequence.start] > 0]


@dataclass(frozen=True, eq=False)
class _Placement:
    """A sequence with noised copies: the images are first the M copies, then the N images of the sequence.

    source: int64 [T], the position without copies that each position repeats; document_lengths: [documents]; image,
    start, length: [M + N], the number of each image in the sequence, and its span; places: [M], the start of the image
    that each copy stands for. Without copies, M = N and these are the images themselves.
    """

    source: np.ndarray
    document_lengths: np.ndarray
    image: np.ndarray
    start: np.ndarray
    length: np.ndarray
    places: np.ndarray


def _place_copies(sequence: TokenSequence, copies: int) -> _Placement:
    """Add `copies` copies of each of the `copied_images` behind its document, in the order of the images."""
    positions, images = np.arange(len(sequence.tokens)), np.arange(len(sequence.start))
    if not copies:
        return _Placement(positions, sequence.document_lengths, images, sequence.start, sequence.length, sequence.start)
    document, bounds = documents_of_images(sequence)
    image = np.repeat(copied_images(sequence), copies)
    length = sequence.length[image]
    added = np.zeros_like(sequence.document_lengths)
    np.add.at(added, document[image], length)
    before = np.cumsum(added) - added  # the positions that copies of earlier documents take
    start = bounds[document[image] + 1] + np.cumsum(length) - length
    source = np.empty(len(positions) + length.sum(), dtype=np.int64)
    source[positions + np.repeat(before, sequence.document_lengths)] = positions
    source[ranges(start, length)] = ranges(sequence.start[image], length)
    context = sequence.start + before[document]
    return _Placement(
        source=source,
        document_lengths=sequence.document_lengths + added,
        image=np.concatenate([image, images]),
        start=np.concatenate([start, context]),
        length=np.concatenate([length, sequence.length]),
        places=context[image],
    )


def _by_shape(shape: np.ndarray, is_context: np.ndarray) -> tuple[Tensor, Shapes]:
    """Return the order that sorts images by `is_context` [N] and their shapes [N, 3], and the shapes in this order."""
    if not len(shape):
        return torch.zeros(0, dtype=torch.int64), ()
    keys = np.concatenate([is_context[:, None], shape], axis=1)
    unique, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    return torch.from_numpy(order), tuple(zip(counts.tolist(), *unique.T[1:].tolist(), strict=True))
