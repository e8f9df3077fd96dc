"""The ways to compute hybrid attention that the benchmark compares, each behind the same two methods.

A backend says why it cannot do a `Problem` (`available`), makes whatever it needs once a micro-batch (`prepare`), and
returns the function from q [T, H, D], k and v [T, G, D] to [T, H, D] that autograd differentiates. What comes out at
padding is left to each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from attn_libraries import FlashMask, FlashVarlenCausal, FlexFlashAttention
from attn_problem import NEEDS_CUDA, Backend, Forward, Problem, too_large
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model.ops import hybrid_attention


class Ours:
    """This repository's op on one of its backends.

    `prepare` builds the layout itself from the documents, which the others are given for nothing.
    """

    causal_only = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._last: tuple[Problem, AttentionLayout] | None = None

    def available(self, problem: Problem) -> str | None:
        return NEEDS_CUDA if self.name == "triton" and problem.device.type != "cuda" else None

    def prepare(self, problem: Problem) -> Forward:
        known = problem.layout
        layout = AttentionLayout.from_spans(
            known.document_offsets.diff().numpy(), known.image_spans.numpy(), known.total_length, known.device
        )
        # Plans are made when a pass first asks for them. A problem prepared again gets those that its passes asked
        # for, so that preparing costs then what it costs in every micro-batch.
        if self._last is not None and self._last[0] is problem:
            for build in self._last[1]._plans:
                layout.plan(build)
        self._last = (problem, layout)
        return lambda q, k, v: hybrid_attention(q, k, v, layout, backend=self.name)


class SdpaDense:
    """scaled_dot_product_attention with one boolean [T, T] mask."""

    name, causal_only = "sdpa_dense", False

    def available(self, problem: Problem) -> str | None:
        pairs = problem.layout.total_length**2
        return too_large("its [T, T] mask, as booleans and as a bias,", pairs * (1 + problem.dtype.itemsize), problem)

    def prepare(self, problem: Problem) -> Forward:
        layout = problem.layout
        position = torch.arange(layout.total_length, device=layout.device)
        # Padding sees itself, as a row without any key is NaN in some of torch's kernels.
        key_end = torch.maximum(layout.key_end, layout.key_start + 1)
        mask_TT = position >= layout.key_start[:, None]
        mask_TT &= position < key_end[:, None]
        return lambda q, k, v: _sdpa(q, k, v, mask_TT, causal=False)


class SdpaDocuments:
    """One scaled_dot_product_attention a document: causal by flag, or with the document's own mask if it has images."""

    name, causal_only = "sdpa_documents", False

    def available(self, problem: Problem) -> str | None:
        squares = [length**2 for length in problem.lengths]
        size = sum(squares) + max(squares, default=0) * problem.dtype.itemsize
        return too_large("its documents' masks", size, problem)

    def prepare(self, problem: Problem) -> Forward:
        layout, lengths = problem.layout, problem.lengths
        masks = _document_masks(layout)
        padding = layout.total_length - sum(lengths)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Split once: the gradient of a slice is as long as the pack, for every document.
            pieces = zip(*(x.split([*lengths, padding])[:-1] for x in (q, k, v)), masks, strict=True)
            outs = [_sdpa(q_d, k_d, v_d, mask, causal=mask is None) for q_d, k_d, v_d, mask in pieces]
            return torch.cat([*outs, q.new_zeros(padding, *q.shape[1:])])

        return forward


class Flex:
    """Compiled FlexAttention given the interval form of the mask, which is its best case."""

    name, causal_only = "flex", False

    def available(self, problem: Problem) -> str | None:
        return None if problem.device.type == "cuda" else f"{NEEDS_CUDA}: FlexAttention has no backward on a CPU"

    def prepare(self, problem: Problem) -> Forward:
        from torch.nn.attention.flex_attention import create_block_mask

        layout, T = problem.layout, problem.layout.total_length
        key_start, key_end = layout.key_start, layout.key_end

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= key_start[query]) & (key < key_end[query])

        block_mask = create_block_mask(visible, None, None, T, T, device=problem.device, _compile=True)
        grouped = problem.heads != problem.kv_heads

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=grouped)[0].transpose(0, 1)

        return forward


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Ours("triton"),
        Ours("torch"),
        SdpaDense(),
        SdpaDocuments(),
        Flex(),
        FlashVarlenCausal(),
        FlashMask(),
        FlexFlashAttention(),
    )
}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    # torch's fused kernels take no grouped heads together with a mask.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] != q.shape[1] else x for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)[0].transpose(0, 1)


def _document_masks(layout: AttentionLayout) -> list[Tensor | None]:
    """bool [L, L] of each document that has an image, None for text."""
    offsets = layout.document_offsets.tolist()
    illustrated = set(
        (torch.searchsorted(layout.document_offsets, layout.image_spans[:, 0].contiguous(), right=True) - 1).tolist()
    )
    masks: list[Tensor | None] = []
    for number, (start, end) in enumerate(pairwise(offsets)):
        position = torch.arange(start, end, device=layout.device) if number in illustrated else None
        masks.append(None if position is None else position < layout.key_end[start:end, None])
    return masks


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation a shape, as kernels for shapes left open are slower; the default stops at eight.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)
