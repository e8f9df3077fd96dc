"""Documents in the room of a pack: a longer one is cut, its texts where a reader would pause, its images never."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from transfusion_fast.data.pack import (
    DOCUMENT_TOKENS,
    IMAGE_TOKENS,
    MAX_LENGTH,
    Document,
    ImageSegment,
    ModalityInfo,
    Segment,
    TextSegment,
    segment_length,
)
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError, Rejected

Long = Literal["split", "reject"]
"""What becomes of a document that is longer than a pack: several, or none."""

_Piece = TypeVar("_Piece")
_NO_TEXT = "\ufffd"  # what decoding puts where bytes are no character
_BLOCK, _BLOCK_PACKS = 1 << 20, 64  # characters that are encoded together, at least, and in positions of a pack


@dataclass(frozen=True)
class Fitting:
    """How documents come to fit packs of so many positions."""

    sequence_length: int
    modalities: tuple[ModalityInfo, ...]
    long: Long

    def __post_init__(self) -> None:
        if self.sequence_length < DOCUMENT_TOKENS + IMAGE_TOKENS + 1:
            raise InputError(f"sequence length must be at least 5, got {self.sequence_length}; give a larger one")
        if self.sequence_length > MAX_LENGTH:
            raise InputError(f"sequence length must be at most {MAX_LENGTH}, got {self.sequence_length}")

    @property
    def room(self) -> int:
        """Positions of a pack for a document's segments."""
        return self.sequence_length - DOCUMENT_TOKENS

    def documents(
        self, pieces: Iterable[_Piece], segments: Callable[[_Piece, int], Sequence[Segment]]
    ) -> list[Document]:
        """One document, or its parts; Rejected where none or, as `long` says, several would be left.

        `segments` makes segments of a piece, the first of which may find so many positions free.
        """
        parts: list[list[Segment]] = [[]]
        free = self.room
        for piece in pieces:
            for number, segment in enumerate(segments(piece, free)):
                length = self.length(segment)
                if number or length > free:
                    parts.append([])
                    free = self.room
                parts[-1].append(segment)
                free -= length
        documents = [tuple(part) for part in parts if part]
        if not documents:
            raise Rejected("empty document", "nothing is left of it")
        if len(documents) > 1 and self.long == "reject":
            raise Rejected("too long", f"it takes more than {self.sequence_length} positions")
        return documents

    def length(self, segment: Segment) -> int:
        """Positions that a segment takes; Rejected for an image that no pack has room for."""
        length = segment_length(segment, self.modalities)
        return length if isinstance(segment, TextSegment) else self.check_image(length)

    def check_image(self, patches: int) -> int:
        """Positions that an image takes; Rejected where no pack has room for them."""
        length = patches + IMAGE_TOKENS
        if length > self.room:
            raise Rejected("image too long", f"its {length} positions do not fit a pack")
        return length

    def first(self, free: int) -> int:
        """Ids that the first piece of a text may have: what is free of a pack if that is half of it, else a pack's."""
        return free if 2 * free >= self.room else self.room

    def texts(self, tokenizer: Tokenizer, text: str, free: int) -> list[TextSegment]:
        """A text in pieces that fit, as of `cut`.

        One that is far longer than a pack is encoded in blocks, as its ids take many times its memory.
        """
        pieces: list[TextSegment] = []
        for block in blocks(text, max(_BLOCK, _BLOCK_PACKS * self.room)):
            pieces += self.cut(block, *tokenizer.encode_with_starts(block), self.room if pieces else free)
        return pieces

    def cut(self, text: str, ids: np.ndarray, starts: np.ndarray, free: int) -> list[TextSegment]:
        """A text in pieces that fit, where so many positions of a pack are free.

        `ids` int32 [n] and `starts` int64 [n] are the text's, as `Tokenizer.encode_with_starts` gives them.
        """
        if not len(ids):
            return []
        ends = np.cumsum(list(piece_lengths(text, starts, self.first(free), self.room)))
        return [TextSegment(piece) for piece in np.split(ids, ends[:-1])]


@dataclass(frozen=True)
class EncodedDocument:
    """A document of token ids and values, and its place, for messages."""

    where: str
    segments: Document


@dataclass(frozen=True)
class Fitter:
    """What makes encoded documents fit packs; nothing is decoded or encoded but a text that is cut. Picklable.

    To be cut where a reader would pause, a text is encoded again, by ids that may not be those stored but give the same
    text. One that holds a part of a character, as where an earlier cut fell inside it, has no such ids and is rejected.
    """

    tokenizer: Tokenizer
    sequence_length: int
    modalities: tuple[ModalityInfo, ...]
    long: Long = "split"

    def __post_init__(self) -> None:
        _ = self._fitting  # checks the length

    @property
    def _fitting(self) -> Fitting:
        return Fitting(self.sequence_length, self.modalities, self.long)

    def describe(self) -> dict[str, Any]:
        """As JSON: fitters of one description make the same documents."""
        return {
            "tokenizer": self.tokenizer.describe(),
            "sequence_length": self.sequence_length,
            "modalities": [asdict(modality) for modality in self.modalities],
            "long": self.long,
        }

    def encode(self, documents: Iterable[EncodedDocument | Rejected]) -> Iterator[list[Document] | Rejected]:
        """Of each document itself or its parts, or why it cannot be used."""
        for document in documents:
            if isinstance(document, Rejected):
                yield document
                continue
            try:
                yield self._fitting.documents(document.segments, self._segments)
            except Rejected as rejected:
                yield rejected.at(document.where)

    def _segments(self, segment: Segment, free: int) -> Sequence[Segment]:
        if isinstance(segment, ImageSegment) or len(segment.ids) <= self._fitting.first(free):
            return [segment]
        text = self.tokenizer.decode(segment.ids)
        ids, starts = self.tokenizer.encode_with_starts(text)
        if not np.array_equal(ids, segment.ids) and (_NO_TEXT in text or self.tokenizer.decode(ids) != text):
            raise Rejected("text cannot be cut", "encoded again it would be another; choose longer packs")
        return self._fitting.cut(text, ids, starts, free)


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
