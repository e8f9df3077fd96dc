"""Packs for documents that come in a stream: bins of a bounded buffer of them at a time.

What does not fill a pack waits for the next buffer, where shorter documents may. So memory is that of a buffer's
numbers, and hardly more is wasted than if all documents were packed at once: where one buffer is like another, which is
for those to see to who put the documents in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from transfusion_fast.data.bins import FULL, pack_bins
from transfusion_fast.data.order import keyed_permutation

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
