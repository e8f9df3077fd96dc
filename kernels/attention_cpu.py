"""Hybrid attention in plain PyTorch: the torch backend on any device, and the fastest way to train on a CPU.

    S = scale Q K^T,   P = softmax(S + mask),   O = P V

A long document is computed alone and without a copy. Text without images uses causal attention, which needs no mask and
skips what it hides. A document with images is cut into tiles of at most `MAX_ROWS` queries, and each tile reads the
keys from the start of the document to the last key that one of its rows sees. Short documents of similar lengths are
padded to a common length and computed as one batch where a call for each would cost more than its work. The masks are
made once for all layers, on the device: one byte a pair, and three more in half precision on a CPU.

A noised copy is computed with a copy of the keys and values that it sees, its own and behind them those of its context,
so that its products visit no other key. Such copies are batched like documents.

Every product is one `scaled_dot_product_attention`. For short documents in half precision on a CPU the backward pass is
our own, which is faster than PyTorch's: it saves Q, K, V and the log-sum-exp L, and computes (FlashAttention, arXiv
2205.14135)

    P = exp(scale Q K^T - L),   dV = P^T dO,   dP = dO V^T,   dS = P (dP - rowsum(dP P)),
    dQ = scale dS K,   dK = scale dS^T Q
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfusion_fast.kernels import attention_cpu_plan
from transfusion_fast.kernels.attention_cpu_plan import Rows, Tile
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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    on_cpu, half = q.device.type == "cpu", q.dtype in (torch.bfloat16, torch.float16)
    on_cpu_plan = attention_cpu_plan.plan_for_half if half else attention_cpu_plan.plan_on_cpu
    batches = layout.plan(on_cpu_plan if on_cpu else attention_cpu_plan.plan_on_gpu)
    if not batches:
        # Nothing is visible. The empty sum keeps all three inputs in the graph.
        return torch.cat([q[:0] + k[:0].sum() + v[:0].sum(), torch.zeros_like(q)])
    queries, keys = [batch.queries for batch in batches], [batch.keys for batch in batches]
    group, outs = q.shape[1] // k.shape[1], []
    parts = (_Gather.apply(x, rows) for x, rows in ((q, queries), (k, keys), (v, keys)))
    for batch, q_BHLD, k_BHLD, v_BHLD in zip(batches, *parts, strict=True):
        if group > 1:  # the fused kernels do not take grouped heads together with a mask
            k_BHLD, v_BHLD = (x.repeat_interleave(group, dim=1) for x in (k_BHLD, v_BHLD))
        if on_cpu and half and len(batch.tiles) == 1 and batch.keys.shape[1] <= attention_cpu_plan.SHORT:
            outs.append(_HalfPrecisionAttention.apply(q_BHLD, k_BHLD, v_BHLD, batch.tiles[0], scale))
        else:
            outs.append(_product(batch.tiles, q_BHLD, k_BHLD, v_BHLD, scale))
    return _Scatter.apply(queries, len(q), *outs)


def _product(tiles: Sequence[Tile], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the output of a batch; all [B, H, L, D]."""
    outs = []
    for tile, queries in zip(tiles, q.split([tile.rows for tile in tiles], dim=2), strict=True):
        inputs = queries, k[:, :, : tile.keys], v[:, :, : tile.keys]
        causal = tile.visible is None
        outs.append(F.scaled_dot_product_attention(*inputs, attn_mask=tile.visible, is_causal=causal, scale=scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


class _Gather(torch.autograd.Function):
    """The rows of each batch [B, H, L, D] from all positions [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batches: Sequence[Rows]) -> tuple[Tensor, ...]:
        ctx.batches, ctx.length = batches, len(x)
        return tuple(rows.gather(x) for rows in batches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(ctx.batches, gradients, ctx.length), None


class _Scatter(torch.autograd.Function):
    """The positions [T, H, D] from the rows of each batch [B, H, L, D], with zeros at padding."""

    @staticmethod
    def forward(ctx: Any, batches: Sequence[Rows], length: int, *parts: Tensor) -> Tensor:
        ctx.batches = batches
        return _scatter(batches, parts, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(rows.gather(gradient) for rows in ctx.batches)


def _scatter(batches: Sequence[Rows], parts: Sequence[Tensor], length: int) -> Tensor:
    """Return what each position [T, H, D] has in its own row, plus the repeated rows, which are added in fp32."""
    (_, H, _, D), dtype = parts[0].shape, parts[0].dtype
    repeated = [(batch, part) for batch, part in zip(batches, parts, strict=True) if batch.repeated]
    wide = torch.promote_types(dtype, torch.float32) if repeated else dtype
    out = torch.empty(length, H, D, dtype=wide, device=parts[0].device)
    for batch, part in zip(batches, parts, strict=True):
        batch.scatter(part, out)
    out[sum(len(batch.positions) for batch in batches) :] = 0.0
    for batch, part in repeated:
        rows_of_part = part.transpose(1, 2).flatten(0, 1)
        for rows, positions in batch.repeated:
            out[positions] += rows_of_part[rows]
    return out.to(dtype)


class _HalfPrecisionAttention(torch.autograd.Function):
    """Attention of a batch of one tile, q, k and v [B, H, L, D] -> [B, H, L, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=tile.visible is None, attn_mask=tile.bias(q.dtype), scale=scale
        )
        ctx.save_for_backward(q, k, v, lse)
        ctx.tile, ctx.scale = tile, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        heads = q.shape[:2]
        # Only a power of two scales q without rounding it. The matrix product multiplies by the rest, 0.5 to 1.
        scale, exponent = math.frexp(ctx.scale)
        # Matrix products need the rows of each head together.
        q, k, v, do = (x.contiguous().flatten(0, 1) for x in (q * 2.0**exponent, k, v, do))
        # The matrix product itself subtracts L / scale and multiplies by the scale, before anything is rounded.
        q_and_lse = torch.cat([q, _split_lse(lse.flatten(0, 1) / scale, q.dtype)], dim=-1)
        k_and_ones = torch.cat([k, k.new_ones(1, 1, 1).expand(*k.shape[:2], LSE_PARTS)], dim=-1)
        p = torch.baddbmm(q.new_zeros(()), q_and_lse, k_and_ones.mT, beta=0, alpha=scale).exp_()
        p.unflatten(0, heads).masked_fill_(ctx.tile.hidden, 0.0)
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
        dq, dk = torch.bmm(ds, k).mul_(ctx.scale), torch.bmm(ds.mT, q).mul_(scale)
        return *(x.unflatten(0, heads) for x in (dq, dk, torch.bmm(p.mT, do))), None, None


def _split_lse(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -lse, fp32 [..], as parts [.., LSE_PARTS] whose sum has all of its bits, up to 196,512 in fp16."""
    limit = torch.finfo(dtype).max
    parts, rest = [], -lse
    for _ in range(LSE_PARTS):
        parts.append(rest.clamp(-limit, limit).to(dtype))
        rest = rest - parts[-1]
    return torch.stack(parts, dim=-1)
