"""Hybrid attention in plain PyTorch, made for speed: the torch backend, and the one to train with on a CPU.

Documents are cut into tiles of at most `MAX_ROWS` queries; a tile needs only the keys from its document's start to the
furthest key that one of its rows sees. Tiles of about one size are gathered into a batch, padded to a common shape,
and computed together, in a few calls. Work and masks are the area of the tiles: a pack of many short documents costs
what the documents cost. The masks, a byte a pair, are made once for all layers, on the device.
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

    queries: Tensor  # int64 [B * Q], position of every row
    keys: Tensor  # int64 [B * K], position of every key
    visible: Tensor  # bool [B, 1, Q, K]
    rows: Tensor  # int64 [R], the rows among B * Q that stand for a query
    shape: tuple[int, int, int]  # B, Q, K


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """softmax(scale * Q K^T + mask) V over the tiles of `layout`. q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
    # An empty piece keeps the gradient's path to all three where there is no document.
    pieces, positions = [q[:0] + k[:0].sum() + v[:0].sum()], [layout.document_offsets[:0].to(q.device)]
    for batch in layout.plan(plan_tiles):
        B, Q, K = batch.shape
        q_BHQD, k_BGKD, v_BGKD = (
            _rows(x, index).view(B, n, x.shape[1], x.shape[2]).transpose(1, 2)
            for x, index, n in ((q, batch.queries, Q), (k, batch.keys, K), (v, batch.keys, K))
        )
        # With a mask, the fused kernels take no grouped heads.
        k_BHKD, v_BHKD = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k_BGKD, v_BGKD))
        if K <= FEW_KEYS:
            out = _plain_attention(q_BHQD, k_BHKD, v_BHKD, batch.visible, scale)
        else:
            out = F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=batch.visible, scale=scale)
        pieces.append(out.transpose(1, 2).reshape(B * Q, *q.shape[1:]).index_select(0, batch.rows))
        positions.append(batch.queries.index_select(0, batch.rows))
    return torch.zeros_like(q).index_copy(0, torch.cat(positions), torch.cat(pieces))


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """q [B, H, Q, D], k and v [B, H, K, D], visible [B, 1, Q, K] -> [B, H, Q, D]."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v


def plan_tiles(layout: AttentionLayout) -> list[TileBatch]:
    """Cuts the documents of `layout` into tiles and batches those of about one shape."""
    offsets = layout.document_offsets.numpy()
    key_end = layout.key_ends()
    lengths = np.diff(offsets)
    if not len(lengths):
        return []
    tiles_of = -(-lengths // MAX_ROWS)
    document = np.repeat(np.arange(len(lengths)), tiles_of)
    number = np.arange(len(document)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    row_start = offsets[document] + number * MAX_ROWS
    row_end = np.minimum(row_start + MAX_ROWS, offsets[document + 1])
    key_start = offsets[document]
    furthest = np.maximum.reduceat(key_end[: offsets[-1]], row_start)
    tiles = np.stack([row_start, row_end, key_start, furthest], axis=1)
    shapes = np.stack([_round_up(row_end - row_start), _round_up(furthest - key_start)], axis=1)
    unique, group = np.unique(shapes, axis=0, return_inverse=True)
    return [_batch(tiles[group == g], key_end, Q, K, layout.device) for g, (Q, K) in enumerate(unique.tolist())]


def _batch(tiles: np.ndarray, key_end: np.ndarray, Q: int, K: int, device: torch.device) -> TileBatch:
    """`tiles` int64 [B, 4]: first and last query, first and last key, the last ones exclusive."""
    row_start, row_end, key_start, furthest = tiles.T
    rows = np.minimum(row_start[:, None] + np.arange(Q), row_end[:, None] - 1)
    keys = np.minimum(key_start[:, None] + np.arange(K), furthest[:, None] - 1)
    own_row = np.arange(Q) < (row_end - row_start)[:, None]
    # A repeated key lies at column >= furthest - key_start, and is hidden by comparing columns, not positions.
    column_end = torch.from_numpy(key_end[rows] - key_start[:, None]).to(device)
    return TileBatch(
        queries=torch.from_numpy(rows.reshape(-1)).to(device),
        keys=torch.from_numpy(keys.reshape(-1)).to(device),
        visible=torch.arange(K, device=device) < column_end[:, None, :, None],
        rows=torch.from_numpy(np.flatnonzero(own_row)).to(device),
        shape=(len(rows), Q, K),
    )


def _round_up(n: np.ndarray) -> np.ndarray:
    """To multiples of 8 up to 64, of an eighth to a quarter of n beyond: few shapes, little padding."""
    step = 1 << np.maximum(np.log2(n).astype(np.int64) - 2, 3)
    return -(-n // step) * step


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]. As an embedding, whose gradient is summed row by row; index_select's scatters single numbers here."""
    return F.embedding(index, x.flatten(1))
