"""The training loss: language loss + lambda * diffusion loss (arXiv 2408.11039, equation 4), globally normalised.

Every supervised token has the same weight, and so has every image, unless documents say otherwise, however the batch is
divided: each rank divides its weighted sums by the sums of weights of the whole optimizer step, over ranks and
accumulation steps, and the parts add up to the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_fast.model.sequence import PackedBatch

SMALL_VOCABULARY = 4096  # up to this size the logits fit in memory in fp32
_CHUNK = 1 << 25  # logits in memory at once for larger vocabularies


class Counts(NamedTuple):
    """Divisors of the losses: sums of the weights of supervised tokens and of images, without weights their numbers."""

    tokens: float | Tensor
    images: float | Tensor

    @classmethod
    def of(cls, batch: PackedBatch, *, common: bool = True) -> Counts:
        """Return the counts of a batch in host memory, as numbers.

        Args:
            common: count also the images that ranks that share the pack have in common; true on one rank of them.
        """
        if batch.token_weights is None:
            return cls(len(batch.supervised), batch.num_images * common)
        images = sum(own.weights.double().sum().item() for own in batch.modalities)
        return cls(batch.token_weights.double().sum().item(), images)


class Losses(NamedTuple):
    """Cross-entropy per token, squared error per image and their weighted sum, fp32 scalars; this batch's counts; and
    the squared error of each image times its weight, fp32 [N], in the order of modalities, without gradient.

    This is a tuple because ZeRO-3 looks for a module's output tensors in tuples, lists and dicts.
    """

    text: Tensor
    diffusion: Tensor
    total: Tensor
    counts: Counts
    per_image: Tensor


def combine(
    token_losses: Tensor,
    image_losses: Tensor,
    diffusion_weight: float,
    counts: Counts | None,
    token_weights: Tensor | None = None,
    image_weights: Tensor | None = None,
) -> Losses:
    """Divide the weighted sums of fp32 [S] cross-entropies and [N] image errors by `counts`, or by the batch's own.

    The weights are those of `PackedBatch`; without `token_weights` the batch's own counts are numbers.
    """
    own = Counts(len(token_losses), len(image_losses))
    if image_weights is not None:
        image_losses = image_losses * image_weights
    if token_weights is not None and image_weights is not None:
        token_losses = token_losses * token_weights
        own = Counts(token_weights.sum(), image_weights.sum())
    counts = counts or own
    text, diffusion = _mean(token_losses, counts.tokens), _mean(image_losses, counts.images)
    return Losses(text, diffusion, text + diffusion_weight * diffusion, own, image_losses.detach())


def _mean(losses: Tensor, count: float | Tensor) -> Tensor:
    """Return the sum of losses over their count, or zero for none, without waiting for a count on the device."""
    return losses.sum() / (count.where(count > 0, 1.0) if isinstance(count, Tensor) else count or 1)


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each position, fp32 [S], from hidden [S, E], weight [V, E] and labels int64 [S].

    Small vocabularies are computed in fp32. For larger ones the logits are products in the dtype of the inputs,
    everything after them is fp32, and they are computed in chunks, again in the backward pass, so that the logits
    [S, V] are never in memory at once.
    """
    if weight.shape[0] > SMALL_VOCABULARY:
        # The backward pass runs outside of autocast, so both passes get the inputs in the dtype of its products.
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return _ChunkedCrossEntropy.apply(hidden, weight, labels)
    return F.cross_entropy(F.linear(hidden.float(), weight.float()), labels, reduction="none")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy from chunks of logits. The backward pass needs the log-sum-exp of each position, and adds the
    chunks' gradients of the weight in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        lse = hidden.new_empty(len(hidden), dtype=torch.float32)
        losses = torch.empty_like(lse)
        for rows in _chunks(hidden, weight):
            logits = F.linear(hidden[rows], weight).float()
            lse[rows] = logits.logsumexp(dim=1)
            losses[rows] = lse[rows] - logits.gather(1, labels[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, labels, lse)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            dlogits = F.linear(hidden[rows], weight).float().sub_(lse[rows, None]).exp_()
            dlogits.scatter_add_(1, labels[rows, None], dlogits.new_full((1, 1), -1).expand(len(dlogits), 1))
            dlogits = dlogits.mul_(upstream[rows, None]).to(hidden.dtype)
            dhidden[rows] = dlogits @ weight
            dweight += dlogits.t() @ hidden[rows]
        return dhidden, dweight.to(weight.dtype), None


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // weight.shape[0])
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))
