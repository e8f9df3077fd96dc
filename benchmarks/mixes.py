"""Packs of documents to measure attention on: six mixes, and packs of a given mean length of documents.

    pairs        a caption and an image of 256 patches, a few with the image first
    text         documents of 30 to 1,600 tokens, log-normal
    mixed        58 % pairs, the rest text
    interleaved  documents of two to four images of 256, 576 or 1024 patches, with text between them
    tiny         five to eight tokens, an image of 16 patches, two tokens
    long         one document over 95 to 99 % of the length: images, each after some text

Bounds and comparisons use the fixed samples of 16,384 positions in mixes.json; the generator makes packs of the same
kind at any length.

Beside the mixes, mean32, mean64, ..., mean4096 are packs whose documents have that mean length; they have no fixed
samples. Lengths are log-normal, scaled to fill the pack: with sigma 0.6, the middle 60 % lie between 0.6 and 1.7 times
the median. Half of the documents, chosen at random, are text alone. The others hold an image between two runs of text:
the largest square number of patches, up to 1,024, that fits into half of the document. Where several images of 1,024
patches fit, there are several, with text between them.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from math import isqrt
from pathlib import Path

import numpy as np

from transfusion_fast.kernels.layout import AttentionLayout

NAMES = ("pairs", "text", "mixed", "interleaved", "tiny", "long")
BY_MEAN = {f"mean{2**power}": 2**power for power in range(5, 13)}
ALL_NAMES = (*NAMES, *BY_MEAN)
FIXED_LENGTH = 16384

_FIXED = Path(__file__).with_name("mixes.json")
_MARKERS = 2  # special tokens: <bos> and <boi> before a first image, <eoi> and <eos> after a last one
_PAIR_SHARE = 0.58
_CAPTION_FIRST_SHARE = 0.84
_IMAGE_SIZES, _IMAGE_SHARES = (256, 576, 1024), (0.1, 0.25, 0.65)
_SIGMA = 0.6  # of the logarithm of the lengths around a mean


# A document is a list of (length, is_image): runs of text, and images.
Document = list[tuple[int, bool]]


def generate(name: str, total_length: int, seed: int = 0) -> tuple[list[int], list[tuple[int, int]]]:
    """Return a pack of the mix `name`: the lengths of its documents and its image spans, absolute (start, length).

    Where the next document does not fit, the pack ends with a part of it that keeps an image, or with text; the mixes
    without text leave less than one document of padding. Packs of a mean length have none.
    """
    rng = np.random.default_rng([ALL_NAMES.index(name), total_length, seed])
    mean = BY_MEAN.get(name)
    documents = _by_mean(mean, total_length, rng) if mean else list(_fill(name, total_length, rng))
    segments = [segment for document in documents for segment in document]
    starts = np.cumsum([0, *(length for length, _ in segments)]).tolist()
    spans = [(start, length) for start, (length, is_image) in zip(starts, segments, strict=False) if is_image]
    return [_length(document) for document in documents if document], spans


def sample(name: str, total_length: int) -> AttentionLayout:
    """Return the layout to measure on, on the CPU: the fixed sample at its length, a generated pack at any other."""
    if total_length == FIXED_LENGTH and name in NAMES:
        return AttentionLayout.from_spans(**json.loads(_FIXED.read_text(encoding="utf-8"))[name])
    return AttentionLayout.from_spans(*generate(name, total_length), total_length)


def segments(layout: AttentionLayout) -> list[tuple[int, int, int, bool]]:
    """Return (start, end, document start, is image) of every run of text and every image."""
    document_start, spans = layout.key_start.tolist(), layout.image_spans
    images = set(spans[:, 0].tolist())
    cuts = sorted({*layout.document_offsets.tolist(), *images, *spans.sum(dim=1).tolist()})
    return [(start, end, document_start[start], start in images) for start, end in pairwise(cuts)]


def flex_visited_area(layout: AttentionLayout, block: int = 128) -> int:
    """Return the pairs that FlexAttention computes: all those in block x block squares with a visible pair."""
    key_start, key_end = (x.cpu().numpy().astype(np.int64) for x in (layout.key_start, layout.key_end))
    rows = np.flatnonzero(key_end > key_start)
    if not len(rows):
        return 0
    # All rows of blocks are laid on one line, so that their unions of intervals are one union on the line.
    blocks = -(-layout.total_length // block)
    offset = rows // block * blocks
    first, last = offset + key_start[rows] // block, offset + -(-key_end[rows] // block)
    order = np.argsort(first, kind="stable")
    first, last = first[order], last[order]
    covered = np.concatenate([[0], np.maximum.accumulate(last)[:-1]])
    return int(np.maximum(last - np.maximum(first, covered), 0).sum()) * block * block


def _fill(name: str, total_length: int, rng: np.random.Generator) -> Iterator[Document]:
    remaining = total_length
    for document in _documents(name, total_length, rng):
        fitting = document if _length(document) <= remaining else _last_document(name, document, remaining)
        yield fitting
        remaining -= _length(fitting)
        if fitting is not document or not remaining:
            break


def _by_mean(mean: int, total_length: int, rng: np.random.Generator) -> list[Document]:
    """Return documents that fill the pack exactly, as many as have a mean length closest to `mean`."""
    count = max(round(total_length / mean), 1)
    weights = rng.lognormal(sigma=_SIGMA, size=count)
    # Every document gets one token, and the rest is shared out. Rounding its running sum keeps the total.
    ends = np.rint((total_length - count) * weights.cumsum() / weights.sum()).astype(int) + np.arange(1, count + 1)
    illustrated = rng.permutation(count) % 2 == 0
    lengths = np.diff(ends, prepend=0).tolist()
    return [_illustrated(n) if images else [(n, False)] for n, images in zip(lengths, illustrated, strict=True)]


def _illustrated(length: int) -> Document:
    half = length // 2
    if not half:
        return [(length, False)]
    patches, images = min(isqrt(half), 32) ** 2, max(half // 1024, 1)
    # As many runs of text as images, and one behind them; the first ones are the longer ones.
    text = length - images * patches
    runs = [text // (images + 1) + (i < text % (images + 1)) for i in range(images + 1)]
    document = [segment for run in runs[:-1] for segment in ((run, False), (patches, True))]
    return [*document, (runs[-1], False)]


def _documents(name: str, total_length: int, rng: np.random.Generator) -> Iterator[Document]:
    while name != "long":
        if name == "pairs" or (name == "mixed" and rng.random() < _PAIR_SHARE):
            yield _pair(rng)
        elif name == "interleaved":
            yield _interleaved(rng)
        elif name == "tiny":
            yield [(int(rng.integers(5, 9)), False), (16, True), (_MARKERS, False)]
        else:
            yield [(_text_length(rng), False)]
    yield _long(total_length, rng)


def _pair(rng: np.random.Generator) -> Document:
    caption = (int(np.clip(rng.lognormal(np.log(33), 0.55), 8, 140)), False)
    document = [caption, (256, True), (_MARKERS, False)]
    return document if rng.random() < _CAPTION_FIRST_SHARE else document[::-1]


def _interleaved(rng: np.random.Generator) -> Document:
    document = []
    for patches in rng.choice(_IMAGE_SIZES, size=rng.integers(2, 5), p=_IMAGE_SHARES):
        document += [(int(rng.integers(50, 400)), False), (int(patches), True)]
    return [*document, (int(rng.integers(4, 100)), False)]


def _long(total_length: int, rng: np.random.Generator) -> Document:
    """Return images of the largest size of which several fit, each after text of 0.6 to 0.85 times its length."""
    patches = max((size for size in _IMAGE_SIZES if 8 * size <= total_length), default=_IMAGE_SIZES[0])
    left = max(int(total_length * rng.uniform(0.955, 0.99)), 1)
    document: Document = []
    while (text := int(patches * rng.uniform(0.6, 0.85))) + patches < left:
        document += [(text, False), (patches, True)]
        left -= text + patches
    return [*document, (left, False)]


def _text_length(rng: np.random.Generator) -> int:
    """Draw a log-normal length; lengths outside of 30 to 1600 are drawn again."""
    while True:
        length = int(rng.lognormal(6.1, 1.25))
        if 30 <= length <= 1600:
            return length


def _last_document(name: str, document: Document, remaining: int) -> Document:
    """Return what fills the remaining positions in place of a longer document."""
    if name in ("pairs", "tiny"):
        return []
    kept: Document = []
    while _length(kept) + document[len(kept)][0] <= remaining:
        kept.append(document[len(kept)])
    if not any(is_image for _, is_image in kept):
        return [(remaining, False)]
    left = remaining - _length(kept)
    return [*kept, (left, False)] if left else kept


def _length(document: Document) -> int:
    return sum(length for length, _ in document)
