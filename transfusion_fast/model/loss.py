"""The training loss: language loss + lambda * diffusion loss (arXiv 2408.11039, equation 4), globally normalised.

Every supervised token has the same weight, and so has every image, however the batch is divided: each rank divides its
sums by the counts of the whole optimizer step, over ranks and accumulation steps, and the parts add up to the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_VOCABULARY = 4096  # up to this size the logits fit in memory in fp32


class Counts(NamedTuple):
    """Divisors of the losses: numbers of supervised tokens and of images."""

    tokens: int
    images: int


class Losses(NamedTuple):
    """Cross-entropy per token, squared error per image and their weighted sum, fp32 scalars; this batch's counts; and
    the squared error of each image, fp32 [N], in the order of modalities, without gradient.

    With half-precision weights and a vocabulary above `SMALL_VOCABULARY`, the cross-entropy of each token has half
    precision. This is a tuple because ZeRO-3 looks for a module's output tensors in tuples, lists and dicts.
    """

    text: Tensor
    diffusion: Tensor
    total: Tensor
    counts: Counts
    per_image: Tensor


def combine(token_losses: Tensor, image_losses: Tensor, diffusion_weight: float, counts: Counts | None) -> Losses:
    """Divide the sums of fp32 [S] cross-entropies and [N] image errors by `counts`, or by the batch's own for None."""
    own = Counts(len(token_losses), len(image_losses))
    counts = counts or own
    text = token_losses.sum() / max(counts.tokens, 1)
    diffusion = image_losses.sum() / max(counts.images, 1)
    return Losses(text, diffusion, text + diffusion_weight * diffusion, own, image_losses.detach())


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position, fp32 [S], from hidden [S, E], weight [V, E] and labels int64 [S].

    Small vocabularies are computed in fp32. Larger ones are computed in chunks, so that the logits [S, V] are never in
    memory at once; with half-precision inputs each value then has half precision.
    """
    if weight.shape[0] > SMALL_VOCABULARY:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options).float()
    return F.linear_cross_entropy(hidden.float(), weight.float(), labels, reduction="none")
