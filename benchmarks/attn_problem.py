"""What the attention benchmark measures: a problem, and what a backend must offer to be compared on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

NEEDS_CUDA = "needs a CUDA device"
_USABLE_MEMORY = 0.6  # of what is free: making the mask, gradients and the kernels' own buffers take the rest


@dataclass(frozen=True, eq=False)
class Problem:
    """One shape on one device: the layout's own device."""

    layout: AttentionLayout
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs and intervals are."""
        return self.layout.device

    @property
    def lengths(self) -> list[int]:
        """Of the documents."""
        return self.layout.document_offsets.diff().tolist()


class Backend(Protocol):
    """One column of the comparison."""

    name: str
    causal_only: bool
    """It cannot express the mask: a reference rate on causal documents, held to no reference."""

    def available(self, problem: Problem) -> str | None:
        """Why it cannot be measured here; None where it can."""

    def prepare(self, problem: Problem) -> Forward:
        """What a micro-batch needs once for all layers, then the forward pass."""


def too_large(what: str, size: int, problem: Problem) -> str | None:
    """Why `size` bytes cannot be had on the problem's device; None where they can."""
    free = _free_bytes(problem.device)
    if size <= _USABLE_MEMORY * free:
        return None
    need, free_gib = size / 2**30, free / 2**30
    return f"{what} would take {need:.1f} GiB, more than {_USABLE_MEMORY:.0%} of the {free_gib:.1f} GiB free"


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
