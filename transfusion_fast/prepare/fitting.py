"""Texts in pieces that fit packs, cut where a reader would pause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import takewhile

import numpy as np

from transfusion_fast.data.pack import TextSegment
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import Rejected

_REPLACEMENT = "\ufffd"  # stands in decoded text for bytes that are no character
_BLOCK, _BLOCK_PACKS = 1 << 20, 64  # characters that are encoded together: at least, and per position of a pack
_PAUSE = re.compile(r"(?P<stop>[.!?;:][\"')\]]*)?(?P<space>\s+)")
_STOPS = ".!?;:\"')]"
_PARAGRAPH, _LINE, _SENTENCE, _WORD = range(4)  # kinds of pauses, from the best to the worst
_NEAR_END = (32, 8, 2)  # a pause is looked for in the last 32nd of what fits, then in the last eighth and the last half


def encode_in_pieces(tokenizer: Tokenizer, text: Iterable[str], free: int, capacity: int) -> Iterator[TextSegment]:
    """Yield the ids of a text in pieces of at most `capacity` ids; the first may go where `free` are left.

    A text that is far longer than a pack is encoded in blocks, as its ids take many times its memory.

    Args:
        text: the strings that together are the text.
    """
    for block in split_blocks(text, max(_BLOCK, _BLOCK_PACKS * capacity)):
        ids, starts = tokenizer.encode_with_starts(block)
        for piece in _cut(block, ids, starts, free, capacity):
            yield piece
            free = capacity


def cut_ids(tokenizer: Tokenizer, segment: TextSegment, free: int, capacity: int) -> list[TextSegment]:
    """Return a text that is encoded already in pieces of at most `capacity` ids; the first fits `free` ids.

    A text that must be cut is encoded again, perhaps to other ids of the same text. A text that holds part of a
    character, because an earlier cut fell inside it, has no such ids and is Rejected.
    """
    if len(segment.ids) <= first_limit(free, capacity):
        return [segment]
    text = tokenizer.decode(segment.ids)
    ids, starts = tokenizer.encode_with_starts(text)
    if not np.array_equal(ids, segment.ids) and (_REPLACEMENT in text or tokenizer.decode(ids) != text):
        raise Rejected("text cannot be cut", "encoded again it would be another; choose longer packs")
    return [replace(piece, weight=segment.weight) for piece in _cut(text, ids, starts, free, capacity)]


def _cut(text: str, ids: np.ndarray, starts: np.ndarray, free: int, capacity: int) -> list[TextSegment]:
    lengths = list(piece_lengths(text, starts, first_limit(free, capacity), capacity))
    return [TextSegment(piece) for piece in np.split(ids, np.cumsum(lengths)[:-1]) if len(piece)]


def first_limit(free: int, capacity: int) -> int:
    """Return how many ids the first piece may have: what is free in a pack if that is half of it, else all of one."""
    return free if 2 * free >= capacity else capacity


def piece_lengths(text: str, starts: np.ndarray, first: int, limit: int) -> Iterator[int]:
    """Yield how many tokens each piece of a text takes.

    Args:
        starts: int64 [n], the character of `text` at which each token begins, ascending.
        first: the most tokens of the first piece, at least 1; the others have at most `limit`.
    """
    begin, most = 0, first
    while len(starts) - begin > most:
        end = _best_cut(text, starts, begin, begin + most)
        yield end - begin
        begin, most = end, limit
    yield len(starts) - begin


def _best_cut(text: str, starts: np.ndarray, begin: int, end: int) -> int:
    """Return where to cut a piece of at most tokens [begin, end): at the best pause before its end, else at `end`."""
    for part in _NEAR_END:
        first = end - (end - begin) // part
        *pauses, words = _possible_cuts(text, starts, begin, first, end)
        for tokens in pauses:
            if tokens.size:
                return int(tokens[-1])
    letters = first + np.flatnonzero(np.diff(starts[first - 1 : end + 1]))
    return int(next((tokens[-1] for tokens in (words, letters) if tokens.size), end))


def _possible_cuts(text: str, starts: np.ndarray, begin: int, first: int, end: int) -> list[np.ndarray]:
    """Return the tokens of first..end with which a piece may begin, ascending, for each kind of pause.

    Args:
        begin: the first token of the piece that ends there, below `first`; no pause is followed back beyond it.
    """
    least, most = starts[[begin, end]].tolist()
    at = int(starts[first - 1])
    while at > least and (text[at - 1].isspace() or text[at - 1] in _STOPS):
        at -= 1  # perhaps a pause has begun already
    found = takewhile(lambda pause: pause.start("space") <= most, _PAUSE.finditer(text, at))
    pauses = [(_kind(pause), pause.start("space"), pause.end()) for pause in found]
    kind, space, behind = np.array(pauses, dtype=np.int64).reshape(-1, 3).T
    token = np.searchsorted(starts, behind)
    begins_there = starts[np.minimum(token, len(starts) - 1)] == behind
    # Most vocabularies put a space and the word behind it into one token.
    token = np.where(begins_there, token, np.searchsorted(starts, space))
    inside = (first <= token) & (token <= end)
    return [token[inside & (kind == k)] for k in range(4)]


def split_blocks(strings: Iterable[str], size: int) -> Iterator[str]:
    """Yield a text in blocks of at most `size` characters, which end at a good pause near their end.

    Args:
        strings: the text, however divided; no more of them than one block needs are in memory.
    """
    text, begin = "", 0
    for string in strings:
        text, begin = text[begin:] + string, 0
        while len(text) - begin > size:
            end = _block_end(text, begin, size)
            yield text[begin:end]
            begin = end
    yield text[begin:]


def _block_end(text: str, begin: int, size: int) -> int:
    most = begin + size
    for part in _NEAR_END:
        kind, end = _WORD, most
        for pause in _PAUSE.finditer(text, most - size // part, most):
            if (better := _kind(pause)) <= kind:
                # Within a line the space goes with the word behind it.
                kind, end = better, pause.end() if better in (_PARAGRAPH, _LINE) else pause.start("space")
        if kind < _WORD:
            break
    return end


def _kind(pause: re.Match[str]) -> int:
    if lines := pause["space"].count("\n"):
        return _PARAGRAPH if lines > 1 else _LINE
    return _SENTENCE if pause["stop"] else _WORD
