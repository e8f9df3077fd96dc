"""A cache of keys and values, so that a step of decoding runs its new positions alone.

Letters as in model/sequence.py, and S streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.model import ops
from transfusion_fast.model.sequence import ranges
from transfusion_fast.model.transfusion import Transfusion


class KeyValueCache:
    """Keys and values of every layer for S streams, each [S, capacity, G, D].

    The memory is 2 * depth * S * capacity * G * D numbers of the weights' type. The capacity is doubled where it does
    not suffice, so that all copies together move fewer numbers than the cache has at the end.

    lengths: number of positions of each stream that are in the cache; next_position: the position of its next token,
    which is smaller where an image takes fewer positions than it has patches.
    """

    def __init__(self, model: Transfusion, streams: int, capacity: int):
        transformer, weight = model.config.transformer, model.embedding.weight
        shape = (streams, capacity, transformer.num_kv_heads, transformer.head_dim)
        self.keys, self.values = (
            [torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(transformer.depth)]
            for _ in range(2)
        )
        self.lengths, self.next_position = [0] * streams, [0] * streams

    @property
    def capacity(self) -> int:
        """Positions of each stream that there is memory for."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def select(self, streams: Sequence[int]) -> KeyValueCache:
        """Return a cache whose streams are copies of the given ones, which may be repeated."""
        selected = copy(self)
        index = torch.tensor(streams, device=self.keys[0].device)
        selected.keys, selected.values = ([x.index_select(0, index) for x in own] for own in (self.keys, self.values))
        selected.lengths, selected.next_position = (
            [own[stream] for stream in streams] for own in (self.lengths, self.next_position)
        )
        return selected

    def reserve(self, length: int) -> None:
        """Make room for `length` positions of each stream."""
        capacity = self.capacity
        while capacity < length:
            capacity *= 2
        if capacity > self.capacity:
            used = max(self.lengths)
            for tensors in (self.keys, self.values):
                for layer, old in enumerate(tensors):
                    tensors[layer] = old.new_empty((len(old), capacity, *old.shape[2:]))
                    tensors[layer][:, :used] = old[:, :used]


@dataclass(frozen=True)
class Rows:
    """Neighbouring streams of a cache with equally many positions: rows [start, start + count * n) of a pass."""

    cache: KeyValueCache
    first: int
    count: int
    length: int
    start: int


def rows_of(parts: Sequence[tuple[KeyValueCache, Sequence[int]]], n: int) -> list[Rows]:
    """Return the rows of a pass over n positions of each of the streams (cache, numbers in ascending order).

    Attention takes neighbours of one length together, as views of the cache, so nothing is copied, masked or padded,
    and the result of a stream does not depend on the others.
    """
    rows, start = [], 0
    for cache, streams in parts:
        for _, group in groupby(enumerate(streams), key=lambda item: (item[1] - item[0], cache.lengths[item[1]])):
            own = [stream for _, stream in group]
            rows.append(Rows(cache, own[0], len(own), cache.lengths[own[0]], start))
            start += len(own) * n
    return rows


