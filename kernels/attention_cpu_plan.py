"""The plan of attention on the torch backend: batches of documents and of noised copies, their tiles and masks.

It is made once for all layers. attention_cpu.py explains the batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.spans import context_ends, documents_of

SHORT = 256  # longest document that shares a batch with others
HALF_ALIGNMENT = 16  # lengths in half precision: CPUs need up to 5 times as long for products with unaligned rows
MAX_ROWS = 512  # queries of a tile: more would mask up to half of their keys, fewer cost more calls


@dataclass(frozen=True, eq=False)
class Tile:
    """Queries `rows` of each of the B documents or copies of a batch, and the keys [0, keys) that they see."""

    rows: slice
    keys: int
    visible: Tensor | None  # bool [B, 1, rows, keys], or [B, 1, 1, keys]; None for causal attention over a text
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
class Rows:
    """B times L consecutive rows from `start`."""

    start: int
    shape: tuple[int, int]  # B, L

    def of(self, rows: Tensor) -> Tensor:
        """Return this part of all rows [R, H, D], a view [B, H, L, D]."""
        return rows[self.start : self.start + math.prod(self.shape)].unflatten(0, self.shape).transpose(1, 2)


@dataclass(frozen=True)
class Batch:
    """B documents or copies, padded to one number of queries and one of keys: in documents they are the same."""

    queries: Rows
    keys: Rows
    tiles: tuple[Tile, ...]  # cover all queries; the last tile sees every key


@dataclass(frozen=True)
class Index:
    """The positions of rows."""

    gather: Tensor  # int64 [R], the position of each row
    scatter: Tensor  # int64 [positions of all documents], one row of each position
    repeated: list[tuple[slice, slice]]  # further rows, and their positions


@dataclass(frozen=True)
class Plan:
    """The batches of a layout: one for each long document, and one for each class of short documents; then copies.

    A document shorter than its batch is padded with its last position.
    """

    batches: list[Batch]
    queries: Index
    keys: Index


class _Part(NamedTuple):
    """A batch before its rows are numbered, as positions [B, L]; keys of copies begin with their own."""

    queries: np.ndarray
    keys: np.ndarray
    own: np.ndarray  # bool, which queries are no padding
    tiles: tuple[Tile, ...]
    contexts: np.ndarray = np.zeros((0, 2), dtype=np.int64)  # positions (start, end) of the other keys of each copy


def plan(layout: AttentionLayout, alignment: int = 1) -> Plan:
    """Plan the attention of `layout` on its device; padded lengths are multiples of `alignment`."""
    parts = [*_document_parts(layout, alignment), *_copy_parts(layout, alignment)]
    batches: list[Batch] = []
    repeated: list[tuple[slice, slice]] = []
    query = key = 0
    for part in parts:
        (B, N), (_, L) = part.queries.shape, part.keys.shape
        batches.append(Batch(Rows(query, (B, N)), Rows(key, (B, L)), part.tiles))
        for first, (start, end) in zip(range(key + N, key + B * L, L), part.contexts.tolist(), strict=False):
            repeated.append((slice(first, first + end - start), slice(start, end)))
        query, key = query + B * N, key + B * L
    used = int(layout.document_offsets[-1])
    queries = _index([(part.queries, part.own) for part in parts], [], used, layout.device)
    if not len(layout.noised_copies):
        return Plan(batches, queries, queries)
    own_keys = [np.pad(part.own, ((0, 0), (0, part.keys.shape[1] - part.own.shape[1]))) for part in parts]
    keys = zip((part.keys for part in parts), own_keys, strict=True)
    return Plan(batches, queries, _index(list(keys), repeated, used, layout.device))


def _index(
    rows: list[tuple[np.ndarray, np.ndarray]], repeated: list[tuple[slice, slice]], used: int, device: torch.device
) -> Index:
    """Number rows, given as their positions and whether each is the one row that a position owns."""
    gather = np.concatenate([np.zeros(0, dtype=np.int64), *(positions.reshape(-1) for positions, _ in rows)])
    own = np.flatnonzero(np.concatenate([np.zeros(0, dtype=bool), *(is_own.reshape(-1) for _, is_own in rows)]))
    scatter = np.zeros(used, dtype=np.int64)
    scatter[gather[own]] = own
    return Index(torch.from_numpy(gather).to(device), torch.from_numpy(scatter).to(device), repeated)


def _document_parts(layout: AttentionLayout, alignment: int) -> Iterator[_Part]:
    """Yield the batches of documents without their copies."""
    offsets = layout.document_offsets.numpy()
    key_end = layout.key_ends()
    has_image = np.zeros(len(offsets) - 1, dtype=bool)
    has_image[documents_of(layout.image_spans[:, 0].numpy(), offsets)] = True
    lengths = context_ends(offsets, layout.noised_copies.numpy()) - offsets[:-1]
    documents = np.flatnonzero(lengths)
    for chosen in _documents_by_batch(lengths[documents], max(alignment, 8)):
        document = documents[chosen]
        own, L = lengths[document, None], _round_up(int(lengths[document].max()), alignment)
        positions = offsets[document, None] + np.minimum(np.arange(L), own - 1)  # [B, L]
        # Keys of the padding are columns beyond the document's length, which none of its rows sees.
        ends = key_end[positions] - offsets[document, None]
        causal = L > SHORT and not has_image[document[0]]
        tiles = (Tile(slice(0, L), L, None),) if causal else _tiles(ends, alignment, layout.device)
        yield _Part(positions, positions, np.arange(L) < own, tiles)


def _copy_parts(layout: AttentionLayout, alignment: int) -> Iterator[_Part]:
    """Yield the batches of copies. The keys of a copy are its own, [0, N), and behind them those of its context."""
    copies = layout.noised_copies.numpy()
    offsets = layout.document_offsets.numpy()
    starts = offsets[documents_of(copies[:, 0], offsets)]
    lengths = copies[:, 1] + copies[:, 2] - starts
    for chosen in _documents_by_batch(lengths, max(alignment, 8)):
        copy, own, places = copies[chosen, :1], copies[chosen, 1:2], copies[chosen, 2:]
        seen = places - starts[chosen, None]
        N, M = (_round_up(int(x.max()), alignment) for x in (own, seen))
        queries = copy + np.minimum(np.arange(N), own - 1)
        is_own, in_context = np.arange(N) < own, np.arange(M) < seen
        context = np.where(in_context, starts[chosen, None] + np.arange(M), copy)
        visible = torch.from_numpy(np.concatenate([is_own, in_context], axis=1)[:, None, None]).to(layout.device)
        tiles = tuple(Tile(slice(n, min(n + MAX_ROWS, N)), N + M, visible) for n in range(0, N, MAX_ROWS))
        contexts = np.concatenate([starts[chosen, None], places], axis=1)
        yield _Part(queries, np.concatenate([queries, context], axis=1), is_own, tiles, contexts)


plan_for_half = partial(plan, alignment=HALF_ALIGNMENT)


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


def _tiles(key_end: np.ndarray, alignment: int, device: torch.device) -> tuple[Tile, ...]:
    """Cut B documents of one length L into tiles; each row sees the keys [0, key_end), key_end [B, L]."""
    length = key_end.shape[1]
    tiles = []
    for start in range(0, length, MAX_ROWS):
        ends = key_end[:, start : start + MAX_ROWS]
        keys = _round_up(int(ends.max()), alignment)
        visible = torch.arange(keys, device=device) < torch.from_numpy(ends).to(device)[:, None, :, None]
        tiles.append(Tile(slice(start, start + ends.shape[1]), keys, visible))
    return tuple(tiles)


def _round_up(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment
