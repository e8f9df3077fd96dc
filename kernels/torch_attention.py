"""Hybrid attention in plain PyTorch, made for speed: the torch backend, and the one to train with on a CPU.

Long documents are computed one by one, where they lie: text alone by causal attention, which needs no mask and skips
what it hides; a document with images in tiles of at most `MAX_ROWS` queries, which need only the keys from the
document's start to the furthest key that one of their rows sees. Short documents of about one length are gathered into
a batch, padded to a common shape, since a call for each would cost more than its work. The masks are made once for all
layers, on the device: a byte a pair, and on CPUs in half precision also as numbers to add.

Every product is one scaled_dot_product_attention. On CPUs its backward in half precision takes several times as long as
in fp32 (torch 2.13), so there `_HalfPrecision` differentiates it by plain matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout

SHORT = 256  # documents of up to so many positions share batches
_LONGEST_OF_CLASS = list(accumulate(range(40), lambda longest, _: max(longest + 8, longest * 5 // 4), initial=8))
MAX_ROWS = 512  # longer tiles would mask away up to half of their keys; shorter ones cost a call each


class Mask:
    """Which keys the queries of a batch see, in the forms that PyTorch's ops take; each is made at most once."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible  # bool [B, 1, L, S]
        self._biases: dict[torch.dtype, Tensor] = {}

    @cached_property
    def hidden(self) -> Tensor:
        """What is not visible."""
        return ~self.visible

    def bias(self, dtype: torch.dtype) -> Tensor:
        """To add to the scores."""
        if dtype not in self._biases:
            zeros = torch.zeros_like(self.visible, dtype=dtype)
            self._biases[dtype] = zeros.masked_fill_(self.hidden, -math.inf)
        return self._biases[dtype]


@dataclass(frozen=True)
class Tile:
    """Queries [start, end) of a document and the keys [0, keys) that they see."""

    start: int
    end: int
    keys: int
    mask: Mask | None  # None for the whole of a text, causal


@dataclass(frozen=True)
class ShortBatch:
    """B short documents of one padded length L. Positions beyond a document's own repeat its last one."""

    shape: tuple[int, int]  # B, L
    mask: Mask


@dataclass(frozen=True)
class Plan:
    """The runs of positions that a layout falls into: long documents, stretches of short ones, padding."""

    run_lengths: list[int]
    documents: list[tuple[Tile, ...] | None]  # of each run; None for a stretch of short documents; padding has none
    batches: list[ShortBatch]
    gather: Tensor  # int64 [sum of B * L]: the place of each row of the batches among the positions of all stretches
    scatter: Tensor  # int64 [positions of all stretches]: for each of them, its row