@dataclass(frozen=True)
class CachedAttention:
    """Attention of one layer in a pass over n new positions of each stream, in place of a layout.

    Each position sees all that its stream has in the cache and the n positions, or with `causal` those up to itself.
    The keys and values of the n positions are written behind those of the stream, where the next pass overwrites them
    unless the stream's length grows. Rows of the pass that belong to no stream are zero.

    There is one call for neighbouring streams of the same length, which any device and precision can run.
    """

    rows: Sequence[Rows]
    layer: int
    n: int
    causal: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output [T, H, D] for q [T, H, D] and k, v [T, G, D]."""
        out = torch.zeros_like(q)
        for rows in self.rows:
            part = slice(rows.start, rows.start + rows.count * self.n)
            out[part] = self._attend(rows, q[part], k[part], v[part])
        return out

    def _attend(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end, G = rows.length + self.n, k.shape[1]

        def seen(cached: Tensor, new: Tensor) -> Tensor:
            streams = cached[rows.first : rows.first + rows.count]
            streams[:, rows.length : end] = new.unflatten(0, (rows.count, self.n))
            return streams[:, :end].transpose(1, 2)

        keys, values = seen(rows.cache.keys[self.layer], k), seen(rows.cache.values[self.layer], v)
        # Query heads that share a key head become further queries of it.
        grouped = q.view(rows.count, self.n, G, -1, q.shape[2]).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask(rows, q))
        return out.unflatten(2, (-1, self.n)).permute(0, 3, 1, 2, 4).reshape(q.shape)

    def _mask(self, rows: Rows, q: Tensor) -> Tensor | None:
        if not self.causal or self.n == 1:
            return None
        end, shared = rows.length + self.n, q.shape[1] // rows.cache.keys[0].shape[2]
        mask = torch.ones(self.n, end, dtype=torch.bool, device=q.device).tril(rows.length)
        return mask.repeat(shared, 1)


@dataclass(frozen=True)
class Lengths:
    """Streams of a cache in a pass, for a kernel that takes a length for each: rows [start, start + S * n) of the pass.

    The cache is flattened over streams and positions. cache_rows: int64 [S * n], where the new positions are written;
    query_offsets, key_offsets: int32 [S + 1], where each stream begins; used: int32 [S], positions that it has with
    the new ones.
    """

    cache: KeyValueCache
    start: int
    cache_rows: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    used: Tensor
    longest: int


def lengths_of(parts: Sequence[tuple[KeyValueCache, Sequence[int]]], n: int) -> list[Lengths]:
    """Return the streams of a pass over n positions of each of the streams (cache, numbers in ascending order)."""
    found, start = [], 0
    for cache, streams in parts:
        first, lengths = (np.array(x) for x in (streams, [cache.lengths[stream] for stream in streams]))
        first = first * cache.capacity
        written = ranges(first + lengths, np.full(len(first), n))
        offsets = n * np.arange(len(first) + 1), np.append(first, first[-1] + cache.capacity), lengths + n
        # One copy to the device.
        together = torch.from_numpy(np.concatenate([written, *offsets])).to(cache.keys[0].device, non_blocking=True)
        cache_rows, rest = together[: len(written)], together[len(written) :].int()
        queries, keys, used = rest.split([len(first) + 1, len(first) + 1, len(first)])
        found.append(Lengths(cache, start, cache_rows, queries, keys, used, int(lengths.max()) + n))
        start += len(written)
    return found


def takes_lengths(cache: KeyValueCache) -> bool:
    """Return whether the kernel of `LengthsAttention` (FlashAttention's in PyTorch) takes a cache."""
    keys = cache.keys[0]
    fits = keys.dtype in (torch.float16, torch.bfloat16) and keys.shape[3] % 8 == 0 and keys.shape[3] <= 256
    return keys.is_cuda and fits and torch.cuda.get_device_capability(keys.device) >= (8, 0)


@dataclass(frozen=True)
class LengthsAttention:
    """`CachedAttention` by one call of `varlen_attn` for each cache, whatever the lengths of its streams.

    The keys of a stream are not split among blocks of the GPU (`num_splits=1`), so that the order of its sums does not
    depend on the other streams.
    """

    parts: Sequence[Lengths]
    layer: int
    n: int
    causal: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output [T, H, D] for q [T, H, D] and k, v [T, G, D]."""
        out = torch.zeros_like(q)
        for own in self.parts:
            part = slice(own.start, own.start + len(own.cache_rows))
            keys, values = (cached[self.layer].flatten(0, 1) for cached in (own.cache.keys, own.cache.values))
            for cached, new in ((keys, k), (values, v)):
                cached.index_copy_(0, own.cache_rows, new[part].to(cached.dtype))
            attended = varlen_attn(
                q[part].to(keys.dtype),
                keys,
                values,
                own.query_offsets,
                own.key_offsets,
                self.n,
                own.longest,
                window_size=(-1, 0 if self.causal else -1),
                enable_gqa=q.shape[1] != k.shape[1],
                seqused_k=own.used,
                num_splits=1,
            )
            assert isinstance(attended, Tensor)
            out[part] = attended
        return out


@dataclass(frozen=True)
class PrefillAttention:
    """Attention of one layer over packed contexts, whose keys and values are written to an empty cache.

    parts: layouts of consecutive parts of the positions, or (contexts, length) of texts of one length, which are
    attended to together; the rest is padding. cache_rows: int64 [T'], the row of the cache, flattened over streams and
    positions, for each of the T' positions that are not padding.
    """

    cache: KeyValueCache
    layer: int
    parts: Sequence[AttentionLayout | tuple[int, int]]
    cache_rows: Tensor
    backend: ops.Backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output [T, H, D] for q [T, H, D] and k, v [T, G, D]."""
        for cached, new in ((self.cache.keys, k), (self.cache.values, v)):
            written = new[: len(self.cache_rows)].to(cached[self.layer].dtype)  # autocast computes narrower ones
            cached[self.layer].flatten(0, 1).index_copy_(0, self.cache_rows, written)
        out, start = torch.zeros_like(q), 0
        for part in self.parts:
            if isinstance(part, AttentionLayout):
                own = slice(start, start + part.total_length)
                out[own] = ops.hybrid_attention(q[own], k[own], v[own], part, backend=self.backend)
            else:
                own = slice(start, start + math.prod(part))
                queries, keys, values = (x[own].unflatten(0, part).transpose(1, 2) for x in (q, k, v))
                shared = q.shape[1] != k.shape[1]
                attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=shared)
                out[own] = attended.transpose(1, 2).flatten(0, 1)
            start = own.stop
        return out
