"""The attention mask of a packed sequence as two intervals a position, and the tiles that the kernels work on.

A packed sequence holds documents, and a document holds text and images. Attention is causal within a document and
bidirectional within an image (Transfusion, arXiv 2408.11039, section 3.2). So the keys that a query sees form one
interval, and so do the queries that see a key:

    query i sees the keys           [key_start(i), key_end(i))      = [document_start, image_end or i + 1)
    key j is seen by the queries    [query_start(j), query_end(j))  = [image_start or j, document_end)

A padding position sees nothing and is seen by nothing: both of its intervals are empty.

The layout also cuts the sequence into tiles of consecutive positions, once for all layers and heads: tall tiles of up
to 128 positions and short tiles of up to 64. Tiles start and end with documents, which wastes less work than a fixed
grid, and short documents share a tile. Both ends of the intervals ascend with the position, so the first and the last
row bound what a whole tile sees, and a kernel needs only the start and the end of its tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.kernels.attention_configs import Config, config

Plan = TypeVar("Plan")

# Tall and short: two and one times 64 rows, which one matrix instruction of Hopper takes from a group of four warps.
TILE_HEIGHTS = (128, 64)


class TileWork(NamedTuple):
    """The work of one head over the tiles of one height: programs, and the columns that all of them visit together.

    A program visits its columns in full blocks, whose pairs are all visible, and then in partial blocks, whose pairs
    are compared with the mask.
    """

    config: Config
    programs: int
    full: int
    partial: int


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """The attention mask of one packed sequence of T positions, as O(T) integers.

    The intervals and tiles live on the device of the attention inputs. `document_offsets`, `image_spans` and
    `tile_counts` stay on the CPU, so that planning and launching work does not wait for the device.

    Attributes:
        key_start, key_end: int32 [T], the interval of keys that each query sees.
        query_start, query_end: int32 [T], the interval of queries that see each key.
        document_offsets: int64 [documents + 1] on the CPU; document d is [offsets[d], offsets[d + 1]).
        image_spans: int64 [images, 2] on the CPU, rows (start, length) in ascending order.
        query_tiles, key_tiles: int32 [capacity, 2], rows (start, end): tiles of queries for the forward pass and dQ,
            tiles of keys for dK and dV. All tall tiles, then all short tiles, both by descending work, then zeros.
            The capacity depends on T alone, so that the shape is the same for every batch.
        tile_counts: int64 [5] on the CPU: the numbers of tall and short query tiles, of tall and short key tiles, and
            of positions in documents.
    """

    key_start: Tensor
    key_end: Tensor
    query_start: Tensor
    query_end: Tensor
    document_offsets: Tensor
    image_spans: Tensor
    query_tiles: Tensor
    key_tiles: Tensor
    tile_counts: Tensor
    _plans: dict[Callable[..., Any], Any] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def from_spans(
        cls,
        document_lengths: Sequence[int] | np.ndarray,
        image_spans: Sequence[tuple[int, int]] | np.ndarray,
        total_length: int | None = None,
        device: torch.device | str = "cpu",
    ) -> AttentionLayout:
        """Build the layout of consecutive documents in O(T) time and memory.

        Args:
            document_lengths: Number of positions of each document; the first document starts at position 0.
            image_spans: Absolute (start, length) of each image, each inside one document, in any order.
            total_length: T, at least the sum of the document lengths; the rest is padding. Default: no padding.
            device: Device of the intervals and tiles.

        Raises:
            ValueError: A document or span is empty, negative, outside of its document, or overlaps another.
        """
        lengths = _integers("document_lengths", document_lengths, (0,))
        spans = _integers("image_spans", image_spans, (0, 2))
        spans = spans[np.argsort(spans[:, 0], kind="stable")]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        total = int(offsets[-1]) if total_length is None else int(total_length)
        _check_documents(lengths, total)
        _check_spans(spans, offsets)

        position = np.arange(total, dtype=np.int32)
        key_start, query_end, query_start = position.copy(), position.copy(), position.copy()
        used = int(offsets[-1])
        key_start[:used] = np.repeat(offsets[:-1], lengths)
        query_end[:used] = np.repeat(offsets[1:], lengths)
        query_start[_positions_of(spans)] = np.repeat(spans[:, 0], spans[:, 1])
        key_end = _key_ends(used, total, spans)
        query_tiles, query_counts = _tiles(offsets, key_start, key_end, total)
        key_tiles, key_counts = _tiles(offsets, query_start, query_end, total)
        layout = cls(
            key_start=_as_int32(key_start),
            key_end=_as_int32(key_end),
            query_start=_as_int32(query_start),
            query_end=_as_int32(query_end),
            document_offsets=torch.from_numpy(offsets),
            image_spans=torch.from_numpy(spans),
            query_tiles=_as_int32(query_tiles),
            key_tiles=_as_int32(key_tiles),
            tile_counts=torch.tensor([*query_counts, *key_counts, used], device="cpu"),
        )
        return layout.to(device)

    @property
    def total_length(self) -> int:
        """T, including padding."""
        return self.key_start.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the intervals and tiles."""
        return self.key_start.device

    @cached_property
    def area(self) -> int:
        """Number of visible (query, key) pairs: the sum of L(L+1)/2 over documents and of n(n-1)/2 over images."""
        lengths, patches = self.document_offsets.diff(), self.image_spans[:, 1]
        return int((lengths * (lengths + 1)).sum() + (patches * (patches - 1)).sum()) // 2

    def visited_area(self, direction: str, *, head_dim: int, arch: int | str, itemsize: int = 2) -> int:
        """Return the number of (query, key) pairs that the Triton kernels compute for one head, visible or not.

        Unused rows of tiles count too. `direction` is a kernel of `tile_work`, whose other arguments and errors these
        are, or "backward": the mean of dQ and of dK and dV, weighted by their three and four matrix products.
        """
        sizes: dict[str, Any] = {"head_dim": head_dim, "arch": arch, "itemsize": itemsize}
        if direction == "backward":
            dq, dkdv = (self.visited_area(kernel, **sizes) for kernel in ("backward_dq", "backward_dkdv"))
            return (3 * dq + 4 * dkdv) // 7
        return sum(work.config.block * (work.full + work.partial) for work in self.tile_work(direction, **sizes))

    def tile_work(self, kernel: str, *, head_dim: int, arch: int | str, itemsize: int = 2) -> list[TileWork]:
        """Count the work of one head in a Triton kernel, over the tall tiles and over the short tiles.

        Args:
            kernel: "forward", "backward_dq" or "backward_dkdv", whose rows are keys and whose columns are queries.
            head_dim: D. arch: 80, 90, 100 or 120, as in sm_80. itemsize: Bytes of a number.

        Raises:
            ValueError: An unknown kernel, or a head dimension or architecture without a configuration.
        """
        by_keys = kernel == "backward_dkdv"
        names = ("query_start", "query_end", "key_tiles") if by_keys else ("key_start", "key_end", "query_tiles")
        low, high, tiles = (getattr(self, name).cpu().numpy().astype(np.int64) for name in names)
        tall, short = self.tile_counts.tolist()[2:4] if by_keys else self.tile_counts.tolist()[:2]
        work = []
        for height, own in zip(TILE_HEIGHTS, (tiles[:tall], tiles[tall : tall + short]), strict=True):
            c = config(kernel, arch, head_dim, itemsize, height)
            starts, ends = own.T
            parts = -(-(ends - starts) // c.block)  # programs that share a tile
            number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
            starts = np.repeat(starts, parts) + number * c.block
            ends = np.minimum(starts + c.block, np.repeat(ends, parts))
            common = np.maximum(high[starts] - low[ends - 1], 0)  # columns that all rows of a program see
            full = common // c.step * c.step
            partial = -(-(high[ends - 1] - low[starts] - full) // c.partial_step) * c.partial_step
            work.append(TileWork(c, len(starts), int(full.sum()), int(partial.sum())))
        return work

    def key_ends(self) -> np.ndarray:
        """Return `key_end` as int32 [T] on the CPU, recomputed so that the caller does not wait for the device."""
        return _key_ends(int(self.document_offsets[-1]), self.total_length, self.image_spans.numpy())

    def plan(self, build: Callable[[AttentionLayout], Plan]) -> Plan:
        """Return `build(self)`, computed once and kept: a backend's list of work, which all layers share."""
        if build not in self._plans:
            self._plans[build] = build(self)
        return self._plans[build]

    def dense_mask(self) -> Tensor:
        """Return the mask by its definition, bool [T, T], True where query (row) sees key (column), for tests only."""
        position = torch.arange(self.total_length)
        document = torch.bucketize(position, self.document_offsets, right=True)
        image = torch.zeros_like(position)
        for number, (start, length) in enumerate(self.image_spans.tolist(), start=1):
            image[start : start + length] = number
        same_document = document[:, None] == document[None, :]
        same_image = (image[:, None] == image[None, :]) & (image > 0)[:, None]
        real = position < self.document_offsets[-1]
        visible = same_document & ((position[:, None] >= position[None, :]) | same_image)
        return (visible & real[:, None] & real[None, :]).to(self.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionLayout:
        """Return this layout with its intervals and tiles on `device`."""
        if torch.device(device) == self.device:
            return self
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=non_blocking) for n in _ON_DEVICE})

    def pin_memory(self) -> AttentionLayout:
        """Return this layout in page-locked memory, from which copies to a GPU overlap with computation."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in _ON_DEVICE})


_ON_DEVICE = ("key_start", "key_end", "query_start", "query_end", "query_tiles", "key_tiles")


def _integers(name: str, values: Any, empty: tuple[int, ...]) -> np.ndarray:
    """Convert `values` to an int64 array of the shape `empty`, of which the first size is free."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must have entries of one length: {error}") from error
    if not array.size:
        return np.zeros(empty, dtype=np.int64)
    if array.dtype.kind not in "iu" or array.shape[1:] != empty[1:]:
        rule = "a list of integers" if len(empty) == 1 else "a list of (start, length)"
        raise ValueError(f"{name} must be {rule}, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def _as_int32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int32, copy=False))


def _key_ends(used: int, total: int, spans: np.ndarray) -> np.ndarray:
    key_end = np.arange(total, dtype=np.int32)
    key_end[:used] += 1
    key_end[_positions_of(spans)] = np.repeat(spans.sum(axis=1), spans[:, 1])
    return key_end


def _positions_of(spans: np.ndarray) -> np.ndarray:
    """Return the positions that the spans, rows (start, length), cover in their order: int64 [sum of lengths]."""
    starts, lengths = spans[:, 0], spans[:, 1]
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _tiles(offsets: np.ndarray, low: np.ndarray, high: np.ndarray, total: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the tiles of all documents, int64 [capacity, 2], and the numbers of tall and short tiles.

    Each position sees the interval [low, high), so the tile [start, end) sees [low[start], high[end - 1]).
    """
    short = TILE_HEIGHTS[1]
    lengths = np.diff(offsets)
    long = np.flatnonzero(lengths > short)
    tiles = np.concatenate([_tiles_of_long(offsets[long], offsets[long + 1], low, high), _shared_tiles(offsets)])
    starts, ends = tiles.T
    work = high[ends - 1] - low[starts] if len(tiles) else starts
    is_short = ends - starts <= short
    order = np.lexsort((-work, is_short))
    # A tall tile, and two neighbours of short documents, hold more than `short` positions; else they would be one tile.
    table = np.zeros((2 * (total // short) + 1, 2), dtype=np.int64)
    table[: len(tiles)] = tiles[order]
    shorts = int(is_short.sum())
    return table, (len(tiles) - shorts, shorts)


def _tiles_of_long(starts: np.ndarray, ends: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Cut each document into tall tiles and a remainder, int64 [tiles, 2].

    The remainder lies at the end of the document where that makes less work. In text that is the front, whose rows see
    the fewest keys.
    """
    tall, short = TILE_HEIGHTS
    counts = -(-(ends - starts) // tall)
    first = np.cumsum(counts) - counts
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - first[document]

    remainder_last = starts[document] + number * tall
    remainder_last = np.stack([remainder_last, np.minimum(remainder_last + tall, ends[document])], axis=1)
    remainder_first = ends[document] - (counts[document] - 1 - number) * tall
    remainder_first = np.stack([np.maximum(remainder_first - tall, starts[document]), remainder_first], axis=1)

    def work(tiles: np.ndarray) -> np.ndarray:
        height = np.where(tiles[:, 1] - tiles[:, 0] <= short, short, tall)
        return np.add.reduceat(height * (high[tiles[:, 1] - 1] - low[tiles[:, 0]]), first)

    if not len(counts):
        return remainder_last
    return np.where((work(remainder_first) < work(remainder_last))[document, None], remainder_first, remainder_last)


def _shared_tiles(offsets: np.ndarray) -> np.ndarray:
    """Put as many neighbouring short documents into each short tile as fit, int64 [tiles, 2]."""
    short = TILE_HEIGHTS[1]
    # A longer document fits into no tile, so no tile extends beyond it.
    following = np.searchsorted(offsets, offsets[:-1] + short, side="right") - 1
    following, document, groups = following.tolist(), 0, []
    while document < len(following):
        if following[document] > document:
            groups.append((document, following[document]))
        document = max(following[document], document + 1)
    return offsets[np.array(groups, dtype=np.int64).reshape(-1, 2)]


def _check_documents(lengths: np.ndarray, total: int) -> None:
    if (lengths <= 0).any():
        number = int(np.flatnonzero(lengths <= 0)[0])
        raise ValueError(f"document_lengths[{number}] must be positive, got {lengths[number]}; drop empty documents")
    if total < lengths.sum():
        raise ValueError(f"total_length must be at least the documents' {lengths.sum()} positions, got {total}")


def _check_spans(spans: np.ndarray, offsets: np.ndarray) -> None:
    starts, lengths = spans[:, 0], spans[:, 1]
    ends = starts + lengths

    def reject(bad: np.ndarray, rule: str) -> None:
        if bad.any():
            number = int(np.flatnonzero(bad)[0])
            raise ValueError(f"image span (start={starts[number]}, length={lengths[number]}) {rule}")

    reject(lengths <= 0, "must have a positive length; drop empty images")
    reject((starts < 0) | (ends > offsets[-1]), f"must lie inside one document, got documents over [0, {offsets[-1]})")
    document = np.searchsorted(offsets, starts, side="right") - 1
    document_end = offsets[np.minimum(document + 1, len(offsets) - 1)]
    reject(ends > document_end, "must lie inside one document, but crosses a document's end")
    overlap = np.zeros(len(spans), dtype=bool)
    overlap[1:] = starts[1:] < ends[:-1]
    reject(overlap, "overlaps the image before it; every position belongs to at most one image")
