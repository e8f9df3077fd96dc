"""Hybrid attention in plain PyTorch, made for speed: the torch backend, and the one to train with on a CPU.

Long documents are computed one by one, where they lie: text alone by causal attention, which needs no mask and skips
what it hides; a document with images in tiles of at most `MAX_ROWS` queries, which need only the keys from the
document's start to the furthest key that one of their rows sees. Many short documents of about one length are gathered
into a batch, padded to a common shape, since a call for each would cost more than its work. The masks, a byte a pair,
are made once for all layers, on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout

SHORT = 64  # documents of up to so many positions share plain matmuls: the flash kernel is made for long rows
MANY = 4  # of about one length; a batch of fewer costs more than their calls
MAX_ROWS = 512  # longer tiles would mask away up to half of their keys; shorter ones cost a call each


@dataclass(frozen=True)
class Tile:
    """Queries [start, end) of a document and the keys [0, keys) that they see."""

    start: int
    end: int
    keys: int
    visible: Tensor | None  # bool [1, 1, end - start, keys]; None for the whole of a text, causal


@dataclass(frozen=True)
class ShortBatch:
    """B short documents of one padded length L. Positions beyond a document's own repeat its last one."""

    shape: tuple[int, int]  # B, L
    visible: Tensor  # bool [B, 1, L, L]


@dataclass(frozen=True)
class Plan:
    """The runs of positions that a layout falls into: long documents, stretches of short ones, padding."""

    run_lengths: list[int]
    documents: list[tuple[Tile, ...] | None]  # of each run; None for a stretch of short documents; padding has none
    batches: list[ShortBatch]
    gather: Tensor  # int64 [sum of B * L]: the place of each row of the batches among the positions of all stretches
    scatter: Tensor  # int64 [positions of all stretches]: for each of them, its row


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
    padding = q.new_zeros(plan.run_lengths[-1], *q.shape[1:])
    return torch.cat([*outs, padding])


def _long_document(tiles: tuple[Tile, ...], q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> list[Tensor]:
    """One document, q [L, H, D], k and v [L, G, D]; [rows, H, D] of each tile."""
    q_1HLD, k_1HLD, v_1HLD = _by_heads(q[None], k[None], v[None])
    if len(tiles) == 1:
        visible = tiles[0].visible
        out = F.scaled_dot_product_attention(
            q_1HLD, k_1HLD, v_1HLD, attn_mask=visible, is_causal=visible is None, scale=scale
        )
        return [out[0].transpose(0, 1)]
    outs = []
    for tile, rows in zip(tiles, q_1HLD.split([tile.end - tile.start for tile in tiles], dim=2), strict=True):
        keys, values = k_1HLD[:, :, : tile.keys], v_1HLD[:, :, : tile.keys]
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=tile.visible, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return outs


def _short_documents(
    plan: Plan, q_runs: list[Tensor], k_runs: list[Tensor], v_runs: list[Tensor], scale: float | None
) -> list[Tensor]:
    """The stretches of short documents, each [positions, H, D], by batches of documents of about one length."""
    if not q_runs:
        return []
    sizes = [B * L for B, L in (batch.shape for batch in plan.batches)]
    q_rows, k_rows, v_rows = (_rows(torch.cat(runs), plan.gather).split(sizes) for runs in (q_runs, k_runs, v_runs))
    outs = []
    for batch, *rows in zip(plan.batches, q_rows, k_rows, v_rows, strict=True):
        q_BHLD, k_BHLD, v_BHLD = _by_heads(*(x.unflatten(0, batch.shape) for x in rows))
        out = _plain_attention(q_BHLD, k_BHLD, v_BHLD, batch.visible, scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return list(_rows(torch.cat(outs), plan.scatter).split([len(run) for run in q_runs]))


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, heads, D] -> [B, H, L, D], keys and values repeated: with a mask, the fused kernels take no groups."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """q, k, v [B, H, L, D], visible [B, 1, L, L] -> [B, H, L, D]."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v


def make_plan(layout: AttentionLayout) -> Plan:
    """How to compute `layout`, on its device."""
    offsets = layout.document_offsets.numpy()
    key_end = layout.key_ends()
    lengths = np.diff(offsets)
    has_image = np.zeros(len(lengths), dtype=bool)
    has_image[np.searchsorted(offsets, layout.image_spans[:, 0].numpy(), side="right") - 1] = True
    run_lengths: list[int] = []
    documents: list[tuple[Tile, ...] | None] = []
    _, of_class, counts = np.unique(_classes(lengths), return_inverse=True, return_counts=True)
    is_short = (lengths <= SHORT) & (counts[of_class] >= MANY)
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
        tiles.append(Tile(start, start + len(ends), keys, visible[None, None]))
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
        batches.append(ShortBatch((len(chosen), L), visible))
        among_short = (first[chosen, None] + place).reshape(-1)
        is_own = (np.arange(L) < own).reshape(-1)
        scatter[among_short[is_own]] = rows_before + np.flatnonzero(is_own)
        gather.append(among_short)
        rows_before += len(among_short)
    return batches, torch.from_numpy(np.concatenate(gather)).to(device), torch.from_numpy(scatter).to(device)


def _classes(lengths: np.ndarray) -> np.ndarray:
    """Documents of one class share a batch: their lengths differ by less than 8."""
    return -(-lengths // 8)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]. As an embedding, whose gradient is summed row by row; index_select's scatters single numbers here."""
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])
