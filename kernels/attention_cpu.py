"""Hybrid attention in plain PyTorch: the torch backend on any device, and the fastest way to train on a CPU.

    S = scale Q K^T,   P = softmax(S + mask),   O = P V

A long document is computed alone. Text without images uses causal attention, which needs no mask and skips what it
hides. A document with images is cut into tiles of at most `MAX_ROWS` queries, and each tile reads the keys from the
start of the document to the last key that one of its rows sees. Short documents of similar lengths are padded to a
common length and computed as one batch, because one call for each would cost more than its work. The masks are made
once for all layers, on the device: one byte a pair, and three more in half precision on a CPU.

A noised copy is computed with a copy of the keys and values that it sees, its own and behind them those of its context,
so that its products visit no other key. Such copies are batched like documents.

Every product is one `scaled_dot_product_attention`. In half precision on a CPU the backward pass is our own, which is
faster than PyTorch's: it saves Q, K, V and the log-sum-exp L, and computes (FlashAttention, arXiv 2205.14135)

    P = exp(scale Q K^T - L),   dV = P^T dO,   dP = dO V^T,   dS = P (dP - rowsum(dP P)),
    dQ = scale dS K,   dK = scale dS^T Q
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_fast.kernels import attention_cpu_plan
from transfusion_fast.kernels.attention_cpu_plan import Batch, Index, Plan, Tile
from transfusion_fast.kernels.layout import AttentionLayout

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
    plan = layout.plan(attention_cpu_plan.plan_for_half if half_on_cpu else attention_cpu_plan.plan)
    if not plan.batches:
        # Nothing is visible. The empty sum keeps all three inputs in the graph.
        return torch.cat([q[:0] + k[:0].sum() + v[:0].sum(), torch.zeros_like(q)])
    q_rows = _Gather.apply(q, plan.queries)
    k_rows, v_rows = (_Gather.apply(x, plan.keys) for x in (k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1:  # the fused kernels do not take grouped heads together with a mask
        k_rows, v_rows = (x.repeat_interleave(group, dim=1) for x in (k_rows, v_rows))
    if half_on_cpu:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = _HalfPrecisionAttention.apply(q_rows, k_rows, v_rows, plan.batches, scale)
    else:
        out = _join(list(_products(plan, q_rows, k_rows, v_rows, scale)))
    return _Scatter.apply(out, plan.queries, len(q))


def _products(plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Iterator[Tensor]:
    """Yield the output [rows, H, D] of each batch."""
    # The gradient of one split is one concatenation. The gradient of each slice would be a pass over all rows.
    parts = [(batch.queries, batch.keys, batch.keys) for batch in plan.batches]
    sizes = ([math.prod(part.shape) for part in column] for column in zip(*parts, strict=True))
    for batch, part, *rows in zip(
        plan.batches, parts, *(x.split(n) for x, n in zip((q, k, v), sizes, strict=True)), strict=True
    ):
        q_BHLD, k_BHLD, v_BHLD = (x.unflatten(0, own.shape).transpose(1, 2) for x, own in zip(rows, part, strict=True))
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


class _Gather(torch.autograd.Function):
    """The copy of positions [T, ..] to rows [R, ..].

    No other row sees a padding row, and its output is dropped, so its gradient is zero. The gradients of repeated rows
    are added in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Index) -> Tensor:
        ctx.index, ctx.length = index, len(x)
        return _select(x, index.gather, len(index.gather))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        total = _select(dx, ctx.index.scatter, ctx.length)
        if ctx.index.repeated:
            total = total.to(torch.promote_types(dx.dtype, torch.float32))
        for rows, positions in ctx.index.repeated:
            total[positions] += dx[rows]
        return total.to(dx.dtype), None


class _Scatter(torch.autograd.Function):
    """The copy of rows [R, ..] to positions [T, ..], with zeros at padding.

    No row is used twice, so the gradient is copied. The gradient of index_select would be a sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Index, length: int) -> Tensor:
        ctx.index = index
        return _select(x, index.scatter, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        index = ctx.index
        rows = dx.new_zeros(len(index.gather), dx[0].numel())
        rows.index_copy_(0, index.scatter, dx[: len(index.scatter)].flatten(1))
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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: Sequence[Batch], scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = []
        for batch in batches:
            q_BHLD, out_BHLD = (batch.queries.of(x) for x in (q, out))
            k_BHLD, v_BHLD = (batch.keys.of(x) for x in (k, v))
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
        dq, (dk, dv) = torch.empty_like(q), torch.empty(2, *k.shape, dtype=k.dtype)
        for batch in ctx.batches:
            # One copy puts the rows of each head together, as matrix products need them.
            q_BHLD, do_BHLD = torch.stack([batch.queries.of(x) for x in (q, do)])
            k_BHLD, v_BHLD = torch.stack([batch.keys.of(x) for x in (k, v)])
            heads = q_BHLD.shape[:2]
            pieces = [piece for tile in batch.tiles for piece in _pieces(tile, next(negative_lse), math.prod(heads))]
            by_heads = [x.flatten(0, 1) for x in (q_BHLD, k_BHLD, v_BHLD, do_BHLD)]
            found = _batch_gradients(pieces, scale, *by_heads)
            targets = batch.queries.of(dq), batch.keys.of(dk), batch.keys.of(dv)
            for target, gradient in zip(targets, found, strict=True):
                target.copy_(gradient.unflatten(0, heads))
        dq *= ctx.scale
        dk *= scale
        return dq, dk, dv, None, None


_Piece = tuple[slice, int, Tensor, Tensor]


def _pieces(tile: Tile, negative_lse: Tensor, products: int) -> Iterator[_Piece]:
    """Yield a tile with a mask as one piece, and a causal tile as several. `products` is B * H.

    A piece is (rows, keys, -L / scale in parts [B * H, rows, LSE_PARTS], hidden): rows that see some of the keys
    [0, keys), and bool [B, 1, rows or 1, keys], or [rows, keys] for all documents.
    """
    length = tile.rows.stop - tile.rows.start
    negative_lse = negative_lse.view(products, length, LSE_PARTS)
    if tile.visible is not None:
        yield tile.rows, tile.keys, negative_lse, tile.hidden
        return
    for start in range(0, length, attention_cpu_plan.MAX_ROWS):
        end = min(start + attention_cpu_plan.MAX_ROWS, length)
        hidden = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        yield slice(start, end), end, negative_lse[:, start:end], hidden


def _batch_gradients(
    pieces: Sequence[_Piece], scale: float, q: Tensor, k: Tensor, v: Tensor, do: Tensor
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
