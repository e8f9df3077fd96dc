"""Hybrid attention in plain PyTorch: the torch backend on any device, and the fastest way to train on a CPU.

    S = scale Q K^T,   P = softmax(S + mask),   O = P V

A long document is computed alone. Text without images uses causal attention, which needs no mask and skips what it
hides. A document with images is cut into tiles of at most `MAX_ROWS` queries, and each tile reads the keys from the
start of the document to the last key that one of its rows sees. Short documents of similar lengths are padded to a
common length and computed as one batch, because one call for each would cost more than its work. The masks are made
once for all layers, on the device: one byte a pair, and three more in half precision on a CPU.

Every product is one `scaled_dot_product_attention`. In half precision on a CPU the backward pass is our own, which is
faster than PyTorch's: it saves Q, K, V and the log-sum-exp L, and computes (FlashAttention, arXiv 2205.14135)

    P = exp(scale Q K^T - L),   dV = P^T dO,   dP = dO V^T,   dS = P (dP - rowsum(dP P)),
    dQ = scale dS K,   dK = scale dS^T Q
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_fast.kernels.layout import AttentionLayout

SHORT = 256  # longest document that shares a batch with others
HALF_ALIGNMENT = 16  # lengths in half precision: CPUs need up to 5 times as long for products with unaligned rows
MAX_ROWS = 512  # queries of a tile: more would mask up to half of their keys, fewer cost more calls
LSE_PARTS = 3  # numbers in half precision whose sum is a log-sum-exp


# A compiler would follow every number of the plan, and compile again for every batch.
@torch.compiler.disable
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """Compute softmax(scale Q K^T + mask) V, differentiable once.

    Args:
        q: [T, H, D]. k, v: [T, G, D], G divides H. Any floating dtype.
        layout: The mask, on the same device.
        scale: Factor of the scores; default D ** -0.5.

    Returns:
        [T, H, D]; zero at padding.
    """
    half_on_cpu = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    plan = layout.plan(_plan_for_half if half_on_cpu else _plan)
    if not plan.batches:
        # Nothing is visible. The empty sum keeps all three inputs in the graph.
        return torch.cat([q[:0] + k[:0].sum() + v[:0].sum(), torch.zeros_like(q)])
    q_rows, k_rows, v_rows = (_Gather.apply(x, plan) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1:  # the fused kernels do not take grouped heads together with a mask
        k_rows, v_rows = (x.repeat_interleave(group, dim=1) for x in (k_rows, v_rows))
    if half_on_cpu:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = _HalfPrecisionAttention.apply(q_rows, k_rows, v_rows, plan.batches, scale)
    else:
        out = _join(list(_products(plan, q_rows, k_rows, v_rows, scale)))
    return _Scatter.apply(out, plan, len(q))


def _products(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Iterator[Tensor]:
    """Yield the output [rows, H, D] of each batch."""
    # The gradient of one split is one concatenation. The gradient of each slice would be a pass over all rows.
    sizes = [B * L for B, L in (batch.shape for batch in plan.batches)]
    for batch, *rows in zip(plan.batches, *(x.split(sizes) for x in (q, k, v)), strict=True):
        q_BHLD, k_BHLD, v_BHLD = (x.unflatten(0, batch.shape).transpose(1, 2) for x in rows)
        outs = []
        lengths = [tile.rows.stop - tile.rows.start for tile in batch.tiles]
        for tile, queries in zip(batch.tiles, q_BHLD.split(lengths, dim=2), strict=True):
            keys, values = k_BHLD[:, :, : tile.keys], v_BHLD[:, :, : tile.keys]
            o_BHLD = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=tile.visible, is_causal=tile.visible is None, scale=scale
            )
            outs.append(o_BHLD.transpose(1, 2))
        yield _join(outs, dim=1).flatten(0, 1)


def _join(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Concatenate tensors without copying a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass(frozen=True, eq=False)
class _Tile:
    """Queries `rows` of each of the B documents of a batch, and the keys [0, keys) that they see."""

    rows: slice
    keys: int
    visible: Tensor | None  # bool [B, 1, rows, keys]; None for causal attention over a text
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def hidden(self) -> Tensor:
        """The complement of `visible`, of a tile with a mask."""
        assert self.visible is not None
        return ~self.visible

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return what to add to the scores, 0 or -inf; None for causal attention."""
        if self.visible is None:
            return None
        if dtype not in self._biases:
            self._biases[dtype] = torch.zeros_like(self.visible, dtype=dtype).masked_fill_(self.hidden, -math.inf)
        return self._biases[dtype]


