"""A plan of the weights to begin a run from, and its execution by each rank.

A plan says for each parameter of the new model which of its elements are copied, and from where; a rank then reads only
what its own slices need. Elements without a source keep their initial values, and are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transfusion_fast.config import ModelConfig
from transfusion_fast.model.weights import Shape, Weights

VOCABULARY_TABLES = ("embedding.weight", "head.weight")
"""Parameters with a row for each id of the vocabulary."""


@dataclass(frozen=True)
class Span:
    """Elements [start, start + length) of a flattened parameter, copied from those of `source` at source_start."""

    start: int
    length: int
    source: str
    source_start: int = 0


Plan = dict[str, list[Span]]
"""The spans of every parameter, in order of their starts."""


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights to begin from.

    Attributes:
        shapes: those of the new model's parameters.
        notes: lines for the user about the source, and how the model differs from it.
    """

    weights: Weights
    plan: Plan
    shapes: Mapping[str, Shape]
    notes: tuple[str, ...]

    def copy(self, name: str, offset: int, target: Tensor) -> None:
        """Fill the elements of `target` that have a source; it is flat and starts at `offset` of the parameter."""
        for span in self.plan[name]:
            start, end = max(span.start, offset), min(span.start + span.length, offset + len(target))
            if start < end:
                source = self.weights.read(span.source, span.source_start + start - span.start, end - start)
                target[start - offset : end - offset].copy_(source)

    @property
    def report(self) -> str:
        """Lines for the user: what is copied from where, and what is not."""
        return "\n".join([*self.notes, f"initialised: {', '.join(self.initialised) or 'nothing'}"])

    @property
    def initialised(self) -> list[str]:
        """The codecs, other parameters and rows that keep their initial values."""
        names = (text for name, shape in self.shapes.items() for text in _missing(name, shape, self.plan[name]))
        whole = ("codecs.", "conditions.")
        return list(dict.fromkeys(".".join(n.split(".")[:2]) if n.startswith(whole) else n for n in names))


def _missing(name: str, shape: Shape, spans: list[Span]) -> Iterator[str]:
    """Yield descriptions of what no span covers: the parameter, or ranges of its rows."""
    row, end = math.prod(shape[1:]), math.prod(shape)
    covered = 0
    for start, length in [*((span.start, span.length) for span in spans), (end, 0)]:
        if start > covered:
            rows = f"rows {covered // row}-{start // row - 1} of "
            yield name if start - covered == end else rows + name
        covered = start + length


def transformer_settings(model: ModelConfig) -> dict[str, Any]:
    """Return what the stack of a model computes, with the defaults written out."""
    t = model.transformer
    return {
        "dim": t.dim,
        "depth": t.depth,
        "heads": t.num_heads,
        "kv_heads": t.num_kv_heads,
        "ffn_dim": t.hidden_dim,
        "qk_norm": t.qk_norm,
        "rope_theta": t.rope_theta,
        "norm_eps": t.norm_eps,
    }
