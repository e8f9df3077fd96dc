"""Small models, and documents as short Python values, for the tests of the model and of sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from transfusion_fast import Transfusion
from transfusion_fast.model.sequence import TEXT, Segments, TokenSequence, Vocabulary, lay_out, without_context


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def small_model(**settings: Any) -> Transfusion:
    """Return a model whose every weight matters: none is near zero, as many are after the usual initialisation."""
    torch.manual_seed(0)
    model = Transfusion(**settings)
    for p in model.parameters():
        p.data = torch.randn(p.shape) * p.shape[1] ** -0.5 if p.ndim == 2 else p.data + 0.1 * torch.randn(p.shape)
    return model


def laid_out(documents: Sequence[Sequence[Any]], vocabulary: Vocabulary, dropped: Sequence[bool] = ()) -> TokenSequence:
    """Lay out documents of texts (lists of ids) and images (modality, *grid); cut before `dropped` images."""
    pieces = [(number, piece) for number, document in enumerate(documents) for piece in document]
    rows = [
        (number, TEXT, len(p), 1, 1, 1)
        if isinstance(p, list)
        else (number, 1 + p[0], math.prod(p[1:]), *(1, 1, 1, *p[1:])[-3:])
        for number, p in pieces
    ]
    *columns, frames, height, width = np.array(rows, dtype=np.int64).reshape(-1, 6).T
    text = np.array([i for _, p in pieces if isinstance(p, list) for i in p], dtype=np.int64)
    sequence = lay_out(Segments(*columns, np.stack([frames, height, width], axis=1)), text, vocabulary)
    return without_context(sequence, np.array(dropped, dtype=bool), vocabulary) if len(dropped) else sequence
