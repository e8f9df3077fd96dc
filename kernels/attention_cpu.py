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
from transfusion_fast.kernels.attention_cpu_plan import (
    Batch,
    Rows,
    Tile,
    is_half,
    kept_plan,
    spans_of_intervals,
    spans_of_layout,
)
from transfusion_fast.kernels.layout import AttentionLayout

LSE_PARTS = 3  # numbers in half precision whose sum is a log-sum-exp


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """Compute softmax(scale Q K^T + mask) V, differentiable once.

    Args:
        q: [T, H, D]. k, v: [T, G, D], G divides H. Any floating dtype.
        layout: The mask, on the same device.
        scale: Factor of the scores; default D ** -0.5.

    Returns:
        [T, H, D]; zero at padding.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.device.type == "cpu":
        return _forward(q, k, v, layout.key_start, layout.key_end, layout.own_start, layout.own_end, scale)[0]
    return _attention_on_gpu(q, k, v, layout, scale)


# The op finds the plan from the intervals, whose shapes depend on T alone: a compiler would follow every number of a
# plan, and compile for every batch.
@torch.library.custom_op("transfusion_fast::tiled_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor,
    key_start: Tensor, key_end: Tensor, own_start: Tensor | None, own_end: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o [T, H, D] and the log-sum-exp of the scores [T, H, 1], fp32, or fp64 for such inputs."""
    batches = kept_plan(spans_of_intervals(key_start, key_end, own_start, own_end), q)
    outs, lses = [], []
    for batch in batches:
        q_BHLD, k_BHLD, v_BHLD = _inputs(batch, q, k, v)
        tiles = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries, k_BHLD[:, :, : tile.keys], v_BHLD[:, :, : tile.keys],
                is_causal=tile.visible is None, attn_mask=tile.bias(q.dtype), scale=scale,
            )
            for tile, queries in zip(batch.tiles, batch.split(q_BHLD), strict=True)
        ]  # fmt: skip
        outs.append(_join([o for o, _ in tiles]))
        lses.append(_join([lse for _, lse in tiles])[..., None])
    queries, wide = [batch.queries for batch in batches], torch.promote_types(q.dtype, torch.float32)
    o, lse = q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1, dtype=wide)
    return _scatter(queries, outs, o), _scatter(queries, lses, lse)


@torch.library.custom_op("transfusion_fast::tiled_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    key_start: Tensor, key_end: Tensor, own_start: Tensor | None, own_end: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk and dv, contiguous."""
    batches = kept_plan(spans_of_intervals(key_start, key_end, own_start, own_end), q)
    found: tuple[list[Tensor], ...] = ([], [], [])
    for batch in batches:
        of_queries = (batch.queries.gather(x) for x in (do, o, lse))
        dq, *dkv = _batch_gradients(batch, scale, *_inputs(batch, q, k, v), *of_queries)
        grouped = (x.unflatten(1, (k.shape[1], -1)).sum(2) if q.shape[1] > k.shape[1] else x for x in dkv)
        for gradients, gradient in zip(found, (dq, *grouped), strict=True):
            gradients.append(gradient)
    queries, keys = [batch.queries for batch in batches], [batch.keys for batch in batches]
    outs = (x.new_empty(x.shape) for x in (q, k, v))
    dq, dk, dv = (_scatter(*args) for args in zip((queries, keys, keys), found, outs, strict=True))
    return dq, dk, dv


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1, dtype=torch.promote_types(q.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _differentiate(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(do, *ctx.saved_tensors, ctx.scale), None, None, None, None, None


_forward.register_fake(_fake)
_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_fake(lambda _, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]))


def _inputs(batch: Batch, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of a batch, all [B, H, L, D]: the fused kernels take no grouped heads together with a mask."""
    group, rows = q.shape[1] // k.shape[1], (batch.keys.gather(k), batch.keys.gather(v))
    k_BHLD, v_BHLD = rows if group == 1 else (x.repeat_interleave(group, dim=1) for x in rows)
    return batch.queries.gather(q), k_BHLD, v_BHLD


def _batch_gradients(
    batch: Batch, scale: float, q: Tensor, k: Tensor, v: Tensor, do: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV, all [B, H, L, D]."""
    if is_half(q) and len(batch.tiles) == 1 and batch.keys.shape[1] <= attention_cpu_plan.SHORT:
        return _short_gradients(batch.tiles[0], q, k, v, do, lse[..., 0], scale)
    found = []
    for tile, *rows in zip(batch.tiles, *(batch.split(x) for x in (do, q, o, lse)), strict=True):
        do_tile, queries, o_tile, own_lse = rows
        found.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do_tile, queries, k[:, :, : tile.keys], v[:, :, : tile.keys], o_tile, own_lse[..., 0].contiguous(),
                0.0, tile.visible is None, attn_mask=tile.bias(q.dtype), scale=scale,
            )
        )  # fmt: skip
    if len(found) == 1:
        return found[0]
    # Keys that several tiles see: their gradients are added in fp32.
    dk, dv = torch.zeros(2, *k.shape, dtype=torch.promote_types(k.dtype, torch.float32))
    for _, dk_tile, dv_tile in found:
        dk[:, :, : dk_tile.shape[2]] += dk_tile
        dv[:, :, : dv_tile.shape[2]] += dv_tile
    return _join([dq for dq, _, _ in found]), dk, dv