@dataclass(frozen=True)
class _Batch:
    """B documents padded to one length L, stored as consecutive rows from `start`."""

    start: int
    shape: tuple[int, int]  # B, L
    tiles: tuple[_Tile, ...]  # cover all L queries; the last tile sees every key

    def of(self, rows: Tensor) -> Tensor:
        """Return the part of all rows [R, H, D] that belongs to this batch, a view [B, H, L, D]."""
        B, L = self.shape
        return rows[self.start : self.start + B * L].unflatten(0, (B, L)).transpose(1, 2)


@dataclass(frozen=True)
class _Plan:
    """The batches of a layout: one for each long document, and one for each class of short documents.

    A document shorter than its batch is padded with its last position.
    """

    batches: list[_Batch]
    positions: int  # of all documents; the rest of the sequence is padding
    gather: Tensor  # int64 [R], the position of each row
    scatter: Tensor  # int64 [positions], the row of each position


def _plan(layout: AttentionLayout, alignment: int = 1) -> _Plan:
    """Plan the attention of `layout` on its device; padded lengths are multiples of `alignment`."""
    offsets = layout.document_offsets.numpy()
    key_end = layout.key_ends()
    lengths = np.diff(offsets)
    has_image = np.zeros(len(lengths), dtype=bool)
    has_image[np.searchsorted(offsets, layout.image_spans[:, 0].numpy(), side="right") - 1] = True
    batches: list[_Batch] = []
    gather, scatter, start = [np.zeros(0, dtype=np.int64)], np.zeros(int(offsets[-1]), dtype=np.int64), 0
    for chosen in _documents_by_batch(lengths, max(alignment, 8)):
        own, L = lengths[chosen, None], _round_up(int(lengths[chosen].max()), alignment)
        positions = offsets[chosen, None] + np.minimum(np.arange(L), own - 1)  # [B, L]
        # Keys of the padding are columns beyond the document's length, which none of its rows sees.
        ends = key_end[positions] - offsets[chosen, None]
        causal = L > SHORT and not has_image[chosen[0]]
        tiles = (_Tile(slice(0, L), L, None),) if causal else _tiles(ends, alignment, layout.device)
        batches.append(_Batch(start, positions.shape, tiles))
        is_own = np.arange(L) < own
        scatter[positions[is_own]] = start + np.flatnonzero(is_own)
        gather.append(positions.reshape(-1))
        start += positions.size
    rows, scattered = (torch.from_numpy(x).to(layout.device) for x in (np.concatenate(gather), scatter))
    return _Plan(batches, int(offsets[-1]), rows, scattered)


_plan_for_half = partial(_plan, alignment=HALF_ALIGNMENT)


def _documents_by_batch(lengths: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Yield the documents of each batch: one long document, or all short documents of a class.

    Lengths of a class differ by less than `step`, or by less than a quarter.
    """
    longest = list(accumulate(range(SHORT // step), lambda n, _: n + step * max(1, n // 4 // step), initial=step))
    classes = np.searchsorted(longest, lengths)
    is_long = lengths > SHORT
    classes[is_long] = len(longest) + np.arange(is_long.sum())
    order = np.argsort(classes, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(classes[order])) + 1) if len(order) else ()


def _tiles(key_end: np.ndarray, alignment: int, device: torch.device) -> tuple[_Tile, ...]:
    """Cut B documents of one length L into tiles; each row sees the keys [0, key_end), key_end [B, L]."""
    length = key_end.shape[1]
    tiles = []
    for start in range(0, length, MAX_ROWS):
        ends = key_end[:, start : start + MAX_ROWS]
        keys = _round_up(int(ends.max()), alignment)
        visible = torch.arange(keys, device=device) < torch.from_numpy(ends).to(device)[:, None, :, None]
        tiles.append(_Tile(slice(start, start + ends.shape[1]), keys, visible))
    return tuple(tiles)


def _round_up(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


class _Gather(torch.autograd.Function):
    """The copy of positions [T, ..] to rows [R, ..].

    No other row sees a padding row, and its output is dropped, so its gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan) -> Tensor:
        ctx.plan, ctx.length = plan, len(x)
        return _select(x, plan.gather, len(plan.gather))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return _select(dx, ctx.plan.scatter, ctx.length), None


