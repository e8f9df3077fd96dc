"""Hybrid attention in plain PyTorch, made for speed: the torch backend, and the one to train with on a CPU.

Documents are cut into tiles, and tiles of about one size are gathered into a batch, padded to a common shape, and
computed together, in a few calls. A document of text alone is one tile: causal attention needs no mask and skips what
it hides. A document with images is cut into tiles of at most `MAX_ROWS` queries; a tile needs only the keys from its
document's start to the furthest key that one of its rows sees. Work and masks are the area of the tiles: a pack of many
short documents costs what the documents cost. The masks, a byte a pair, are made once for all layers, on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout

MAX_ROWS = 512  # longer tiles would mask away up to half of their keys; shorter ones cost a call each
FEW_KEYS = 64  # up to here plain matmuls beat the flash kernel, whose backward is made for long rows, and save little


@dataclass(frozen=True)
class TileBatch:
    """B tiles of one padded shape: Q rows, K keys. Rows and keys beyond a tile's own repeat a valid position."""

    shape: tuple[int, int, int]  # B, Q, K
    visible: Tensor | None  # bool [B, 1, Q, K]; None where Q = K and attention is causal


@dataclass(frozen=True)
class TilePlan:
    """All batches of a layout, and the positions of their rows and keys, one batch behind the other."""

    batches: tuple[TileBatch, ...]
    queries: Tensor  # int64 [sum of B * Q], position of every row
    keys: Tensor  # int64 [sum of B * K], position of every key
    rows: Tensor  # int64 [positions in documents]: for each of them, its row among all


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """softmax(scale * Q K^T + mask) V over the tiles of `layout`. q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
    plan = layout.plan(plan_tiles)
    # One gather for all batches, since the gradient of each takes a pass over all T positions.
    q_rows = _rows(q, plan.queries).split([B * Q for B, Q, _ in (batch.shape for batch in plan.batches)])
    k_rows, v_rows = (
        _rows(x, plan.keys).split([B * K for B, _, K in (batch.shape for batch in plan.batches)]) for x in (k, v)
    )
    heads = q.shape[1], k.shape[1]
    outs = [
        _attend(batch, queries, keys, values, heads, scale)
        for batch, queries, keys, values in zip(plan.batches, q_rows, k_rows, v_rows, strict=True)
    ]
    # An empty piece keeps the gradient's path to all three where there is no document.
    out = torch.cat([q[:0].flatten(1) + k[:0].sum() + v[:0].sum(), *outs])
    padding = q.new_zeros(len(q) - len(plan.rows), out.shape[1])
    return torch.cat([_rows(out, plan.rows), padding]).view(q.shape)


def _attend(
    batch: TileBatch, q_rows: Tensor, k_rows: Tensor, v_rows: Tensor, heads: tuple[int, int], scale: float | None
) -> Tensor:
    """Attention of one batch: q_rows [B * Q, H * D], k_rows and v_rows [B * K, G * D] -> [B * Q, H * D]."""
    B, Q, K = batch.shape
    H, G = heads
    q_BHQD, k_BGKD, v_BGKD = (
        x.view(B, n, number, -1).transpose(1, 2) for x, n, number in ((q_rows, Q, H), (k_rows, K, G), (v_rows, K, G))
    )
    # With a mask, the fused kernels take no grouped heads.
    k_BHKD, v_BHKD = (x.repeat_interleave(H // G, dim=1) for x in (k_BGKD, v_BGKD))
    if batch.visible is not None and K <= FEW_KEYS:
        out = _plain_attention(q_BHQD, k_BHKD, v_BHKD, batch.visible, scale)
    else:
        causal = batch.visible is None
        out = F.scaled_dot_product_attention(
            q_BHQD, k_BHKD, v_BHKD, attn_mask=batch.visible, is_causal=causal, scale=scale
        )
    return out.transpose(1, 2).reshape(B * Q, -1)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """q [B, H, Q, D], k and v [B, H, K, D], visible [B, 1, Q, K] -> [B, H, Q, D]."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v


