"""Weights of losses of documents and their parts. Preparing data needs them without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

MAX_WEIGHT = 1e6
"""Largest weight of a loss."""


def check_weight(weight: object, what: str) -> float:
    """Return a weight of a loss; raise ValueError naming `what` unless it is a number in its range."""
    number = isinstance(weight, int | float | np.integer | np.floating) and not isinstance(weight, bool)
    if not number or not 0 <= cast(float, weight) <= MAX_WEIGHT:
        raise ValueError(f"weight of {what} must be a number in 0..{MAX_WEIGHT:.0f}, got {weight!r:.60}; 0 is no loss")
    return float(cast(float, weight))


@dataclass(frozen=True)
class Weighted:
    """A piece or a document with the weight of its loss, a number in 0..`MAX_WEIGHT`.

    A weight of 0 makes it context only, such as a prompt. The weights of a document and of its piece are multiplied.
    Losses are means in which a token or an image of weight 2 counts as two, so that what matters is how weights differ.
    """

    content: Any
    weight: float
