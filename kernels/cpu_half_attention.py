"""Attention in half precision on CPUs: PyTorch's forward, and a backward in matrix products of half precision.

PyTorch's own backward takes several times as long as in fp32 (torch 2.13). With B documents of one length in a batch,

    P = exp(scale Q K^T - lse),   dV = P^T dO,   dS = softmax's gradient of dO V^T at P,   dQ, dK = scale dS K, dS^T Q
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transfusion_fast.kernels.torch_attention import Batch, Mask


class HalfPrecisionAttention(torch.autograd.Function):
    """Attention of batches that lie one after another: q, k and v [R, H, D] -> [R, H, D].

    One function for all of them: on a CPU half of the time of short documents goes into calls and copies.
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
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *lse = ctx.saved_tensors
        q = q * ctx.scale
        columns = iter(_columns(torch.cat(lse), q.dtype).split([len(x) for x in lse]))
        gradients = torch.empty(3, *q.shape, dtype=q.dtype)
        for batch in ctx.batches:
            dq, dk, dv = (batch.of(x) for x in gradients)
            # One copy that puts each head's rows together, as matrix products need them.
            by_heads = torch.stack([batch.of(x) for x in (q, k, v, do)])
            queries, keys, values, upstream = by_heads.flatten(1, 2)
            tile_columns = [next(columns) for _ in batch.tiles]
            # Backwards: the last tile sees every key, and gives dK and dV what the others add to.
            for tile, own_columns in zip(reversed(batch.tiles), reversed(tile_columns), strict=True):
                rows, seen = tile.rows, slice(tile.keys)
                parts = _gradients(
                    queries[:, rows], keys[:, seen], values[:, seen], upstream[:, rows], own_columns, tile.mask
                )
                tile_dq, tile_dk, tile_dv = (x.view(*dq.shape[:2], *x.shape[1:]) for x in parts)
                dq[:, :, rows] = tile_dq
                if tile is batch.tiles[-1]:
                    dk[:], dv[:] = tile_dk, tile_dv
                else:
                    dk[:, :, seen] += tile_dk
                    dv[:, :, seen] += tile_dv
        gradients[0] *= ctx.scale
        return *gradients, None, None


def _columns(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """-lse fp32 [N] in two parts [N, 2] that together have its precision."""
    limit = torch.finfo(dtype).max
    high = (-lse).clamp_(-limit, limit).to(dtype)
    return torch.stack([high, (-lse - high).to(dtype)], dim=-1)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, columns: Tensor, mask: Mask | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ without its scale, dK and dV, of scaled queries q and do [B * H, L, D], k and v [B * H, S, D]."""
    # The product itself subtracts lse, before anything is rounded.
    q_columns = torch.cat([q, columns.view(*q.shape[:2], 2)], dim=-1)
    k_ones = torch.cat([k, k.new_ones(1, 1, 2).expand(*k.shape[:2], 2)], dim=-1)
    p = torch.bmm(q_columns, k_ones.mT).exp_()
    if mask is None:
        p.masked_fill_(torch.ones(p.shape[1:], dtype=torch.bool).triu(1), 0.0)
    else:
        p.view(len(mask.hidden), -1, *p.shape[1:]).masked_fill_(mask.hidden, 0.0)
    ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
    return torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, do)
