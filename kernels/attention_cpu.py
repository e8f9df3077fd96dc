"""Hybrid attention in plain PyTorch, made for speed: the torch backend, and the one to train with on a CPU.

Long documents are computed one by one: text alone by causal attention, which needs no mask and skips what it hides; a
document with images in tiles of at most `MAX_ROWS` queries, which need only the keys from the document's start to the
furthest key that one of their rows sees. Short documents of about one length are gathered into a batch, padded to a
common length, since a call for each would cost more than its work. The masks are made once for all layers, on the
device: a byte a pair, and on CPUs in half precision three more. Its gradients can be taken once.

Every product is one scaled_dot_product_attention, but for half precision on CPUs: see cpu_half_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_fast.kernels.layout import AttentionLayout

SHORT = 256  # documents of up to so many positions share batches
HALF_ALIGNMENT = 16  # of lengths: CPUs take up to 5 times as long for products whose rows begin at odd places
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
    """Queries `rows` of each document of a batch and the keys [0, keys) that they see."""

    rows: slice
    keys: int
    mask: Mask | None  # None for the whole of a text, causal


@dataclass(frozen=True)
class Batch:
    """B documents of one padded length L, whose rows lie one after another from `start` on."""

    start: int
    shape: tuple[int, int]  # B, L
    tiles: tuple[Tile, ...]  # together all L queries; the last of them sees every key

    def of(self, rows: Tensor) -> Tensor:
        """This batch's part of the rows of all [R, H, D], a view [B, H, L, D]."""
        B, L = self.shape
        return rows[self.start : self.start + B * L].unflatten(0, (B, L)).transpose(1, 2)


@dataclass(frozen=True)
class Plan:
    """The batches that a layout falls into: one for each long document, one for all short ones of a class.

    Rows of a batch beyond a document's own repeat its last position.
    """

    batches: list[Batch]
    positions: int  # of all documents; what follows is padding
    gather: Tensor  # int64 [R]: the position of each row
    scatter: Tensor  # int64 [positions]: the row of each


