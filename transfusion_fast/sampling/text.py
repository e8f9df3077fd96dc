"""The choice of a token of text."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from transfusion_fast.sampling.settings import TextSettings


def choose(logits: Tensor, settings: TextSettings, used: Collection[int], generator: torch.Generator) -> int:
    """Return the next id for logits fp32 [V] on the CPU; `used` are the text ids of the document so far."""
    if settings.repetition_penalty != 1 and used:
        ids = torch.tensor(sorted(used))
        own = logits[ids]
        divided = torch.where(own > 0, own / settings.repetition_penalty, own * settings.repetition_penalty)
        logits = logits.index_copy(0, ids, divided.clamp_max(torch.finfo(torch.float32).max))
    if settings.temperature == 0:
        return int(logits.argmax())
    # Relative to the likeliest id, and by a number that is not 0 in fp32: then no quotient is infinity or NaN.
    logits = (logits - logits.max()) / max(settings.temperature, torch.finfo(torch.float32).tiny)
    if 0 < settings.top_k < len(logits):
        logits[logits.topk(len(logits) - settings.top_k, largest=False).indices] = float("-inf")
    probabilities = logits.softmax(0)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities = probabilities.index_fill(0, order[before >= settings.top_p], 0.0)
    if settings.min_p > 0:
        probabilities = probabilities.where(probabilities >= settings.min_p * probabilities.max(), 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
