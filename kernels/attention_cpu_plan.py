"""The plan of attention on the torch backend: batches of documents and of noised copies, their tiles and masks.

It is made once for all layers. attention_cpu.py explains the batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.spans import context_ends, documents_of, key_ends

# Longest document that shares a batch with others. On a CPU, one call for each document of more than TINY is faster in
# fp32; in half precision, PyTorch's backward pass takes 1.1 to 5 times as long up to SHORT, and longer texts less.
SHORT, TINY = 256, 16
HALF_ALIGNMENT = 16  # lengths in half precision: CPUs need up to 5 times as long for products with unaligned rows
MAX_ROWS = 512  # queries of a tile: more would mask up to half of their keys, fewer cost more calls


@dataclass(frozen=True, eq=False)
class Tile:
    """The next `rows` queries of each of the B documents or copies of a batch, and the keys [0, keys) they see."""

    rows: int
    keys: int
    visible: Tensor | None  # bool [B, 1, rows, keys], or [B, 1, 1, keys]; None for causal attention over a text
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def hidden(self) -> Tensor:
        """The complement of `visible`, or [rows, keys] for causal attention, on the CPU."""
        return torch.ones(self.rows, self.keys, dtype=torch.bool).triu(1) if self.visible is None else ~self.visible

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return what to add to the scores, 0 or -inf; None for causal attention."""
        if self.visible is None:
            return None
        if dtype not in self._biases:
            self._biases[dtype] = torch.zeros_like(self.visible, dtype=dtype).masked_fill_(self.hidden, -math.inf)
        return self._biases[dtype]


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, B times L. Rows of padding are zero."""

    shape: tuple[int, int]  # B, L
    index: Tensor  # int64 [B * L], the position of each row; any for padding
    padding: Tensor  # int64 [B * L - n], rows
    rows: Tensor  # int64 [n], the rows that positions own
    positions: Tensor  # int64 [n]
    start: int | None  # the first position of a batch that is one document
    repeated: list[tuple[slice, slice]]  # further rows, and their positions

    def gather(self, x: Tensor) -> Tensor:
        """Return these rows [B, H, L, D] of x [T, H, D], for one document a view where each head is contiguous."""
        B, L = self.shape
        if self.start is not None:
            own = x.narrow(0, self.start, L)
            # The fused kernels of CPUs take the numbers of a head for neighbours, and do not check it.
            own = own if own.stride(-1) == 1 else own.contiguous()
            return own.transpose(0, 1).unsqueeze(0)
        flat = x.flatten(1)
        out = flat.index_select(0, self.index)
        if len(self.padding):
            out.index_fill_(0, self.padding, 0.0)
        for rows, positions in self.repeated:
            out[rows] = flat[positions]
        return out.view(B, L, *x.shape[1:]).transpose(1, 2)

    def scatter(self, part: Tensor, out: Tensor) -> None:
        """Write the rows [B, H, L, D] that positions own to these positions of out [T, H, D]."""
        if self.start is not None:
            out.narrow(0, self.start, self.shape[1]).copy_(part[0].transpose(0, 1))
            return
        flat = part.transpose(1, 2).flatten(0, 1).flatten(1)
        if len(flat) > len(self.rows):
            flat = flat.index_select(0, self.rows)
        out.flatten(1).index_copy_(0, self.positions, flat.to(out.dtype))


@dataclass(frozen=True)
class Batch:
    """B documents or copies, padded to one number of queries and one of keys: in documents they are the same."""

    queries: Rows
    keys: Rows
    tiles: tuple[Tile, ...]  # cover all queries; the last tile sees every key

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Return the part of each tile of x [B, H, L, ..]."""
        return x.split([tile.rows for tile in self.tiles], dim=2) if len(self.tiles) > 1 else (x,)


def is_half(x: Tensor) -> bool:
    """Return whether x is in half precision."""
    return x.dtype in (torch.bfloat16, torch.float16)


class Spans(NamedTuple):
    """The documents, the noised copies and the ends of the first intervals, on which a plan depends."""

    offsets: np.ndarray
    copies: np.ndarray
    key_end: np.ndarray


def spans_of_layout(layout: AttentionLayout) -> Spans:
    """Return the spans of a layout on any device, without waiting for it."""
    offsets, images, copies = (x.numpy() for x in (layout.document_offsets, layout.image_spans, layout.noised_copies))
    return Spans(offsets, copies, key_ends(offsets, images, copies, layout.total_length))


def spans_of_intervals(key_start: Tensor, key_end: Tensor, own_start: Tensor | None, own_end: Tensor | None) -> Spans:
    """Return the spans of a layout on the CPU from its intervals, whose shapes depend on T alone."""
    starts, ends = key_start.numpy(), key_end.numpy()
    own = np.zeros((2, len(starts)), np.int32) if own_start is None or own_end is None else [own_start, own_end]
    own_starts, own_ends = (np.asarray(x) for x in own)
    used = int(((ends > starts) | (own_ends > own_starts)).sum())
    offsets = np.append(np.flatnonzero(starts[:used] == np.arange(used)), used)
    first = np.flatnonzero((own_ends > own_starts) & (own_starts == np.arange(len(starts))))
    return Spans(offsets, np.stack([first, own_ends[first] - first, ends[first]], axis=1), ends)


def kept_plan(spans: Spans, q: Tensor) -> list[Batch]:
    """Return the plan for q [T, H, D] on its device: a batch for each long document and for each class of short ones.

    The plans of the last two layouts are kept, for all layers and the backward pass.
    """
    short, alignment = SHORT, 1
    if q.device.type == "cpu":
        short, alignment = (SHORT, HALF_ALIGNMENT) if is_half(q) else (TINY, 1)
    return _plan(*(x.astype(np.int64).tobytes() for x in spans), q.device, short, alignment, MAX_ROWS)