class _Scatter(torch.autograd.Function):
    """The copy of rows [R, ..] to positions [T, ..], with zeros at padding.

    No row is used twice, so the gradient is copied. The gradient of index_select would be a sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, length: int) -> Tensor:
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
    """Return the rows x[index], followed by zeros up to `length` rows."""
    out = x.new_empty(length, *x.shape[1:])
    torch.index_select(x.flatten(1), 0, index, out=out[: len(index)].flatten(1))
    out[len(index) :] = 0.0
    return out


class _HalfPrecisionAttention(torch.autograd.Function):
    """Attention of all batches: q, k and v [R, H, D] -> [R, H, D].

    One function computes all batches because calls and copies take half of the time of short documents on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: Sequence[_Batch], scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = []
        for batch in batches:
            q_BHLD, k_BHLD, v_BHLD, out_BHLD = (batch.of(x) for x in (q, k, v, out))
            for tile in batch.tiles:
                o, tile_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q_BHLD[:, :, tile.rows],
                    k_BHLD[:, :, : tile.keys],
                    v_BHLD[:, :, : tile.keys],
                    is_causal=tile.visible is None,
                    attn_mask=tile.bias(q.dtype),
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
        # Only a power of two scales q without rounding it. The matrix product multiplies by the rest, 0.5 to 1.
        scale, exponent = math.frexp(ctx.scale)
        q = q * 2.0**exponent
        negative_lse = iter(_split_lse(torch.cat(lse) / scale, q.dtype).split([len(x) for x in lse]))
        gradients = torch.empty(3, *q.shape, dtype=q.dtype)
        for batch in ctx.batches:
            # One copy puts the rows of each head together, as matrix products need them.
            by_heads = torch.stack([batch.of(x) for x in (q, k, v, do)])
            B, H = by_heads.shape[1:3]
            pieces = [piece for tile in batch.tiles for piece in _pieces(tile, next(negative_lse), B * H)]
            for x, gradient in zip(gradients, _batch_gradients(pieces, *by_heads.flatten(1, 2), scale), strict=True):
                batch.of(x).copy_(gradient.unflatten(0, (B, H)))
        gradients[0] *= ctx.scale
        gradients[1] *= scale
        return *gradients, None, None


_Piece = tuple[slice, int, Tensor, Tensor]


def _pieces(tile: _Tile, negative_lse: Tensor, products: int) -> Iterator[_Piece]:
    """Yield a tile with a mask as one piece, and a causal tile as several. `products` is B * H.

    A piece is (rows, keys, -L / scale in parts [B * H, rows, LSE_PARTS], hidden): rows that see some of the keys
    [0, keys), and bool [B, 1, rows, keys], or [rows, keys] for all documents.
    """
    length = tile.rows.stop - tile.rows.start
    negative_lse = negative_lse.view(products, length, LSE_PARTS)
    if tile.visible is not None:
        yield tile.rows, tile.keys, negative_lse, tile.hidden
        return
    for start in range(0, length, MAX_ROWS):
        end = min(start + MAX_ROWS, length)
        hidden = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        yield slice(start, end), end, negative_lse[:, start:end], hidden


def _batch_gradients(
    pieces: Sequence[_Piece], q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return dQ and dK, both divided by the scale of Q K^T, and dV, all [B * H, L, D]."""
    if len(pieces) == 1 and pieces[0][1] == k.shape[1]:
        return _piece_gradients(q, k, v, do, scale, *pieces[0][2:])
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros(2, *k.shape)  # fp32, because many pieces add to them
    for rows, keys, negative_lse, hidden in pieces:
        inputs = q[:, rows], k[:, :keys], v[:, :keys], do[:, rows]
        dq[:, rows], dk_piece, dv_piece = _piece_gradients(*inputs, scale, negative_lse, hidden)
        dk[:, :keys] += dk_piece
        dv[:, :keys] += dv_piece
    return dq, dk, dv


def _piece_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float, negative_lse: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # The matrix product itself subtracts L / scale and multiplies by the scale, before anything is rounded.
    q_and_lse = torch.cat([q, negative_lse], dim=-1)
    k_and_ones = torch.cat([k, k.new_ones(1, 1, 1).expand(*k.shape[:2], LSE_PARTS)], dim=-1)
    p = torch.baddbmm(q.new_zeros(()), q_and_lse, k_and_ones.mT, beta=0, alpha=scale).exp_()
    documents = len(hidden) if hidden.ndim == 4 else 1
    p.view(documents, -1, *p.shape[1:]).masked_fill_(hidden, 0.0)
    ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
    return torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, do)


def _split_lse(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -lse, fp32 [N], as parts [N, LSE_PARTS] whose sum has all of its bits, up to 196,512 in fp16."""
    limit = torch.finfo(dtype).max
    parts, rest = [], -lse
    for _ in range(LSE_PARTS):
        parts.append(rest.clamp(-limit, limit).to(dtype))
        rest = rest - parts[-1]
    return torch.stack(parts, dim=-1)
