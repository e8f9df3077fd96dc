"""The tiles that the attention kernels work on: how documents are cut, and the order in which tiles are launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from transfusion_fast.kernels.spans import Interval, documents_of

# Tall and short: two and one times 64 rows, which one matrix instruction of Hopper takes from a group of four warps.
TILE_HEIGHTS = (128, 64)
# Tiles at the end of the launch order, in units of the longest one there: at 16 heads they level the ends of 132
# multiprocessors. Tried with benchmarks/cache_sim.py.
LAST_TILES = 16


def cut_tiles(
    offsets: np.ndarray, intervals: Sequence[Interval], total: int, copies: np.ndarray
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the tiles of all documents, int32 [capacity, 2], and the numbers of tall and short tiles.

    A tile [start, end) sees [low[start], high[end - 1]) of each of the `intervals` (low, high).
    """
    short = TILE_HEIGHTS[1]
    cuts = np.union1d(offsets, copies[:, 0])  # contexts and copies are cut into tiles of their own
    lengths = np.diff(cuts)
    long = np.flatnonzero(lengths > short)

    def columns(tiles: np.ndarray) -> np.ndarray:
        return sum(high[tiles[:, 1] - 1] - low[tiles[:, 0]] for low, high in intervals) if len(tiles) else tiles[:, 0]

    shared = _shared_tiles(cuts, _barriers(offsets, copies))
    tiles = np.concatenate([_tiles_of_long(cuts[long], cuts[long + 1], columns), shared])
    if len(copies):
        tiles = _halve_at_places(tiles, intervals[1][0], columns(tiles))
    starts, ends = tiles.T
    is_short = ends - starts <= short
    work, document = columns(tiles), documents_of(starts, offsets)
    heights = np.flatnonzero(~is_short), np.flatnonzero(is_short)
    order = np.concatenate([own[_launch_order(work[own], document[own])] for own in heights])
    # A tall tile, and two neighbours of short documents, hold more than `short` positions; else they would be one tile.
    # Contexts and copies share no tile, so with copies a tile can hold a single position.
    table = np.zeros((total if len(copies) else 2 * (total // short) + 1, 2), dtype=np.int32)
    table[: len(tiles)] = tiles[order]
    shorts = int(is_short.sum())
    return table, (len(tiles) - shorts, shorts)


def _launch_order(work: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Return the order to start tiles of one height in, given the columns that each sees and the document it is in.

    A document's tiles stand together, because they load the same columns, and start with its longest one; documents
    with the longest tiles come first. Only the tiles at the end are in order of work alone, so that multiprocessors end
    together: those of the last documents, and the shortest ones of all, which load little, if all documents are long.
    """
    if not len(work):
        return work
    longest = np.zeros(document.max() + 1, dtype=np.int64)
    np.maximum.at(longest, document, work)
    group = longest[document] * len(longest) - document
    ascending = np.argsort(group, kind="stable")
    enough = np.cumsum(work[ascending]) >= LAST_TILES * longest[document[ascending]]
    enough[-1] = True
    is_last = group <= group[ascending[enough.argmax()]]
    ascending, least = np.argsort(work, kind="stable"), longest[document].min()
    is_last[ascending] |= (work[ascending] < least) & (np.cumsum(work[ascending]) <= LAST_TILES * least)
    return np.lexsort((-work, -np.where(is_last, 0, group)))


def _barriers(offsets: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Return the positions that no tile crosses: both ends of documents with copies, and where their copies begin."""
    document, first = np.unique(documents_of(copies[:, 0], offsets), return_index=True)
    return np.union1d(offsets[[document, document + 1]], copies[first, 0])


def _tiles_of_long(starts: np.ndarray, ends: np.ndarray, columns: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Cut each document into tall tiles and a remainder, int64 [tiles, 2]; `columns` counts what tiles see.

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
        return np.add.reduceat(height * columns(tiles), first)

    if not len(counts):
        return remainder_last
    return np.where((work(remainder_first) < work(remainder_last))[document, None], remainder_first, remainder_last)


def _halve_at_places(tiles: np.ndarray, copies_start: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cut tall tiles of keys in two where that saves an eighth of their work: fewer copies see the second half.

    In tiles of queries both halves see the same copy. What short tiles cost is not measured; an eighth should cover it.
    """
    starts, ends = tiles.T
    middles = starts + TILE_HEIGHTS[1]
    unseen = copies_start[np.minimum(middles, ends - 1)] - copies_start[starts]
    halved = (ends > middles) & (4 * unseen > columns)
    second = np.stack([middles, ends], axis=1)[halved]
    return np.concatenate([np.stack([starts, np.where(halved, middles, ends)], axis=1), second])


def _shared_tiles(offsets: np.ndarray, barriers: np.ndarray) -> np.ndarray:
    """Put as many neighbouring short documents into each short tile as fit between barriers, int64 [tiles, 2]."""
    short = TILE_HEIGHTS[1]
    limits = np.append(barriers, offsets[-1])
    limits = limits[np.searchsorted(limits, offsets[:-1], side="right")]
    # A longer document fits into no tile, so no tile extends beyond it.
    following = np.searchsorted(offsets, np.minimum(offsets[:-1] + short, limits), side="right") - 1
    following, document, groups = following.tolist(), 0, []
    while document < len(following):
        if following[document] > document:
            groups.append((document, following[document]))
        document = max(following[document], document + 1)
    return offsets[np.array(groups, dtype=np.int64).reshape(-1, 2)]