def _short_gradients(
    tile: Tile, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, given_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV by the formulas above, in half precision."""
    heads = q.shape[:2]
    # Only a power of two scales q without rounding it. The matrix product multiplies by the rest, 0.5 to 1.
    scale, exponent = math.frexp(given_scale)
    # Matrix products need the rows of each head together.
    q, k, v, do = (x.contiguous().flatten(0, 1) for x in (q * 2.0**exponent, k, v, do))
    # The matrix product itself subtracts L / scale and multiplies by the scale, before anything is rounded.
    q_and_lse = torch.cat([q, _split_lse(lse.flatten(0, 1) / scale, q.dtype)], dim=-1)
    k_and_ones = torch.cat([k, k.new_ones(1, 1, 1).expand(*k.shape[:2], LSE_PARTS)], dim=-1)
    p = torch.baddbmm(q.new_zeros(()), q_and_lse, k_and_ones.mT, beta=0, alpha=scale).exp_()
    p.unflatten(0, heads).masked_fill_(tile.hidden, 0.0)
    ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
    found = torch.bmm(ds, k).mul_(given_scale), torch.bmm(ds.mT, q).mul_(scale), torch.bmm(p.mT, do)
    dq, dk, dv = (x.unflatten(0, heads) for x in found)
    return dq, dk, dv


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of tiles [B, H, L, ..]; a single tile is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


@torch.compiler.disable
def _attention_on_gpu(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Compute the same with the gradients of PyTorch, which chooses a kernel for the GPU."""
    batches = kept_plan(spans_of_layout(layout), q)
    if not batches:
        # Nothing is visible. The empty sum keeps all three inputs in the graph.
        return torch.cat([q[:0] + k[:0].sum() + v[:0].sum(), torch.zeros_like(q)])
    queries, keys = [batch.queries for batch in batches], [batch.keys for batch in batches]
    group, outs = q.shape[1] // k.shape[1], []
    parts = (_Gather.apply(x, rows) for x, rows in ((q, queries), (k, keys), (v, keys)))
    for batch, q_BHLD, k_BHLD, v_BHLD in zip(batches, *parts, strict=True):
        if group > 1:
            k_BHLD, v_BHLD = (x.repeat_interleave(group, dim=1) for x in (k_BHLD, v_BHLD))
        tiles = [
            F.scaled_dot_product_attention(
                rows, k_BHLD[:, :, : tile.keys], v_BHLD[:, :, : tile.keys],
                attn_mask=tile.visible, is_causal=tile.visible is None, scale=scale,
            )
            for tile, rows in zip(batch.tiles, batch.split(q_BHLD), strict=True)
        ]  # fmt: skip
        outs.append(_join(tiles))
    return _Scatter.apply(queries, len(q), *outs)


class _Gather(torch.autograd.Function):
    """The rows of each batch [B, H, L, D] from all positions [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batches: Sequence[Rows]) -> tuple[Tensor, ...]:
        ctx.batches, ctx.length = batches, len(x)
        return tuple(rows.gather(x) for rows in batches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(ctx.batches, gradients, _like(gradients[0], ctx.length)), None


class _Scatter(torch.autograd.Function):
    """The positions [T, H, D] from the rows of each batch [B, H, L, D], with zeros at padding."""

    @staticmethod
    def forward(ctx: Any, batches: Sequence[Rows], length: int, *parts: Tensor) -> Tensor:
        ctx.batches = batches
        return _scatter(batches, parts, _like(parts[0], length))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(rows.gather(gradient) for rows in ctx.batches)


def _like(x: Tensor, length: int) -> Tensor:
    """Return an empty [T, H, D] for x [B, H, L, D]."""
    return x.new_empty(length, x.shape[1], x.shape[3])


def _scatter(batches: Sequence[Rows], parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """Return in out [T, H, D] what each position has in its own row, plus the repeated rows, added in fp32."""
    repeated = [(batch, part) for batch, part in zip(batches, parts, strict=True) if batch.repeated]
    total = out.to(torch.promote_types(out.dtype, torch.float32)) if repeated else out
    for batch, part in zip(batches, parts, strict=True):
        batch.scatter(part, total)
    total[sum(len(batch.positions) for batch in batches) :] = 0.0
    for batch, part in repeated:
        rows_of_part = part.transpose(1, 2).flatten(0, 1)
        for rows, positions in batch.repeated:
            total[positions] += rows_of_part[rows]
    return total.to(out.dtype)


def _split_lse(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -lse, fp32 [..], as parts [.., LSE_PARTS] whose sum has all of its bits, up to 196,512 in fp16."""
    limit = torch.finfo(dtype).max
    parts, rest = [], -lse
    for _ in range(LSE_PARTS):
        parts.append(rest.clamp(-limit, limit).to(dtype))
        rest = rest - parts[-1]
    return torch.stack(parts, dim=-1)
