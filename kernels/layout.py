"""The attention mask of a packed sequence as two intervals a position, and the tiles that the kernels work on.

A packed sequence holds documents, and a document holds text and images. Attention is causal within a document and
bidirectional within an image (Transfusion, arXiv 2408.11039, section 3.2). So the keys that a query sees form one
interval, and so do the queries that see a key:

    query i sees the keys           [key_start(i), key_end(i))      = [document_start, image_end or i + 1)
    key j is seen by the queries    [query_start(j), query_end(j))  = [image_start or j, document_end)

A padding position sees nothing and is seen by nothing: both of its intervals are empty.

A document may end with noised copies of its images. The rest of it is its context, which sees no copy. A copy at
`place` sees the context before that position and itself, in both directions. So there is a second interval a position:

    query i also sees the keys          [own_start(i), own_end(i))          = its copy; empty for the context
    key j is also seen by the queries   [copies_start(j), copies_end(j))    = the copies whose place is behind it,
                                                                              or its copy

The first interval of a copy is [document_start, place) as a query and empty as a key, and that of a key of the context
ends with the context. Copies stand in the order of their places, so that those which see a key are neighbours.

The layout also cuts the sequence into tiles of consecutive positions, once for all layers and heads: tall tiles of up
to 128 positions and short tiles of up to 64. Tiles start and end with documents, which wastes less work than a fixed
grid, and short documents share a tile. Both ends of the intervals ascend with the position, so the first and the last
row bound what a whole tile sees, and a kernel needs only the start and the end of its tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.kernels.attention_configs import Config, config
from transfusion_fast.kernels.spans import (
    Interval,
    check_copies,
    check_documents,
    check_images,
    context_ends,
    documents_of,
    integers,
    intervals_of_keys,
    intervals_of_queries,
)
from transfusion_fast.kernels.tiles import TILE_HEIGHTS, cut_tiles


class TileWork(NamedTuple):
    """The work of one head over the tiles of one height: programs, and the columns that all of them visit together.

    A program visits its columns in full blocks, whose pairs are all visible, and then in partial blocks, whose pairs
    are compared with the mask.
    """

    config: Config
    programs: int
    full: int
    partial: int


class Programs(NamedTuple):
    """The programs of one head over the tiles of one height in the order of their launch, as int64 [programs]."""

    config: Config
    starts: np.ndarray  # own rows, [starts, ends)
    ends: np.ndarray
    columns: list[Interval]  # of the other side: one interval, or with copies two
    full: np.ndarray  # columns in full and in partial blocks
    partial: np.ndarray


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """The attention mask of one packed sequence of T positions, as O(T) integers.

    The intervals and tiles live on the device of the attention inputs. `document_offsets`, `image_spans`,
    `noised_copies` and `tile_counts` stay on the CPU, so that planning and launching work does not wait for the device.

    Attributes:
        key_start, key_end: int32 [T], the interval of keys that each query sees.
        query_start, query_end: int32 [T], the interval of queries that see each key.
        document_offsets: int64 [documents + 1] on the CPU; document d is [offsets[d], offsets[d + 1]).
        image_spans: int64 [images, 2] on the CPU, rows (start, length) in ascending order.
        noised_copies: int64 [copies, 3] on the CPU, rows (start, length, place) in ascending order.
        query_tiles, key_tiles: int32 [capacity, 2], rows (start, end): tiles of queries for the forward pass and dQ,
            tiles of keys for dK and dV. All tall tiles, then all short tiles, both in launch order, then zeros.
            The capacity depends on T alone and on whether there are copies, so that batches have one shape.
        tile_counts: int64 [5] on the CPU: the numbers of tall and short query tiles, of tall and short key tiles, and
            of positions in documents.
        own_start, own_end: int32 [T], the second interval of keys that each query sees: its copy. None without copies.
        copies_start, copies_end: int32 [T], the second interval of queries that see each key: those in copies. None
            without copies.
    """

    key_start: Tensor
    key_end: Tensor
    query_start: Tensor
    query_end: Tensor
    document_offsets: Tensor
    image_spans: Tensor
    noised_copies: Tensor
    query_tiles: Tensor
    key_tiles: Tensor
    tile_counts: Tensor
    own_start: Tensor | None = None
    own_end: Tensor | None = None
    copies_start: Tensor | None = None
    copies_end: Tensor | None = None

    @classmethod
    def from_spans(
        cls,
        document_lengths: Sequence[int] | np.ndarray,
        image_spans: Sequence[tuple[int, int]] | np.ndarray,
        total_length: int | None = None,
        device: torch.device | str = "cpu",
        noised_copies: Sequence[tuple[int, int, int]] | np.ndarray = (),
    ) -> AttentionLayout:
        """Build the layout of consecutive documents in O(T) time and memory.

        Args:
            document_lengths: Number of positions of each document; the first document starts at position 0.
            image_spans: Absolute (start, length) of each image, each inside one document, in any order.
            total_length: T, at least the sum of the document lengths; the rest is padding. Default: no padding.
            device: Device of the intervals and tiles.
            noised_copies: Absolute (start, length, place) of each copy: it sees the context of its document before
                `place`, and itself. Copies end their document one behind the other, in the order of their places, of
                which several can be equal. A place is in the context or at its end, but not inside an image.

        Raises:
            ValueError: A document, span or copy is empty, negative, outside of its document, or overlaps another; or a
                copy is not in its order, or has a place that is not in its context.
        """
        lengths = integers("document_lengths", document_lengths, 1)
        images = integers("image_spans", image_spans, 2)
        images = images[np.argsort(images[:, 0], kind="stable")]
        copies = integers("noised_copies", noised_copies, 3)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        total = int(offsets[-1]) if total_length is None else int(total_length)
        check_documents(lengths, total)
        check_images(images, offsets)
        check_copies(copies, images, offsets)

        of_queries = intervals_of_queries(offsets, images, copies, total)
        of_keys = intervals_of_keys(offsets, images, copies, total)
        query_tiles, query_counts = cut_tiles(offsets, of_queries, total, copies)
        key_tiles, key_counts = cut_tiles(offsets, of_keys, total, copies)
        bounds = [bound for pair in zip(of_queries, of_keys, strict=True) for interval in pair for bound in interval]
        layout = cls(
            **dict(zip(_INTERVALS, map(torch.from_numpy, bounds), strict=False)),
            document_offsets=torch.from_numpy(offsets),
            image_spans=torch.from_numpy(images),
            noised_copies=torch.from_numpy(copies),
            query_tiles=torch.from_numpy(query_tiles),
            key_tiles=torch.from_numpy(key_tiles),
            tile_counts=torch.tensor([*query_counts, *key_counts, offsets[-1]], device="cpu"),
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
        """Number of visible (query, key) pairs.

        This is the sum of L(L+1)/2 over contexts, of n(n-1)/2 over images, and of n(m+n) over copies, where m is the
        number of positions that a copy sees of its context.
        """
        offsets, images, copies = (x.numpy() for x in (self.document_offsets, self.image_spans, self.noised_copies))
        lengths, patches = context_ends(offsets, copies) - offsets[:-1], images[:, 1]
        seen = copies[:, 2] - offsets[documents_of(copies[:, 0], offsets)]
        in_contexts = (lengths * (lengths + 1)).sum() + (patches * (patches - 1)).sum()
        return int(in_contexts // 2 + (copies[:, 1] * (seen + copies[:, 1])).sum())

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
        return [
            TileWork(p.config, len(p.starts), int(p.full.sum()), int(p.partial.sum()))
            for p in self.programs(kernel, head_dim=head_dim, arch=arch, itemsize=itemsize)
        ]

    def programs(self, kernel: str, *, head_dim: int, arch: int | str, itemsize: int = 2) -> list[Programs]:
        """Return the programs of one head, of the tall tiles and of the short tiles; see `tile_work`."""
        by_keys = kernel == "backward_dkdv"
        tiles = (self.key_tiles if by_keys else self.query_tiles).cpu().numpy().astype(np.int64)
        names = _INTERVALS[2:4] + _INTERVALS[6:] if by_keys else _INTERVALS[:2] + _INTERVALS[4:6]
        bounds = [x.cpu().numpy().astype(np.int64) for name in names if (x := getattr(self, name)) is not None]
        tall, short = self.tile_counts.tolist()[2:4] if by_keys else self.tile_counts.tolist()[:2]
        found = []
        for height, own in zip(TILE_HEIGHTS, (tiles[:tall], tiles[tall : tall + short]), strict=True):
            c = config(kernel, arch, head_dim, itemsize, height)
            starts, ends = own.T
            parts = -(-(ends - starts) // c.block)  # programs that share a tile
            number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
            starts = np.repeat(starts, parts) + number * c.block
            ends = np.minimum(starts + c.block, np.repeat(ends, parts))
            full, partial, columns = np.zeros_like(starts), np.zeros_like(starts), []
            for low, high in zip(bounds[::2], bounds[1::2], strict=True):
                columns.append((low[starts], high[ends - 1]))
                common = np.maximum(high[starts] - low[ends - 1], 0)  # columns that all rows of a program see
                in_full = common // c.step * c.step
                blocks = -(-(high[ends - 1] - low[starts] - in_full) // c.partial_step)
                full, partial = full + in_full, partial + blocks * c.partial_step
            found.append(Programs(c, starts, ends, columns, full, partial))
        return found

    def dense_mask(self) -> Tensor:
        """Return the mask by its definition, bool [T, T], True where query (row) sees key (column), for tests only."""
        position = torch.arange(self.total_length)
        document = torch.bucketize(position, self.document_offsets, right=True)
        image = torch.zeros_like(position)
        for number, (start, length) in enumerate(self.image_spans.tolist(), start=1):
            image[start : start + length] = number
        copy, place = torch.zeros_like(position), position + 1
        for number, (start, length, before) in enumerate(self.noised_copies.tolist(), start=1):
            copy[start : start + length] = number
            place[start : start + length] = before
        same_document = document[:, None] == document[None, :]
        same_image = (image[:, None] == image[None, :]) & (image > 0)[:, None]
        real = position < self.document_offsets[-1]
        in_context = same_document & (copy == 0)[None, :] & ((position[None, :] < place[:, None]) | same_image)
        same_copy = (copy[:, None] == copy[None, :]) & (copy > 0)[:, None]
        visible = in_context | same_copy
        return (visible & real[:, None] & real[None, :]).to(self.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionLayout:
        """Return this layout with its intervals and tiles on `device`."""
        if torch.device(device) == self.device:
            return self
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AttentionLayout:
        """Return this layout in page-locked memory, from which copies to a GPU overlap with computation."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> AttentionLayout:
        names = (*_INTERVALS, "query_tiles", "key_tiles")
        moved: dict[str, Any] = {name: move(x) for name in names if (x := getattr(self, name)) is not None}
        return replace(self, **moved)


# Of a layout: first and second interval.
_INTERVALS = (
    "key_start", "key_end", "query_start", "query_end", "own_start", "own_end", "copies_start", "copies_end",
)  # fmt: skip
