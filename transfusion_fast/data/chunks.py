"""Cuts texts that are longer than a pack, where a reader would pause.

A piece ends at the end of a paragraph, else of a line or a sentence, that is near the end of what fits: pieces fill
packs where nothing shorter is left to fill them with. Only where none of them is in the second half it ends at a word,
or in a run of letters longer than that between two of them. Nothing is dropped: the pieces are the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

_PAUSE = re.compile(r"(?P<stop>[.!?;:][\"')\]]*)?(?P<space>\s+)")
_PARAGRAPH, _LINE, _SENTENCE, _WORD = range(4)
_NEAR = (32, 8, 2)  # the last 32nd of what fits, else the last eighth or half


def piece_lengths(text: str, starts: np.ndarray, first: int, limit: int) -> Iterator[int]:
    """How many tokens each piece of a text takes.

    Args:
        starts: int64 [n], the character of `text` that each token begins with, ascending.
        first: tokens that the first piece may have, at least 1; the others have at most `limit`.
    """
    begin, room = 0, first
    places: list[np.ndarray] = []
    while len(starts) - begin > room:
        places = places or _places(text, starts)
        end = _piece_end(places, room, begin + room)
        yield end - begin
        begin, room = end, limit
    yield len(starts) - begin


def _piece_end(places: list[np.ndarray], room: int, most: int) -> int:
    *pauses, words, letters = places
    tried = [*((tokens, part) for part in _NEAR for tokens in pauses), (words, 2), (letters, 2)]
    found = (_last_in(tokens, most - room // part, most) for tokens, part in tried)
    return next((at for at in found if at is not None), most)


def blocks(text: str, size: int) -> Iterator[str]:
    """The text in parts of at most so many characters, which end where pieces would."""
    begin = 0
    while len(text) - begin > size:
        most = begin + size
        pauses = _PAUSE.finditer(text, begin + (size + 1) // 2, most)
        _, end = max(((-_kind(pause), _end(pause)) for pause in pauses), default=(0, most))
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _end(pause: re.Match[str]) -> int:
    """Between words of a line the space goes with the word behind it, as in most vocabularies."""
    return pause.end() if _kind(pause) in (_PARAGRAPH, _LINE) else pause.start("space")


def _places(text: str, starts: np.ndarray) -> list[np.ndarray]:
    """The tokens that a piece may begin with, ascending, from the best kind of place to the worst."""
    pauses = [(_kind(m), m.start("space"), m.end()) for m in _PAUSE.finditer(text)]
    kind, space, end = np.array(pauses, dtype=np.int64).reshape(-1, 3).T
    behind = np.searchsorted(starts, end)
    begins_there = starts[np.minimum(behind, len(starts) - 1)] == end
    # Most vocabularies put a space before its word, into one token.
    token = np.where(begins_there, behind, np.searchsorted(starts, space))
    between_letters = np.flatnonzero(np.diff(starts, prepend=-1))
    return [*(token[kind == k] for k in (_PARAGRAPH, _LINE, _SENTENCE, _WORD)), between_letters]


def _kind(pause: re.Match[str]) -> int:
    lines = pause["space"].count("\n")
    if lines:
        return _PARAGRAPH if lines > 1 else _LINE
    return _SENTENCE if pause["stop"] else _WORD


def _last_in(tokens: np.ndarray, low: int, high: int) -> int | None:
    """The largest of ascending numbers that is in [low, high]."""
    at = int(np.searchsorted(tokens, high, side="right")) - 1
    return int(tokens[at]) if at >= 0 and tokens[at] >= low else None
