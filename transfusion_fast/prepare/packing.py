"""Packing of documents into bins of one capacity, by two rules.

Best-fit decreasing looks at all documents: short ones, which fill the gap beside a long one, go where they are needed.
But if lengths are close together, as those of captioned images, no document is short enough for the gaps that are left.
This wastes 3.4 % of 4,096 positions for captions of about fifteen tokens with 256 patches. In that case, the next few
dozen documents nearly always hold a subset that fills a bin to the last position. So all bins that best-fit decreasing
leaves partly empty are filled again by choosing subsets, if that makes fewer bins.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.data.pack import DOCUMENT_TOKENS, IMAGE_TOKENS, KIND_TEXT
from transfusion_fast.errors import InputError

FULL = 1000
"""A bin with at most 1/1000 of its capacity left is full."""
BUFFER = 1 << 16
"""Documents that are packed together by default."""
_SMALL = 16  # a document of at most 1/16 of the capacity is small
_CLASSES = 32  # lengths within 1/32 of the capacity count as one
_OPEN, _BEYOND = 128, 64  # the last 128 documents of a bin are chosen again, from themselves and the next 64
_DOCUMENT_STREAM, _PACK_STREAM = 0, 1


def document_lengths(document: np.ndarray, kind: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the positions, int64 [documents], that each document takes, from these columns of its segments."""
    return DOCUMENT_TOKENS + np.bincount(document, length + IMAGE_TOKENS * (kind != KIND_TEXT)).astype(np.int64)


def pack_stream(lengths: Iterable[np.ndarray], capacity: int, seed: int, buffer: int = BUFFER) -> Iterator[np.ndarray]:
    """Yield the documents of each pack, int64, numbered in the order in which they come.

    Args:
        lengths: positions that documents take, int [n] each, 1..capacity; the sizes of the arrays do not matter.
    """
    return pack_ids(_numbered(lengths), capacity, seed, buffer)