# A compiler would follow every number of the plan, and compile anew for every batch.
@torch.compiler.disable
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """softmax(scale * Q K^T + mask) V. q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
    plan = layout.plan(make_plan)
    # One split, whose gradient is one concatenation: that of a slice takes a pass over all T positions.
    q_runs, k_runs, v_runs = (x.split(plan.run_lengths) for x in (q, k, v))
    stretches = [run for run, tiles in enumerate(plan.documents) if tiles is None]
    short_q, short_k, short_v = ([runs[i] for i in stretches] for runs in (q_runs, k_runs, v_runs))
    short = iter(_short_documents(plan, short_q, short_k, short_v, scale))
    outs: list[Tensor] = []
    for run, tiles in enumerate(plan.documents):
        if tiles is None:
            outs.append(next(short))
        else:
            outs += _long_document(tiles, q_runs[run], k_runs[run], v_runs[run], scale)
    if not outs:
        # Nothing is seen; an empty piece keeps the gradient's path to all three.
        outs = [q[:0] + k[:0].sum() + v[:0].sum()]
    padding = plan.run_lengths[-1]
    return _join([*outs, q.new_zeros(padding, *q.shape[1:])] if padding else outs)


def _long_document(tiles: tuple[Tile, ...], q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> list[Tensor]:
    """One document, q [L, H, D], k and v [L, G, D]; [rows, H, D] of each tile."""
    q_1HLD, k_1HLD, v_1HLD = _by_heads(q[None], k[None], v[None])
    outs = []
    for tile, rows in zip(tiles, q_1HLD.split([tile.end - tile.start for tile in tiles], dim=2), strict=True):
        keys, values = k_1HLD[:, :, : tile.keys], v_1HLD[:, :, : tile.keys]
        outs.append(_attend(rows, keys, values, tile.mask, scale)[0].transpose(0, 1))
    return outs


def _short_documents(
    plan: Plan, q_runs: list[Tensor], k_runs: list[Tensor], v_runs: list[Tensor], scale: float | None
) -> list[Tensor]:
    """The stretches of short documents, each [positions, H, D], by batches of documents of about one length."""
    if not q_runs:
        return []
    sizes = [B * L for B, L in (batch.shape for batch in plan.batches)]
    q_rows, k_rows, v_rows = (
        _Gather.apply(_join(runs), plan.gather, plan.scatter).split(sizes) for runs in (q_runs, k_runs, v_runs)
    )
    outs = []
    for batch, *rows in zip(plan.batches, q_rows, k_rows, v_rows, strict=True):
        q_BHLD, k_BHLD, v_BHLD = _by_heads(*(x.unflatten(0, batch.shape) for x in rows))
        outs.append(_attend(q_BHLD, k_BHLD, v_BHLD, batch.mask, scale).transpose(1, 2).flatten(0, 1))
    return list(_Scatter.apply(_join(outs), plan.scatter).split([len(run) for run in q_runs]))


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, heads, D] -> [B, H, L, D], keys and values repeated: with a mask, the fused kernels take no groups."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
    """q [B, H, L, D], k and v [B, H, S, D], mask None for causal -> [B, H, L, D]."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return _HalfPrecision.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    visible = None if mask is None else mask.visible
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=mask is None, scale=scale)


class _HalfPrecision(torch.autograd.Function):
    """scaled_dot_product_attention on a CPU, saving what it saves; backward in matrix products of half precision.

    P = exp(scale Q K^T - lse),   dV = P^T dO,   dS = softmax's gradient of dO V^T at P,   dQ, dK = dS K, dS^T Q
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float) -> Tensor:
        # As a number to add, which is what the op turns a boolean mask into, over all heads.
        bias = None if mask is None else mask.bias(q.dtype)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=mask is None, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(q, k, v, lse)
        ctx.mask, ctx.scale = mask, scale  # the plan's, shared by all layers
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        q, k, v, do = (x.contiguous() for x in (q * ctx.scale, k, v, do))
        # The product itself subtracts lse, in two parts that together have its precision, before anything is rounded.
        limit = torch.finfo(q.dtype).max
        high = lse.clamp(-limit, limit).to(q.dtype)
        low = (lse - high).to(q.dtype)
        columns = torch.stack([-high, -low], dim=-1)
        p = torch.cat([q, columns], dim=-1) @ torch.cat([k, torch.ones_like(k[..., :2])], dim=-1).transpose(-1, -2)
        hidden = torch.ones(p.shape[-2:], dtype=torch.bool).triu(1) if ctx.mask is None else ctx.mask.hidden
        p = p.exp_().masked_fill_(hidden, 0.0)
        ds = torch.ops.aten._softmax_backward_data(do @ v.transpose(-1, -2), p, -1, p.dtype)
        return ds @ (k * ctx.scale), ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do, None, None


def make_plan(layout: AttentionLayout) -> Plan:
    """How to compute `layout`, on its device."""
    offsets = layout.document_offsets.numpy()
    key_end = layout.key_ends()
    lengths = np.diff(offsets)
    has_image = np.zeros(len(lengths), dtype=bool)
    has_image[np.searchsorted(offsets, layout.image_spans[:, 0].numpy(), side="right") - 1] = True
    run_lengths: list[int] = []
    documents: list[tuple[Tile, ...] | None] = []
    is_short = lengths <= SHORT
    for number, length in enumerate(lengths.tolist()):
        if not is_short[number]:
            own_ends = key_end[offsets[number] : offsets[number + 1]] - offsets[number]
            documents.append(_tiles(own_ends, bool(has_image[number]), layout.device))
            run_lengths.append(length)
        elif documents and documents[-1] is None:
            run_lengths[-1] += length
        else:
            documents.append(None)
            run_lengths.append(length)
    run_lengths.append(layout.total_length - int(offsets[-1]))
    short = np.flatnonzero(is_short)
    batches, gather, scatter = _batches(lengths[short], offsets[short], key_end, layout.device)
    return Plan(run_lengths, documents, batches, gather, scatter)


def _tiles(key_end: np.ndarray, has_image: bool, device: torch.device) -> tuple[Tile, ...]:
    """The tiles of one document, whose rows see the keys [0, key_end)."""
    if not has_image:
        return (Tile(0, len(key_end), len(key_end), None),)
    tiles = []
    for start in range(0, len(key_end), MAX_ROWS):
        ends = key_end[start : start + MAX_ROWS]
        keys = int(ends[-1])
        visible = torch.arange(keys, device=device) < torch.from_numpy(ends).to(device)[:, None]
        tiles.append(Tile(start, start + len(ends), keys, Mask(visible[None, None])))
    return tuple(tiles)


def _batches(
    lengths: np.ndarray, starts: np.ndarray, key_end: np.ndarray, device: torch.device
) -> tuple[list[ShortBatch], Tensor, Tensor]:
    """Batches the short documents [start, start + length), and where their rows come from and go to: see `Plan`."""
    first = np.cumsum(lengths) - lengths  # of each document, among the positions of short ones
    batches, gather = [], [np.zeros(0, dtype=np.int64)]
    scatter = np.zeros(int(lengths.sum()), dtype=np.int64)
    rows_before = 0
    classes = _classes(lengths)
    for number in np.unique(classes):
        chosen = np.flatnonzero(classes == number)
        own = lengths[chosen, None]
        L = int(own.max())
        place = np.minimum(np.arange(L), own - 1)
        own_end = torch.from_numpy(key_end[starts[chosen, None] + place] - starts[chosen, None]).to(device)
        # What a document repeats lies at columns >= its length, and is hidden by comparing columns, not positions.
        visible = torch.arange(L, device=device) < own_end[:, None, :, None]
        batches.append(ShortBatch((len(chosen), L), Mask(visible)))
        among_short = (first[chosen, None] + place).reshape(-1)
        is_own = (np.arange(L) < own).reshape(-1)
        scatter[among_short[is_own]] = rows_before + np.flatnonzero(is_own)
        gather.append(among_short)
        rows_before += len(among_short)
    return batches, torch.from_numpy(np.concatenate(gather)).to(device), torch.from_numpy(scatter).to(device)


def _classes(lengths: np.ndarray) -> np.ndarray:
    """Documents of one class share a batch: their lengths differ by less than 8, or by less than a quarter."""
    return np.searchsorted(_LONGEST_OF_CLASS, lengths)


class _Gather(torch.autograd.Function):
    """x[gather]. What repeats a position is seen by no other and its output is dropped, so its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.scatter = scatter
        return x.flatten(1).index_select(0, gather).unflatten(1, x.shape[1:])

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return dx.flatten(1).index_select(0, ctx.scatter).unflatten(1, dx.shape[1:]), None, None


class _Scatter(torch.autograd.Function):
    """x[scatter], which holds no row twice: the gradient is put in place, where index_select's would be added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: Tensor) -> Tensor:
        ctx.scatter, ctx.rows = scatter, len(x)
        return x.flatten(1).index_select(0, scatter).unflatten(1, x.shape[1:])

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        rows = dx.new_zeros(ctx.rows, dx[0].numel()).index_copy_(0, ctx.scatter, dx.flatten(1))
        return rows.unflatten(1, dx.shape[1:]), None


def _join(parts: list[Tensor]) -> Tensor:
    """One after another, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
