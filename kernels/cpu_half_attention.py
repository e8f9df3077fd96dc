"""Attention in half precision on CPUs: PyTorch's forward, and a backward in matrix products of half precision.

PyTorch's own backward takes several times as long as in fp32 (torch 2.13). With B documents of one length in a batch,

    P = exp(scale Q K^T - lse),   dV = P^T dO,   dS = softmax's gradient of dO V^T at P,   dQ, dK = scale dS K, dS^T Q

What it keeps is linear in the length of a document; a backward holds P and dS of `ROWS` queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transfusion_fast.kernels.torch_attention import Batch, Tile

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
