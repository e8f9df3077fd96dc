"""The choice of tokens of text, for all streams at once and on their device."""

from __future__ import annotations

import torch
from torch import Tensor

from transfusion_fast.sampling.settings import TextSettings


def choose(logits: Tensor, settings: TextSettings, used: Tensor | None, uniform: Tensor) -> Tensor:
    """Return the next token of each stream, int64 [S]; -1 where logits are NaN.

    Args:
        logits: fp32 [S, V].
        used: bool [S, V], the text ids in each document so far; needed for a repetition penalty.
        uniform: fp32 [S], a random number in [0, 1) for each stream; unused if the temperature is 0.
    """
    invalid = logits.isnan().any(1)
    if settings.repetition_penalty != 1:
        assert used is not None
        penalty = settings.repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = logits.where(~used, penalized.clamp_max(torch.finfo(torch.float32).max))
    tokens = logits.argmax(1) if settings.temperature == 0 else _draw(logits, settings, uniform)
    return tokens.masked_fill(invalid, -1)


def _draw(logits: Tensor, settings: TextSettings, uniform: Tensor) -> Tensor:
    ordered, ids = logits.sort(dim=1, descending=True, stable=True)
    # Relative to the likeliest id, and by a number that is not 0 in fp32: then no quotient is infinity or NaN.
    ordered = (ordered - ordered[:, :1]) / max(settings.temperature, torch.finfo(torch.float32).tiny)
    if settings.top_k > 0:
        ordered[:, settings.top_k :] = float("-inf")
    likelihood = ordered.softmax(1)
    if settings.top_p < 1:
        likelihood = likelihood.where(likelihood.cumsum(1) - likelihood < settings.top_p, 0.0)
    likelihood = likelihood.where(likelihood >= settings.min_p * likelihood[:, :1], 0.0)
    reached = likelihood.cumsum(1)
    rank = (reached <= uniform[:, None] * reached[:, -1:]).sum(1)  # of the first id that exceeds it
    last = (likelihood > 0).sum(1) - 1  # rounding could lead past it
    return ids.gather(1, torch.minimum(rank, last)[:, None]).squeeze(1)