@lru_cache(maxsize=2)
def _plan(
    offsets: bytes, copies: bytes, key_end: bytes, device: torch.device, short: int, alignment: int, max_rows: int
) -> list[Batch]:
    """Plan documents of up to `short` positions together; padded lengths are multiples of `alignment`."""
    bounds, noised, ends = (np.frombuffer(x, dtype=np.int64) for x in (offsets, copies, key_end))
    noised, sizes = noised.reshape(-1, 3), (short, alignment, max_rows, device)
    return [*_document_batches(bounds, noised, ends, *sizes), *_copy_batches(bounds, noised, *sizes)]


forget_plans = _plan.cache_clear


def _rows(positions: np.ndarray, own: np.ndarray, device: torch.device, repeated: Sequence = ()) -> Rows:
    """Return rows given as their positions [B, L], and whether each is the one row that a position owns."""
    index, padding, rows, owned = (
        torch.from_numpy(x.reshape(-1)).to(device)
        for x in (positions, np.flatnonzero(~own), np.flatnonzero(own), positions[own])
    )
    start = int(positions[0, 0]) if len(own) == 1 and own.all() else None  # positions of one document are consecutive
    return Rows(own.shape, index, padding, rows, owned, start, list(repeated))


def _document_batches(
    offsets: np.ndarray, copies: np.ndarray, key_end: np.ndarray,
    short: int, alignment: int, max_rows: int, device: torch.device,
) -> Iterator[Batch]:  # fmt: skip
    """Yield the batches of documents without their copies."""
    has_image = np.zeros(len(offsets) - 1, dtype=bool)
    has_image[documents_of(np.flatnonzero(key_end > np.arange(len(key_end)) + 1), offsets)] = True
    lengths = context_ends(offsets, copies) - offsets[:-1]
    for illustrated in (False, True):
        documents = np.flatnonzero((lengths > 0) & (has_image == illustrated))
        for chosen in _documents_by_batch(lengths[documents], max(alignment, 8), short):
            document = documents[chosen]
            own, longest = lengths[document, None], int(lengths[document].max())
            L = _round_up(longest, alignment) if longest <= short else longest
            positions = offsets[document, None] + np.minimum(np.arange(L), own - 1)  # [B, L]
            # Keys of the padding are columns beyond the document's length, which none of its rows sees.
            ends = key_end[positions] - offsets[document, None]
            tiles = _tiles(ends, max_rows, device) if illustrated else (Tile(L, L, None),)
            rows = _rows(positions, np.arange(L) < own, device)
            yield Batch(rows, rows, tiles)


def _copy_batches(
    offsets: np.ndarray, copies: np.ndarray, short: int, alignment: int, max_rows: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the batches of copies. The keys of a copy are its own, [0, N), and behind them those of its context."""
    starts = offsets[documents_of(copies[:, 0], offsets)]
    lengths = copies[:, 1] + copies[:, 2] - starts
    for chosen in _documents_by_batch(lengths, max(alignment, 8), short):
        copy, own, places = copies[chosen, :1], copies[chosen, 1:2], copies[chosen, 2:]
        seen = places - starts[chosen, None]
        N, M = (_round_up(int(x.max()), alignment) for x in (own, seen))
        queries, is_own = copy + np.minimum(np.arange(N), own - 1), np.arange(N) < own
        visible = torch.from_numpy(np.concatenate([is_own, np.arange(M) < seen], axis=1)[:, None, None])
        visible = visible.to(device)
        tiles = tuple(Tile(min(max_rows, N - n), N + M, visible) for n in range(0, N, max_rows))
        contexts = zip(starts[chosen].tolist(), places[:, 0].tolist(), strict=True)
        first = (N + n * (N + M) for n in range(len(copy)))
        repeated = [(slice(n, n + b - a), slice(a, b)) for n, (a, b) in zip(first, contexts, strict=True)]
        unowned = ((0, 0), (0, M))
        keys = _rows(np.pad(queries, unowned), np.pad(is_own, unowned), device, repeated)
        yield Batch(_rows(queries, is_own, device), keys, tiles)


def _documents_by_batch(lengths: np.ndarray, step: int, short: int) -> Iterator[np.ndarray]:
    """Yield the documents of each batch: one long document, or all short documents of a class.

    Lengths of a class differ by less than `step`, or by less than a quarter.
    """
    longest = list(accumulate(range(short // step), lambda n, _: n + step * max(1, n // 4 // step), initial=step))
    classes = np.searchsorted(longest, lengths)
    is_long = lengths > short
    classes[is_long] = len(longest) + np.arange(is_long.sum())
    order = np.argsort(classes, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(classes[order])) + 1) if len(order) else ()


def _tiles(key_end: np.ndarray, max_rows: int, device: torch.device) -> tuple[Tile, ...]:
    """Cut B documents of one length L into tiles; each row sees the keys [0, key_end), key_end [B, L]."""
    length = key_end.shape[1]
    tiles = []
    for start in range(0, length, max_rows):
        ends = key_end[:, start : start + max_rows]
        keys = int(ends.max()) if start + max_rows < length else length
        visible = torch.arange(keys, device=device) < torch.from_numpy(ends).to(device)[:, None, :, None]
        tiles.append(Tile(ends.shape[1], keys, visible))
    return tuple(tiles)


def _round_up(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment
