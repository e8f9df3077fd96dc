"""Which positions of a packed sequence may see which: two intervals a position, nothing quadratic.

A packed sequence holds documents, and a document holds text and images. Attention is causal within a document
and bidirectional within an image (Transfusion, arXiv 2408.11039, section 3.2), so the keys that a query sees are
one interval, and so are the queries that a key is seen by:

    query i sees the keys           [key_start(i), key_end(i))      = [document_start, image_end or i + 1)
    key j is seen by the queries    [query_start(j), query_end(j))  = [image_start or j, document_end)

A position of the padding sees nothing and is seen by nothing: both of its intervals are empty.

The kernels' work is cut here too, once for all layers and heads, into tiles of consecutive positions: tall ones of up
to 128 and short ones of up to 64. Tiles start and end with documents, which wastes less than a fixed grid does, and
documents short enough share a tile. A kernel needs no more than where its tile starts and ends: both ends of the
intervals ascend with the position, so the first and the last row bound what the whole tile sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.kernels.attention_configs import KERNELS, Config, config

Plan = TypeVar("Plan")

TILE_HEIGHTS = (
    128,
    64,
)  # tall, short: one or two groups of warps of 64 rows, what a matrix instruction of Hopper takes


class Walk(NamedTuple):
    """What the programs over tiles of one height do, for one head, in columns summed over the programs."""

    config: Config
    programs: int
    whole: int
    """In steps that all rows of a program see."""
    edge: int
    """In steps that compare."""


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """The mask of one packed sequence of T positions, as O(T) integers.

    The intervals live on the device of the attention inputs; `document_offsets` and `image_spans` stay on the CPU,
    where whoever plans the work (tiles, documents) reads them without waiting for a device.

    Attributes:
        key_start, key_end: int32 [T], the keys that each query sees.
        query_start, query_end: int32 [T], the queries that each key is seen by.
        document_offsets: int64 [documents + 1] on the CPU; document d is [offsets[d], offsets[d + 1]).
        image_spans: int64 [images, 2] on the CPU, rows (start, length) in ascending order.
        query_tiles, key_tiles: int32 [capacity, 2], rows (start, end): the tiles of queries for the forward pass and
            dQ, the tiles of keys for dK and dV; all tall ones, then all short ones, those with most work first, then
            zeros. The capacity depends on T alone, so that no batch makes a new shape.
        tile_counts: int64 [5] on the CPU: tall and short query tiles, tall and short key tiles, positions in documents.
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
        """Builds the layout of consecutive documents in O(T).

        Args:
            document_lengths: positions of each document; documents follow each other from position 0.
            image_spans: (start, length) of each image, absolute, each inside one document, in any order.
            total_length: T, at least the sum of the document lengths; the rest is padding. Default: no padding.
            device: where the intervals are put.

        Raises:
            ValueError: naming the document or span that is empty, negative, out of its document, or overlaps another.
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
        """T, padding included."""
        return self.key_start.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the intervals are."""
        return self.key_start.device

    @cached_property
    def area(self) -> int:
        """Exact number of visible (query, key) pairs: sum of L(L+1)/2 over documents and n(n-1)/2 over images."""
        lengths, patches = self.document_offsets.diff(), self.image_spans[:, 1]
        return int((lengths * (lengths + 1)).sum() + (patches * (patches - 1)).sum()) // 2

    def visited_area(self, direction: str, *, head_dim: int, arch: int | str, itemsize: int = 2) -> int:
        """Number of (query, key) pairs, visible or not, that the Triton kernels compute, unused rows of tiles included.

        Args:
            direction: "forward", "backward_dq", "backward_dkdv", or "backward": the mean of the last two, weighted by
                their three and four matrix products.
            arch: 80, 90, 100 or 120, as in sm_80; itemsize: bytes of a number.
        """
        if direction == "backward":
            dq, dkdv = (
                self.visited_area(kernel, head_dim=head_dim, arch=arch, itemsize=itemsize)
                for kernel in ("backward_dq", "backward_dkdv")
            )
            return (3 * dq + 4 * dkdv) // 7
        walks = self.walks(direction, head_dim=head_dim, arch=arch, itemsize=itemsize)
        return sum(walk.config.block * (walk.whole + walk.edge) for walk in walks)

    def walks(self, kernel: str, *, head_dim: int, arch: int | str, itemsize: int = 2) -> list[Walk]:
        """What the programs of one head walk, for tall tiles and for short ones: the kernel's own arithmetic."""
        if kernel not in KERNELS:
            raise ValueError(f'direction must be "backward" or one of {", ".join(KERNELS)}, got {kernel!r}')
        by_keys = kernel == "backward_dkdv"
        names = ("query_start", "query_end", "key_tiles") if by_keys else ("key_start", "key_end", "query_tiles")
        low, high, tiles = (getattr(self, name).cpu().numpy().astype(np.int64) for name in names)
        talls, shorts = self.tile_counts.tolist()[2:4] if by_keys else self.tile_counts.tolist()[:2]
        families = zip(TILE_HEIGHTS, (tiles[:talls], tiles[talls : talls + shorts]), strict=True)
        return [
            _walk(tiles, low, high, by_keys, config(kernel, arch, head_dim, itemsize, height))
            for height, tiles in families
        ]

    def key_ends(self) -> np.ndarray:
        """`key_end` computed anew on the CPU, int32 [T]: plans read it here, as the tensor may be on a busy device."""
        return _key_ends(int(self.document_offsets[-1]), self.total_length, self.image_spans.numpy())

    def plan(self, build: Callable[[AttentionLayout], Plan]) -> Plan:
        """What `build` makes of this layout, made once and kept with it: a backend's work list for all layers."""
        if build not in self._plans:
            self._plans[build] = build(self)
        return self._plans[build]

    def dense_mask(self) -> Tensor:
        """The definition by brute force, bool [T, T], True where query (row) sees key (column); for tests only."""
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
        """The same layout with its intervals on `device`."""
        if torch.device(device) == self.device:
            return self
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=non_blocking) for n in _ON_DEVICE})

    def pin_memory(self) -> AttentionLayout:
        """The same layout in page-locked memory, from which copies to a GPU overlap with compute."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in _ON_DEVICE})


_ON_DEVICE = ("key_start", "key_end", "query_start", "query_end", "query_tiles", "key_tiles")


def _integers(name: str, values: Any, empty: tuple[int, ...]) -> np.ndarray:
    """int64 of the shape of `empty`, whose first side is free."""
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
    """int64 [sum of lengths]: the positions that the spans, rows (start, length), cover, in their order."""
    starts, lengths = spans[:, 0], spans[:, 1]
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _tiles(offsets: np.ndarray, low: np.ndarray, high: np.ndarray, total: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The tiles of all documents, int64 [capacity, 2], and how many of them are tall and short.

    `low` and `high` are the ends of every position's interval, so that a tile [start, end) reaches from low[start] to
    high[end - 1].
    """
    short = TILE_HEIGHTS[1]
    lengths = np.diff(offsets)
    long = np.flatnonzero(lengths > short)
    tiles = np.concatenate([_tiles_of_long(offsets[long], offsets[long + 1], low, high), _shared_tiles(offsets)])
    starts, ends = tiles.T
    work = high[ends - 1] - low[starts] if len(tiles) else starts
    is_short = ends - starts <= short
    order = np.lexsort((-work, is_short))
    # Two tiles side by side hold more than `short` positions, or they would be one.
    table = np.zeros((2 * -(-total // short) + 2, 2), dtype=np.int64)
    table[: len(tiles)] = tiles[order]
    shorts = int(is_short.sum())
    return table, (len(tiles) - shorts, shorts)


def _tiles_of_long(starts: np.ndarray, ends: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """int64 [tiles, 2]: each document in tall tiles and one odd one, which stands where it makes less work.

    At the front of text, say: the rows behind it see more.
    """
    tall, short = TILE_HEIGHTS
    counts = -(-(ends - starts) // tall)
    first = np.cumsum(counts) - counts
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - first[document]

    odd_last = starts[document] + number * tall
    odd_last = np.stack([odd_last, np.minimum(odd_last + tall, ends[document])], axis=1)
    odd_first = ends[document] - (counts[document] - 1 - number) * tall
    odd_first = np.stack([np.maximum(odd_first - tall, starts[document]), odd_first], axis=1)

    def work(tiles: np.ndarray) -> np.ndarray:
        height = np.where(tiles[:, 1] - tiles[:, 0] <= short, short, tall)
        return np.add.reduceat(height * (high[tiles[:, 1] - 1] - low[tiles[:, 0]]), first)

    if not len(counts):
        return odd_last
    return np.where((work(odd_first) < work(odd_last))[document, None], odd_first, odd_last)


def _shared_tiles(offsets: np.ndarray) -> np.ndarray:
    """int64 [tiles, 2]: documents that fit into a short tile, as many neighbours in one as fit."""
    short = TILE_HEIGHTS[1]
    # A longer document fits with nothing, so a tile never reaches over it.
    following = np.searchsorted(offsets, offsets[:-1] + short, side="right") - 1
    following, document, groups = following.tolist(), 0, []
    while document < len(following):
        if following[document] > document:
            groups.append((document, following[document]))
        document = max(following[document], document + 1)
    return offsets[np.array(groups, dtype=np.int64).reshape(-1, 2)]


def _walk(tiles: np.ndarray, low: np.ndarray, high: np.ndarray, by_keys: bool, c: Config) -> Walk:
    starts, ends = tiles.T
    pieces = -(-(ends - starts) // c.block)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + number * c.block
    ends = np.minimum(starts + c.block, np.repeat(ends, pieces))
    first, last = low[starts], high[ends - 1]
    if by_keys:
        whole = last - np.where(high[starts] == last, low[ends - 1], last)
    else:
        whole = np.where(low[ends - 1] == first, high[starts], first) - first
    whole = whole // c.step * c.step
    edge = -(-(last - first - whole) // c.edge_step) * c.edge_step
    return Walk(c, len(starts), int(whole.sum()), int(edge.sum()))


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