# A compiler would follow every number of the plan, and compile anew for every batch.
@torch.compiler.disable
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """softmax(scale * Q K^T + mask) V. q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
    half_on_cpu = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    plan = layout.plan(_plan_for_half if half_on_cpu else make_plan)
    if not plan.batches:
        # Nothing is seen; an empty piece keeps the gradient's path to all three.
        return torch.cat([q[:0] + k[:0].sum() + v[:0].sum(), torch.zeros_like(q)])
    q_rows, k_rows, v_rows = (_Gather.apply(x, plan) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1:  # with a mask, the fused kernels take no groups
        k_rows, v_rows = (x.repeat_interleave(group, dim=1) for x in (k_rows, v_rows))
    if half_on_cpu:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = HalfPrecisionAttention.apply(q_rows, k_rows, v_rows, plan.batches, scale)
    else:
        out = _join(list(_products(plan, q_rows, k_rows, v_rows, scale)))
    return _Scatter.apply(out, plan, len(q))


def _products(plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Iterator[Tensor]:
    """The outputs [rows, H, D] of all batches, one after another."""
    # One split, whose gradient is one concatenation: that of a slice takes a pass over all rows.
    sizes = [B * L for B, L in (batch.shape for batch in plan.batches)]
    for batch, *rows in zip(plan.batches, *(x.split(sizes) for x in (q, k, v)), strict=True):
        q_BHLD, k_BHLD, v_BHLD = (x.unflatten(0, batch.shape).transpose(1, 2) for x in rows)
        outs = []
        lengths = [tile.rows.stop - tile.rows.start for tile in batch.tiles]
        for tile, queries in zip(batch.tiles, q_BHLD.split(lengths, dim=2), strict=True):
            visible = None if tile.mask is None else tile.mask.visible
            keys, values = k_BHLD[:, :, : tile.keys], v_BHLD[:, :, : tile.keys]
            o_BHLD = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=visible, is_causal=visible is None, scale=scale
            )
            outs.append(o_BHLD.transpose(1, 2))
        yield _join(outs, dim=1).flatten(0, 1)


def _plan_for_half(layout: AttentionLayout) -> Plan:
    return make_plan(layout, HALF_ALIGNMENT)


def make_plan(layout: AttentionLayout, alignment: int = 1) -> Plan:
    """How to compute `layout`, on its device; padded lengths are multiples of `alignment`."""
    offsets = layout.document_offsets.numpy()
    key_end = layout.key_ends()
    lengths = np.diff(offsets)
    has_image = np.zeros(len(lengths), dtype=bool)
    has_image[np.searchsorted(offsets, layout.image_spans[:, 0].numpy(), side="right") - 1] = True
    batches: list[Batch] = []
    gather, scatter, start = [np.zeros(0, dtype=np.int64)], np.zeros(int(offsets[-1]), dtype=np.int64), 0
    for chosen in _batched(lengths, max(alignment, 8)):
        own, L = lengths[chosen, None], _aligned(int(lengths[chosen].max()), alignment)
        places = offsets[chosen, None] + np.minimum(np.arange(L), own - 1)  # [B, L]
        # What a document repeats lies at columns >= its length, which no row of it sees.
        ends = key_end[places] - offsets[chosen, None]
        causal = L > SHORT and not has_image[chosen[0]]
        tiles = (Tile(slice(0, L), L, None),) if causal else _tiles(ends, alignment, layout.device)
        batches.append(Batch(start, places.shape, tiles))
        is_own = np.arange(L) < own
        scatter[places[is_own]] = start + np.flatnonzero(is_own)
        gather.append(places.reshape(-1))
        start += places.size
    rows, positions = (torch.from_numpy(x).to(layout.device) for x in (np.concatenate(gather), scatter))
    return Plan(batches, int(offsets[-1]), rows, positions)


def _batched(lengths: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """The documents of each batch: one long one, or the short ones of a class.

    Lengths of a class differ by less than `step`, or by less than a quarter.
    """
    longest = list(accumulate(range(SHORT // step), lambda n, _: n + step * max(1, n // 4 // step), initial=step))
    classes = np.searchsorted(longest, lengths)
    is_long = lengths > SHORT
    classes[is_long] = len(longest) + np.arange(is_long.sum())
    order = np.argsort(classes, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(classes[order])) + 1) if len(order) else ()


def _aligned(length: int, alignment: int) -> int:
    """The next multiple."""
    return -(-length // alignment) * alignment


def _tiles(key_end: np.ndarray, alignment: int, device: torch.device) -> tuple[Tile, ...]:
    """The tiles of B documents of one length L, whose rows see the keys [0, key_end), key_end [B, L]."""
    length = key_end.shape[1]
    tiles = []
    for start in range(0, length, MAX_ROWS):
        ends = key_end[:, start : start + MAX_ROWS]
        keys = _aligned(int(ends.max()), alignment)
        visible = torch.arange(keys, device=device) < torch.from_numpy(ends).to(device)[:, None, :, None]
        tiles.append(Tile(slice(start, start + ends.shape[1]), keys, Mask(visible)))
    return tuple(tiles)


class _Gather(torch.autograd.Function):
    """Positions [T, ..] to rows [R, ..].

    What repeats a position is seen by no other and its output is dropped, so its gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan, ctx.length = plan, len(x)
        return _select(x, plan.gather, len(plan.gather))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return _select(dx, ctx.plan.scatter, ctx.length), None


class _Scatter(torch.autograd.Function):
    """Rows [R, ..] to positions [T, ..], padding zero.

    It takes no row twice: the gradient is put in place, where index_select's would be added up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, length: int) -> Tensor:
        ctx.plan = plan
        return _select(x, plan.scatter, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        rows = dx.new_zeros(len(plan.gather), dx[0].numel())
        rows.index_copy_(0, plan.scatter, dx[: plan.positions].flatten(1))
        return rows.unflatten(1, dx.shape[1:]), None, None


def _select(x: Tensor, index: Tensor, length: int) -> Tensor:
    """x[index], row by row, and zeros up to `length` rows."""
    out = x.new_empty(length, *x.shape[1:])
    torch.index_select(x.flatten(1), 0, index, out=out[: len(index)].flatten(1))
    out[len(index) :] = 0.0
    return out


def _join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """One after another, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


ROWS = 512  # of a causal text
_PARTS = 3  # of a log-sum-exp in half precision


class HalfPrecisionAttention(torch.autograd.Function):
    """Attention of batches that lie one after another: q, k and v [R, H, D] -> [R, H, D].

    One function for all of them: on a CPU half of the time of short documents goes into calls and copies. It can be
    differentiated once.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: Sequence[Batch], scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = []
        for batch in batches:
            q_BHLD, k_BHLD, v_BHLD, out_BHLD = (batch.of(x) for x in (q, k, v, out))
            for tile in batch.tiles:
                bias = None if tile.mask is None else tile.mask.bias(q.dtype)
                o, tile_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q_BHLD[:, :, tile.rows],
                    k_BHLD[:, :, : tile.keys],
                    v_BHLD[:, :, : tile.keys],
                    is_causal=tile.mask is None,
                    attn_mask=bias,
                    scale=scale,
                )
                out_BHLD[:, :, tile.rows] = o
                lse.append(tile_lse.flatten())
        ctx.save_for_backward(q, k, v, *lse)
        ctx.batches, ctx.scale = batches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *lse = ctx.saved_tensors
        q = q * ctx.scale
        columns = iter(_columns(torch.cat(lse), q.dtype).split([len(x) for x in lse]))
        gradients = torch.empty(3, *q.shape, dtype=q.dtype)
        for batch in ctx.batches:
            # One copy that puts each head's rows together, as matrix products need them.
            by_heads = torch.stack([batch.of(x) for x in (q, k, v, do)])
            B, H = by_heads.shape[1:3]
            pieces = [piece for tile in batch.tiles for piece in _pieces(tile, next(columns), B * H)]
            queries, keys, values, upstream = by_heads.flatten(1, 2)
            for x, gradient in zip(gradients, _batch_gradients(queries, keys, values, upstream, pieces), strict=True):
                batch.of(x).copy_(gradient.unflatten(0, (B, H)))
        gradients[0] *= ctx.scale
        return *gradients, None, None


@dataclass(frozen=True)
class _Piece:
    """Queries [start, end) of a tile and the keys [0, keys) that they see."""

    start: int
    end: int
    keys: int
    columns: Tensor
    """-lse in parts, [B * H, rows, _PARTS]."""
    hidden: Tensor
    """bool [B, 1, rows, keys], or [rows, keys] for all."""


def _pieces(tile: Tile, columns: Tensor, products: int) -> Iterator[_Piece]:
    """A tile as it is, or a causal one in several. `products` is B * H."""
    first, length = tile.rows.start, tile.rows.stop - tile.rows.start
    columns = columns.view(products, length, _PARTS)
    if tile.mask is not None:
        yield _Piece(first, tile.rows.stop, tile.keys, columns, tile.mask.hidden)
        return
    for start in range(0, length, ROWS):
        end = min(start + ROWS, length)
        hidden = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        yield _Piece(first + start, first + end, end, columns[:, start:end], hidden)


def _batch_gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor, pieces: Sequence[_Piece]) -> tuple[Tensor, ...]:
    """dQ without its scale, dK and dV [B * H, L, D], of scaled queries, keys, values and upstream of that shape."""
    if len(pieces) == 1 and pieces[0].keys == k.shape[1]:
        return _piece_gradients(q, k, v, do, pieces[0])
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros(2, *k.shape)  # fp32: keys are seen by many pieces
    for piece in pieces:
        rows, keys = slice(piece.start, piece.end), slice(piece.keys)
        dq[:, rows], dk_piece, dv_piece = _piece_gradients(q[:, rows], k[:, keys], v[:, keys], do[:, rows], piece)
        dk[:, keys] += dk_piece
        dv[:, keys] += dv_piece
    return dq, dk, dv


def _piece_gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor, piece: _Piece) -> tuple[Tensor, Tensor, Tensor]:
    # The product itself subtracts lse, before anything is rounded.
    q_columns = torch.cat([q, piece.columns], dim=-1)
    k_ones = torch.cat([k, k.new_ones(1, 1, 1).expand(*k.shape[:2], _PARTS)], dim=-1)
    p = torch.bmm(q_columns, k_ones.mT).exp_()
    documents = len(piece.hidden) if piece.hidden.ndim == 4 else 1
    p.view(documents, -1, *p.shape[1:]).masked_fill_(piece.hidden, 0.0)
    ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
    return torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, do)


def _columns(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """-lse fp32 [N] in parts [N, _PARTS], which together have all its bits, up to 196,512 in fp16."""
    limit = torch.finfo(dtype).max
    parts, rest = [], -lse
    for _ in range(_PARTS):
        parts.append(rest.clamp(-limit, limit).to(dtype))
        rest = rest - parts[-1]
    return torch.stack(parts, dim=-1)