def plan_tiles(layout: AttentionLayout) -> TilePlan:
    """Cuts the documents of `layout` into tiles and batches those of about one shape."""
    offsets = layout.document_offsets.numpy()
    key_end = layout.key_ends()
    lengths = np.diff(offsets)
    is_text = np.ones(len(lengths), dtype=bool)
    is_text[np.searchsorted(offsets, layout.image_spans[:, 0].numpy(), side="right") - 1] = False
    # Few keys are masked, whatever they are: see FEW_KEYS.
    causal_document = is_text & (lengths > FEW_KEYS)
    height = np.where(causal_document, lengths, MAX_ROWS)
    tiles_of = -(-lengths // np.maximum(height, 1))
    document = np.repeat(np.arange(len(lengths)), tiles_of)
    number = np.arange(len(document)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    row_start = offsets[document] + number * height[document]
    row_end = np.minimum(row_start + height[document], offsets[document + 1])
    key_start = offsets[document]
    furthest = np.maximum.reduceat(key_end[: offsets[-1]], row_start) if len(document) else row_start
    tiles = np.stack([row_start, row_end, key_start, furthest], axis=1)
    causal = causal_document[document]
    shapes = np.stack([_round_up(row_end - row_start), _round_up(furthest - key_start), causal], axis=1)
    unique, group = np.unique(shapes, axis=0, return_inverse=True)
    parts = [_Part(tiles[group == g], key_end, bool(shape[2])) for g, shape in enumerate(unique)]
    return _assemble(parts, int(offsets[-1]), layout.device)


class _Part:
    """One batch on the CPU, from `tiles` int64 [B, 4]: first and last query, first and last key, the last exclusive."""

    def __init__(self, tiles: np.ndarray, key_end: np.ndarray, causal: bool) -> None:
        row_start, row_end, key_start, furthest = tiles.T
        Q, K = int((row_end - row_start).max()), int((furthest - key_start).max())
        self.shape = (len(tiles), Q, K)
        self.queries = np.minimum(row_start[:, None] + np.arange(Q), row_end[:, None] - 1)
        self.keys = np.minimum(key_start[:, None] + np.arange(K), furthest[:, None] - 1)
        self.own_row = np.arange(Q) < (row_end - row_start)[:, None]
        # A repeated key lies at column >= furthest - key_start, and is hidden by comparing columns, not positions.
        self.column_end = None if causal else key_end[self.queries] - key_start[:, None]

    def on(self, device: torch.device) -> TileBatch:
        if self.column_end is None:
            return TileBatch(self.shape, None)
        column_end = torch.from_numpy(self.column_end).to(device)
        return TileBatch(self.shape, torch.arange(self.shape[2], device=device) < column_end[:, None, :, None])


def _assemble(parts: list[_Part], used: int, device: torch.device) -> TilePlan:
    queries, keys, own_row = (
        np.concatenate([getattr(part, name).reshape(-1) for part in parts]) if parts else np.zeros(0, dtype=np.int64)
        for name in ("queries", "keys", "own_row")
    )
    rows = np.empty(used, dtype=np.int64)
    own = np.flatnonzero(own_row)
    rows[queries[own]] = own
    index = (torch.from_numpy(array).to(device) for array in (queries, keys, rows))
    return TilePlan(tuple(part.on(device) for part in parts), *index)


def _round_up(n: np.ndarray) -> np.ndarray:
    """To multiples of 8 up to 128, of a sixteenth to an eighth of n beyond: few shapes, little padding."""
    step = 1 << np.maximum(np.log2(n).astype(np.int64) - 3, 3)
    return -(-n // step) * step


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]. As an embedding, whose gradient is summed row by row; index_select's scatters single numbers here."""
    return F.embedding(index, x.flatten(1))
