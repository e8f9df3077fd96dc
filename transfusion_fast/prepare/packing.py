"""Documents into bins of one capacity, by two rules.

Best-fit decreasing looks at all documents: what is scarce, those that fill the gap beside a long one, goes where it is
needed. But of lengths that lie close together, as those of captioned images do, it makes bins with gaps for which no
document is short enough: 3.4 % of 4,096 positions where captions of some fifteen tokens go with 256 patches. There the
documents that come next, some dozens of them, nearly always hold a subset that fills a bin to the last position. So all
bins that best-fit decreasing leaves with room are taken apart and filled like that, if it makes fewer of them.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.errors import InputError

_SMALL = 16  # a document of at most 1/16 of the capacity is small
_ALIKE = 32  # lengths within 1/32 of the capacity are about one
FULL = 1000
"""A bin with at most 1/1000 of its capacity left is full."""
_OPEN, _BEYOND = 128, 64  # of a bin's documents the last so many may be others, of so many that come after them


def pack_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of document numbers, none above `capacity`, and few of them: a pure function of the arguments.

    Raises:
        InputError: naming the first document that no bin can hold.
    """
    bins = best_fit_decreasing(lengths, capacity)
    full: list[list[int]] = []
    loose: list[list[int]] = []
    for members in bins:
        room = capacity - sum(lengths[document] for document in members)
        (full if room <= capacity // FULL else loose).append(members)
    documents = sorted(document for members in loose for document in members)
    if len(loose) <= _least_bins([lengths[document] for document in documents], capacity):
        return bins
    anew = subset_fit(documents, lengths, capacity)
    return full + anew if len(anew) < len(loose) else bins


def _least_bins(lengths: Sequence[int], capacity: int) -> int:
    """No rule makes fewer: of documents longer than half a bin each has its own."""
    return max(-(-sum(lengths) // capacity), sum(2 * length > capacity for length in lengths))


def check_lengths(lengths: Sequence[int], capacity: int) -> None:
    """InputError naming the first document that no pack of `capacity` positions can hold."""
    for document, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise InputError(
                f"length of document {document} must be in 1..{capacity} (the sequence length), got {length}; "
                "give a larger sequence length or a shorter document"
            )


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of document numbers, none above `capacity`: the longest first, each into the fullest bin that takes it.

    Documents of about one length, and all small ones, keep their given order: they fill gaps as well in any, and sorted
    to the last position they would make bins of a single length, of captions of a few classes say. Deterministic, and
    about a microsecond a document.
    """
    check_lengths(lengths, capacity)
    small, about = capacity // _SMALL, max(1, capacity // _ALIKE)
    keys = [0 if length <= small else 1 + length // about for length in lengths]
    bins: list[list[int]] = []
    rooms: list[int] = []  # of bins that have some left, ascending, each once
    bins_with: dict[int, list[int]] = {}
    for document in sorted(range(len(lengths)), key=keys.__getitem__, reverse=True):
        length = lengths[document]
        least = bisect.bisect_left(rooms, length)
        if least < len(rooms):
            room = rooms[least]
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[least], bins_with[room]
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(document)
        if left := room - length:
            if left not in bins_with:
                bins_with[left] = []
                bisect.insort(rooms, left)
            bins_with[left].append(chosen)
    return bins


def subset_fit(documents: Iterable[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of these documents in their order, each as full as a choice among those that come next makes it.

    The first that is left is always in the next bin, and earlier ones are preferred: none waits for ever.
    """
    waiting, bins = deque(documents), []
    while waiting:
        bins.append(_next_bin(waiting, lengths, capacity))
    return bins


def _next_bin(waiting: deque[int], lengths: Sequence[int], capacity: int) -> list[int]:
    """Takes the documents of a bin from those waiting."""
    in_a_row = _number_that_fit(waiting, lengths, capacity)
    seen = [waiting.popleft() for _ in range(min(in_a_row + _BEYOND, len(waiting)))]
    settled = max(1, in_a_row - _OPEN)
    members, others = seen[:settled], seen[settled:]
    room = capacity - sum(lengths[document] for document in members)
    chosen = set(fullest_subset([lengths[document] for document in others], room))
    waiting.extendleft(d for place, d in reversed([*enumerate(others)]) if place not in chosen)
    return members + [document for place, document in enumerate(others) if place in chosen]


def _number_that_fit(documents: Iterable[int], lengths: Sequence[int], capacity: int) -> int:
    number = 0
    for document in documents:
        capacity -= lengths[document]
        if capacity < 0:
            break
        number += 1
    return number


def fullest_subset(lengths: Sequence[int], room: int) -> list[int]:
    """Places of those lengths whose sum comes nearest to `room` from below; earlier ones where there is a choice.

    Bit s of `reached[i]` says that some of the first i lengths sum to s, so that a length more is a shift: half a
    microsecond for each at thousands of positions.
    """
    reached, within = [1], (1 << room + 1) - 1
    for length in lengths:
        if reached[-1] >> room:
            break
        reached.append(reached[-1] | reached[-1] << length & within)
    total, places = reached[-1].bit_length() - 1, []
    for place in range(len(reached) - 2, -1, -1):
        if not reached[place] >> total & 1:
            places.append(place)
            total -= lengths[place]
    return places[::-1]


BUFFER = 1 << 16  # documents
_DOCUMENT_STREAM, _PACK_STREAM = 0, 1


def pack_stream(lengths: Iterable[np.ndarray], capacity: int, seed: int, buffer: int = BUFFER) -> Iterator[np.ndarray]:
    """Packs of documents, numbered in the order in which they come: a pure function of the arguments.

    Args:
        lengths: positions that documents take, int [n] each, 1..capacity; how they are cut into arrays is of no matter.

    Yields:
        The documents of each pack, int64. Within a buffer documents are shuffled before packing, so that packs mix
        those of one length, and packs after it, since best-fit decreasing makes neighbours alike.
    """
    waiting, first = np.empty((0, 2), dtype=np.int64), 0  # (document, length)
    rounds = 0
    for part in (piece for array in lengths for piece in np.split(array, range(buffer, len(array), buffer))):
        numbers = np.arange(first, first + len(part))
        waiting = np.concatenate([waiting, np.stack([numbers, np.asarray(part, dtype=np.int64)], axis=1)])
        first += len(part)
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
    """(packs to write, documents to keep for the next buffer: at most half)."""
    seed, rounds = key
    documents = documents[keyed_permutation(len(documents), seed, _DOCUMENT_STREAM + 2 * rounds)]
    number, length = documents.T
    bins = [np.array(chosen) for chosen in pack_bins(length.tolist(), capacity)]
    room = capacity - np.array([length[chosen].sum() for chosen in bins])
    by_room = np.argsort(room, kind="stable")
    full = len(bins) if last else int(np.count_nonzero(room <= capacity // FULL))
    counts = np.cumsum([len(bins[i]) for i in by_room])
    full = max(full, int(np.searchsorted(counts, (len(documents) + 1) // 2)) + 1)
    ready, kept = np.sort(by_room[:full]), np.sort(by_room[full:])
    order = keyed_permutation(len(ready), seed, _PACK_STREAM + 2 * rounds)
    left = np.concatenate([np.empty(0, np.int64), *(bins[i] for i in kept)])
    return [number[bins[i]] for i in ready[order]], documents[left]
