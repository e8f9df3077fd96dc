"""The documents, images and noised copies of a packed sequence: the rules that they keep, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Interval = tuple[np.ndarray, np.ndarray]  # start and end for each position

# Entry of a list, by its number of integers.
_ENTRIES = {1: "integers", 2: "(start, length)", 3: "(start, length, place)"}


def integers(name: str, values: Any, size: int) -> np.ndarray:
    """Convert a list of integers (`size` 1) or of tuples of `size` integers to int64 [n] or [n, size]."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must have entries of one length: {error}") from error
    shape = (size,) if size > 1 else ()
    if not array.size:
        return np.zeros((0, *shape), dtype=np.int64)
    if array.dtype.kind not in "iu" or array.shape[1:] != shape:
        raise ValueError(f"{name} must be a list of {_ENTRIES[size]}, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def positions_of(spans: np.ndarray) -> np.ndarray:
    """Return the positions that the spans, rows (start, length, ..), cover in their order: int64 [sum of lengths]."""
    starts, lengths = spans[:, 0], spans[:, 1]
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def documents_of(positions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the number of the document that holds each position."""
    return np.searchsorted(offsets, positions, side="right") - 1


def context_ends(offsets: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Return where the context of each document ends: at its first noised copy, or else with the document."""
    ends = offsets[1:].copy()
    np.minimum.at(ends, documents_of(copies[:, 0], offsets), copies[:, 0])
    return ends


def check_documents(lengths: np.ndarray, total: int) -> None:
    """Raise ValueError if a document is empty or the documents are longer than the sequence."""
    if (lengths <= 0).any():
        number = int(np.flatnonzero(lengths <= 0)[0])
        raise ValueError(f"document_lengths[{number}] must be positive, got {lengths[number]}; drop empty documents")
    if total < lengths.sum():
        raise ValueError(f"total_length must be at least the documents' {lengths.sum()} positions, got {total}")


def check_images(images: np.ndarray, offsets: np.ndarray) -> None:
    """Raise ValueError, with the span and the rule, if an image is empty, leaves its document or overlaps another."""
    _check_inside("image span", images, offsets)
    overlap = images[1:, 0] < images[:-1].sum(axis=1)
    _reject(
        "image span", images[1:], overlap, "overlaps the image before it; every position belongs to at most one image"
    )


def check_copies(copies: np.ndarray, images: np.ndarray, offsets: np.ndarray) -> None:
    """Raise ValueError, with the copy and the rule, if a noised copy does not keep the order of `AttentionLayout`.

    The images are in ascending order and keep their own rules.
    """
    if not len(copies):
        return
    _check_inside("noised copy", copies, offsets)
    starts, ends, places = copies[:, 0], copies[:, 0] + copies[:, 1], copies[:, 2]
    document = documents_of(starts, offsets)

    def reject(bad: np.ndarray, rule: str) -> None:
        _reject("noised copy", copies[len(copies) - len(bad) :], bad, rule)

    reject(starts[1:] < starts[:-1], "must start behind the copy before it in the list; list copies by position")
    reject(starts[1:] < ends[:-1], "overlaps the copy before it; every position belongs to at most one copy")
    reject(starts < places, "stands before its place; copies stand behind the context of their document")
    context_end = context_ends(offsets, copies)[document]
    inside = (offsets[document] <= places) & (places <= context_end)
    reject(~inside, "must have a place in the context of its document, which ends at the document's first copy")
    same = document[1:] == document[:-1]
    reject(places[1:] < places[:-1], "must have no place before that of the copy before it; sort by place")
    expected_end = offsets[document + 1]
    expected_end[:-1] = np.where(same, starts[1:], expected_end[:-1])
    reject(ends != expected_end, "must end where the next copy begins, the last one with its document; leave no gap")

    def ends_of_images_before(positions: np.ndarray) -> np.ndarray:
        return np.append(0, images.sum(axis=1))[np.searchsorted(images[:, 0], positions)]

    inside_image = places < ends_of_images_before(places)
    reject(inside_image, "must not have its place inside an image, which attends to all of itself")
    overlap = starts < ends_of_images_before(ends)
    reject(overlap, "overlaps an image of the context; copies stand behind the context")


def _check_inside(kind: str, spans: np.ndarray, offsets: np.ndarray) -> None:
    starts, ends = spans[:, 0], spans[:, 0] + spans[:, 1]
    _reject(kind, spans, spans[:, 1] <= 0, "must have a positive length; drop empty ones")
    outside = (starts < 0) | (spans[:, 1] > offsets[-1] - starts)  # the sum of huge numbers would wrap around
    _reject(kind, spans, outside, f"must lie inside one document, got documents over [0, {offsets[-1]})")
    document_end = offsets[np.minimum(documents_of(starts, offsets) + 1, len(offsets) - 1)]
    _reject(kind, spans, ends > document_end, "must lie inside one document, but crosses a document's end")


def _reject(kind: str, spans: np.ndarray, bad: np.ndarray, rule: str) -> None:
    if bad.any():
        row = spans[np.flatnonzero(bad)[0]].tolist()
        values = ", ".join(f"{name}={value}" for name, value in zip(("start", "length", "place"), row, strict=False))
        raise ValueError(f"{kind} ({values}) {rule}")


def intervals_of_queries(offsets: np.ndarray, images: np.ndarray, copies: np.ndarray, total: int) -> list[Interval]:
    """Return the keys that each query sees: one interval, or with copies two."""
    key_start = np.arange(total, dtype=np.int32)
    key_start[: offsets[-1]] = np.repeat(offsets[:-1], np.diff(offsets))
    first = key_start, key_ends(offsets, images, copies, total)
    if not len(copies):
        return [first]
    lengths, copy = _segments(offsets, copies, total)
    return [first, (np.repeat(copy[0], lengths), np.repeat(copy[1], lengths))]


def key_ends(offsets: np.ndarray, images: np.ndarray, copies: np.ndarray, total: int) -> np.ndarray:
    """Return where the first interval of each query ends, int32 [total]."""
    key_end = np.arange(total, dtype=np.int32)
    key_end[: offsets[-1]] += 1
    key_end[positions_of(images)] = np.repeat(images.sum(axis=1), images[:, 1])
    if len(copies):
        lengths, copy = _segments(offsets, copies, total)
        np.copyto(key_end, np.repeat(copy[2], lengths), where=np.repeat(copy[1] > 0, lengths))
    return key_end


def intervals_of_keys(offsets: np.ndarray, images: np.ndarray, copies: np.ndarray, total: int) -> list[Interval]:
    """Return the queries that see each key: one interval, or with copies two."""
    query_start, query_end = np.arange(total, dtype=np.int32), np.arange(total, dtype=np.int32)
    contexts = context_ends(offsets, copies)
    query_end[: offsets[-1]] = np.repeat(contexts, np.diff(offsets))
    query_start[positions_of(images)] = np.repeat(images[:, 0], images[:, 1])
    first = query_start, query_end
    if not len(copies):
        return [first]
    # Which copies see a position changes only at places. They end their document.
    lengths, (start, end, _) = _segments(offsets, copies, total, copies[:, 2])
    np.copyto(query_start, query_end, where=np.repeat(end > 0, lengths))
    positions = np.cumsum(lengths) - lengths
    document = documents_of(positions, offsets)
    document_end = np.append(offsets[1:], total)[document]
    following = np.append(copies[:, 0], total)[np.searchsorted(copies[:, 2], positions, side="right")]
    # A document without copies has the same empty interval as its neighbours, with which it may share a tile. It stands
    # behind the first interval, so that the loops of the kernels, which end at its end, end behind both.
    last = np.append(np.where(contexts < offsets[1:], offsets[1:], total), total)[document]
    start = np.where(end > 0, start, np.where(following < document_end, following, last)).astype(np.int32)
    end = np.where(end > 0, end, last).astype(np.int32)
    return [first, (np.repeat(start, lengths), np.repeat(end, lengths))]


def _segments(
    offsets: np.ndarray, copies: np.ndarray, total: int, cuts: Sequence[int] | np.ndarray = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the sequence at documents, at copies and at `cuts`; return the lengths of the segments and their copies.

    A copy is a column (start, end, place) of an int32 [3, segments], zeros for a segment that is none.
    """
    bounds = np.unique(np.concatenate([offsets, copies[:, 0], [total], np.asarray(cuts, dtype=np.int64)]))
    copy = np.zeros((3, len(bounds) - 1), dtype=np.int32)
    copy[:, np.searchsorted(bounds, copies[:, 0])] = copies[:, 0], copies[:, :2].sum(axis=1), copies[:, 2]
    return np.diff(bounds), copy