def _numbered(lengths: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    first = 0
    for array in lengths:
        yield np.stack([np.arange(first, first + len(array)), np.asarray(array, np.int64)], axis=1)
        first += len(array)


def pack_ids(documents: Iterable[np.ndarray], capacity: int, seed: int, buffer: int = BUFFER) -> Iterator[np.ndarray]:
    """Yield the ids, int64, of the documents of each pack.

    Within a buffer documents are shuffled before packing, so that packs mix lengths, and packs are shuffled after it,
    since best-fit decreasing makes similar packs one after another. The result is a pure function of the arguments.

    Args:
        documents: rows (id, length), int64 [n, 2] each; a length is the positions that a document takes, in
            1..capacity. The sizes of the arrays do not matter.
    """
    waiting = np.empty((0, 2), dtype=np.int64)
    rounds = 0
    for part in (piece for array in documents for piece in np.split(array, range(buffer, len(array), buffer))):
        waiting = np.concatenate([waiting, part])
        while len(waiting) >= buffer:
            packs, kept = _pack(waiting[:buffer], capacity, (seed, rounds), last=False)
            waiting = np.concatenate([kept, waiting[buffer:]])
            rounds += 1
            yield from packs
    if len(waiting):
        yield from _pack(waiting, capacity, (seed, rounds), last=True)[0]


def _pack(
    documents: np.ndarray, capacity: int, key: tuple[int, int], last: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return packs to write, and the documents to keep for the next buffer: at most half."""
    seed, rounds = key
    documents = documents[keyed_permutation(len(documents), seed, _DOCUMENT_STREAM + 2 * rounds)]
    number, length = documents.T
    bins = [np.array(chosen) for chosen in pack_bins(length.tolist(), capacity)]
    free = capacity - np.array([length[chosen].sum() for chosen in bins])
    by_free = np.argsort(free, kind="stable")
    full = len(bins) if last else int(np.count_nonzero(free <= capacity // FULL))
    counts = np.cumsum([len(bins[i]) for i in by_free])
    full = max(full, int(np.searchsorted(counts, (len(documents) + 1) // 2)) + 1)
    ready, kept = np.sort(by_free[:full]), np.sort(by_free[full:])
    order = keyed_permutation(len(ready), seed, _PACK_STREAM + 2 * rounds)
    left = np.concatenate([np.empty(0, np.int64), *(bins[i] for i in kept)])
    return [number[bins[i]] for i in ready[order]], documents[left]


def pack_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of document numbers, none above `capacity`, and few of them: a pure function of the arguments.

    Raises:
        InputError: a document that no bin can hold, by its number.
    """
    bins = best_fit_decreasing(lengths, capacity)
    full: list[list[int]] = []
    loose: list[list[int]] = []
    for members in bins:
        free = capacity - sum(lengths[document] for document in members)
        (full if free <= capacity // FULL else loose).append(members)
    documents = sorted(document for members in loose for document in members)
    left = [lengths[document] for document in documents]
    least = max(-(-sum(left) // capacity), sum(2 * length > capacity for length in left))
    if len(loose) <= least:
        return bins
    filled = subset_fit(documents, lengths, capacity)
    return full + filled if len(filled) < len(loose) else bins


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of document numbers, none above `capacity`: the longest first, each into the fullest bin it fits.

    Documents of about one length, and all small ones, keep their given order: they fill gaps as well in any order, and
    sorted exactly they would make bins of a single length, such as captions of a few classes. Deterministic, and about
    a microsecond a document. InputError as for `pack_bins`.
    """
    for document, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise InputError(
                f"length of document {document} must be in 1..{capacity} (the sequence length), got {length}; "
                "give a larger sequence length or a shorter document"
            )
    small, about = capacity // _SMALL, max(1, capacity // _CLASSES)
    keys = [0 if length <= small else 1 + length // about for length in lengths]
    bins: list[list[int]] = []
    gaps: list[int] = []  # the different numbers of free positions, ascending
    bins_with: dict[int, list[int]] = {}
    for document in sorted(range(len(lengths)), key=keys.__getitem__, reverse=True):
        length = lengths[document]
        least = bisect.bisect_left(gaps, length)
        if least < len(gaps):
            free = gaps[least]
            chosen = bins_with[free].pop()
            if not bins_with[free]:
                del gaps[least], bins_with[free]
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(document)
        if left := free - length:
            if left not in bins_with:
                bins_with[left] = []
                bisect.insort(gaps, left)
            bins_with[left].append(chosen)
    return bins


def subset_fit(documents: Iterable[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of these documents in their order, each as full as a choice among the next documents makes it.

    The first document that is left is always in the next bin, and earlier ones are preferred, so none waits forever.
    """
    waiting, bins = deque(documents), []
    while waiting:
        bins.append(_next_bin(waiting, lengths, capacity))
    return bins


def _next_bin(waiting: deque[int], lengths: Sequence[int], capacity: int) -> list[int]:
    """Take the documents of one bin from those waiting."""
    in_a_row, free = 0, capacity
    for document in waiting:
        free -= lengths[document]
        if free < 0:
            break
        in_a_row += 1
    seen = [waiting.popleft() for _ in range(min(in_a_row + _BEYOND, len(waiting)))]
    settled = max(1, in_a_row - _OPEN)
    members, others = seen[:settled], seen[settled:]
    free = capacity - sum(lengths[document] for document in members)
    chosen = set(fullest_subset([lengths[document] for document in others], free))
    waiting.extendleft(d for i, d in reversed([*enumerate(others)]) if i not in chosen)
    return members + [document for i, document in enumerate(others) if i in chosen]


def fullest_subset(lengths: Sequence[int], capacity: int) -> list[int]:
    """Return the indices of lengths whose sum is the largest up to `capacity`, earlier ones where there is a choice.

    Bit s of `reached[i]` says that some of the first i lengths sum to s, so that one more length is a shift: half a
    microsecond for each at thousands of positions.
    """
    reached, within = [1], (1 << capacity + 1) - 1
    for length in lengths:
        if reached[-1] >> capacity:
            break
        reached.append(reached[-1] | reached[-1] << length & within)
    total, indices = reached[-1].bit_length() - 1, []
    for i in range(len(reached) - 2, -1, -1):
        if not reached[i] >> total & 1:
            indices.append(i)
            total -= lengths[i]
    return indices[::-1]
