"""Sequence parallelism: ranks share one packed batch, so that a pack need not fit on one device.

Each of N ranks holds T / N of the positions and the layout of all T. Every layer works on single positions but
attention, before which ranks exchange their positions of all heads for all positions of their heads, and back after it
(DeepSpeed-Ulysses, arXiv 2309.14509). Letters as in sequence.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from einops import rearrange
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.distributed_c10d import GroupName

from transfusion_fast.model.packed_batch import ModalityBatch, PackedBatch


def split_batch(batch: PackedBatch, part: int, parts: int) -> PackedBatch:
    """Return the positions [part T / parts, (part + 1) T / parts) of a batch, with the layout of the whole batch.

    An image that is cut becomes an image in each part. Its losses add up to that of the whole image, because each is
    weighted by the fraction of patches.
    """
    length = len(batch.tokens) // parts
    start, end = part * length, (part + 1) * length
    own = (batch.supervised >= start) & (batch.supervised < end)
    supervised = batch.supervised[own] - start
    weights = None if batch.token_weights is None else batch.token_weights[own]
    tokens, labels, positions = (x[start:end].clone() for x in (batch.tokens, batch.labels, batch.positions))
    modalities = tuple(_split_images(images, start, end) for images in batch.modalities)
    return PackedBatch(tokens, labels, positions, supervised, batch.layout, modalities, batch.num_images, weights)


def _split_images(images: ModalityBatch, start: int, end: int) -> ModalityBatch:
    inside = (images.sequence_index >= start) & (images.sequence_index < end)
    count = torch.cat([images.image_offsets.new_zeros(1), inside.cumsum(0, dtype=torch.int32)])
    offsets = count[images.image_offsets]
    patches = offsets.diff()
    kept, trained = patches > 0, images.num_trained
    # Selection copies: a view would take the whole tensor with it to the training process.
    return replace(
        images,
        latents=images.latents[inside],
        noise=images.noise[inside[: images.trained_patches]],
        timesteps=images.timesteps[kept],
        image_offsets=torch.cat([offsets[:1], offsets[1:][kept]]),
        sequence_index=images.sequence_index[inside] - start,
        weights=images.weights[kept[:trained]] * (patches / images.image_offsets.diff())[:trained][kept[:trained]],
        by_shape=images.by_shape[:0],
        shapes=(),
    )


def exchange_heads(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, group: str, parts: int
) -> Tensor:
    """Compute attention over the positions of all ranks of a group. Collective, and differentiable.

    Args:
        attention: maps q [T, H / N, D], k and v [T, G / N, D] to [T, H / N, D].
        q: this rank's [T / N, H, D]. k, v: [T / N, G, D], where N divides G. group: the name of the process group.
        parts: N, the number of ranks in the group.

    Returns:
        this rank's [T / N, H, D].
    """
    sent = torch.cat([rearrange(x, "t (n h) d -> n t h d", n=parts) for x in (q, k, v)], dim=2)
    heads = [x.shape[1] // parts for x in (q, k, v)]
    out = attention(*_exchange(sent, group).flatten(0, 1).split(heads, dim=1))
    received = _exchange(rearrange(out, "(n t) h d -> n t h d", n=parts).contiguous(), group)
    return rearrange(received, "n t h d -> t (n h) d")


def _exchange(x: Tensor, group: str) -> Tensor:
    """Send x[i] to rank i of the group, and return what each rank has sent, in their order."""
    return collectives.wait_tensor(collectives.all_to_all_single(x, None, None, cast(GroupName, group)))
