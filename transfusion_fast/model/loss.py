"""The training loss: language loss + lambda * diffusion loss (arXiv 2408.11039, equation 4), globally normalised.

Every supervised token weighs the same and every image weighs the same, wherever the batch was cut: a rank divides its
sums by the counts of the whole optimizer step, over ranks and accumulation steps, and the parts add up to the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_VOCABULARY = 4096  # whose logits in fp32 are no burden


class Counts(NamedTuple):
    """What a loss is divided by: supervised tokens and images."""

    tokens: int
    images: int


class Losses(NamedTuple):
    """fp32 scalars: cross-entropy per token, squared error per image, their weighted sum; and what was counted here.

    With half-precision weights and a vocabulary above `SMALL_VOCABULARY` each token's value has that precision.

    A tuple, because ZeRO-3 looks for a module's output tensors in tuples, lists and dicts.
    """

    text: Tensor
    diffusion: Tensor
    total: Tensor
    counts: Counts


def combine(token_losses: Tensor, image_losses: Tensor, diffusion_weight: float, counts: Counts | None) -> Losses:
    """Sums fp32 [S] cross-entropies and [N] image errors over `counts`; None: over this batch's own."""
    own = Counts(len(token_losses), len(image_losses))
    counts = counts or own
    text = token_losses.sum() / max(counts.tokens, 1)
    diffusion = image_losses.sum() / max(counts.images, 1)
    return Losses(text, diffusion, text + diffusion_weight * diffusion, own)


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each of S positions, fp32 [S]: hidden [S, E], weight [V, E], labels int64 [S].

    A small vocabulary is computed in fp32. A large one goes through in chunks, so that the logits [S, V] are never
    held at once; of half-precision inputs each value then has half precision.
    """
    if weight.shape[0] > SMALL_VOCABULARY:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float()
    return F.linear_cross_entropy(hidden.float(), weight.float(), labels, reduction="none")
