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

from transfusion_fast.model.packed_batch import PackedBatch

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
    """Cross-entropy per token, diffusion loss per image times the loss weight of its modality, and what is minimised:
    their weighted sum and the z-loss, fp32 scalars; this batch's counts; and the diffusion loss of each image times its
    weight, fp32 [N], in the order of modalities, without gradient.

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
    scaled: Tensor,
    diffusion_weight: float,
    counts: Counts | None,
    *,
    image_weights: Tensor,
    token_weights: Tensor | None = None,
    z_losses: Tensor | None = None,
) -> Losses:
    """Divide the weighted sums of fp32 losses by `counts`, or by the batch's own for None.

    Args:
        token_losses: cross-entropies [S]. image_losses: diffusion losses [N]. scaled: the same times the loss weights
            of their modalities.
        image_weights, token_weights: [N] and [S], those of `PackedBatch`; without `token_weights` the batch's own
            counts are numbers.
        z_losses: [S], which count in the total alone.
    """
    own = Counts(len(token_losses), len(image_losses))
    if token_weights is not None:
        token_losses = token_losses * token_weights
        own = Counts(token_weights.sum(), image_weights.sum())
    counts = counts or own
    text, diffusion = _mean(token_losses, counts.tokens), _mean(scaled * image_weights, counts.images)
    total = text + diffusion_weight * diffusion
    if z_losses is not None:
        total = total + _mean(z_losses if token_weights is None else z_losses * token_weights, counts.tokens)
    return Losses(text, diffusion, total, own, (image_losses * image_weights).detach())


def _mean(losses: Tensor, count: float | Tensor) -> Tensor:
    """Return the sum of losses over their count, or zero for none, without waiting for a count on the device."""
    return losses.sum() / (count.where(count > 0, 1.0) if isinstance(count, Tensor) else count or 1)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118), or the logits without a cap."""
    return logits if cap is None else (logits / cap).tanh() * cap


def token_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, logit_cap: float | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy and the z-loss of each position, fp32 [S] each, the latter None for a weight of zero.

    Args:
        hidden: [S, E]. weight: [V, E]. labels: int64 [S].
        logit_cap: bound of `soft_cap`.
        z_loss: weight of the squared log-sum-exp of the logits (PaLM, arXiv 2204.02311, section 5).

    Small vocabularies are computed in fp32. For larger ones the logits are products in the dtype of the inputs,
    everything after them is fp32, and they are computed in chunks, again in the backward pass, so that the logits
    [S, V] are never in memory at once.
    """
    if weight.shape[0] > SMALL_VOCABULARY:
        # The backward pass runs outside of autocast, so both passes get the inputs in the dtype of its products.
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        losses, lse = _ChunkedCrossEntropy.apply(hidden, weight, labels, logit_cap)
    else:
        logits = soft_cap(F.linear(hidden.float(), weight.float()), logit_cap)
        losses = F.cross_entropy(logits, labels, reduction="none")
        lse = logits.logsumexp(dim=1) if z_loss else losses
    return losses, z_loss * lse.square() if z_loss else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy and log-sum-exp of each position from chunks of logits. The backward pass adds the chunks'
    gradients of the weight in fp32.

    With p = softmax(logits), d cross-entropy = p - onehot(label) and d log-sum-exp = p; through the soft cap,
    d logit = 1 - (logit / cap)^2.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
        lse = hidden.new_empty(len(hidden), dtype=torch.float32)
        losses = torch.empty_like(lse)
        for rows in _chunks(hidden, weight):
            logits = _capped_logits(hidden[rows], weight, cap)
            lse[rows] = logits.logsumexp(dim=1)
            losses[rows] = lse[rows] - logits.gather(1, labels[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.cap = cap
        ctx.set_materialize_grads(False)
        return losses, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, labels, lse = ctx.saved_tensors
        dlosses = torch.zeros_like(lse) if dlosses is None else dlosses
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            logits = _capped_logits(hidden[rows], weight, ctx.cap)
            slope = None if ctx.cap is None else 1 - (logits / ctx.cap).square_()
            dlogits = logits.sub_(lse[rows, None]).exp_()
            if dlse is None:
                dlogits.scatter_add_(1, labels[rows, None], dlogits.new_full((1, 1), -1).expand(len(dlogits), 1))
                dlogits.mul_(dlosses[rows, None])
            else:
                dlogits.mul_((dlosses + dlse)[rows, None]).scatter_add_(1, labels[rows, None], -dlosses[rows, None])
            dlogits = (dlogits if slope is None else dlogits.mul_(slope)).to(hidden.dtype)
            dhidden[rows] = dlogits @ weight
            dweight += dlogits.t() @ hidden[rows]
        return dhidden, dweight.to(weight.dtype), None, None


def _capped_logits(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    """Return logits fp32 in memory of their own."""
    logits = F.linear(hidden, weight).float()
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // weight.shape[0])
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))
