"""Short stories with pictures between their sentences: a worked example of interleaved documents.

Somebody gets ready for an occasion and takes out a few pieces of clothing, each shown by a picture of Fashion-MNIST. A
piece is named either before its picture, which must then be drawn to match, or after it, and must then be recognised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from transfusion_fast.data.pack import Document, ImageSegment, Segment, TextSegment
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import BuiltIn, Split
from transfusion_fast.prepare.examples.fashion import CLASSES, MODALITY, SIDE, FashionMnist

NAMES = ("Ada", "Ben", "Clara", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ida", "Jonas", "Lena", "Max", "Nora", "Omar")
OCCASIONS = (
    "a party", "the first day of school", "a walk in the park", "a trip to the sea", "a wedding", "a long journey",
    "a day at work", "a dinner with friends",
)  # fmt: skip
OPENINGS = (
    "{name} was getting ready for {occasion}.",
    "It was the morning of {occasion}, and {name} opened the wardrobe.",
    "{name} had been looking forward to {occasion} for weeks.",
    "In an hour {name} had to leave for {occasion}.",
)
NAMED = (
    "First came {item}.", "There was {item} in the drawer.", "{name} took {item} from the shelf.",
    "On the chair lay {item}.", "A friend had lent {name} {item}.", "{name} could not go without {item}.",
)  # fmt: skip
"""Sentences that a picture follows."""
GUESSED = (
    ("Something lay under the bed.", "It was {item}."),
    ("{name} opened a parcel.", "Inside was {item}."),
    ("What hung behind the door?", "It was {item}."),
)
"""Sentences with a picture between them."""
CLOSINGS = (
    "Now {name} was ready for {occasion}.",
    "Nothing was missing, and {name} went out of the door.",
    "{name} looked into the mirror and smiled.",
)
PIECES = (2, 3, 4)
STORIES: dict[Split, int] = {"train": 20_000, "heldout": 1_000}
_T = TypeVar("_T")
_ARTICLES = {"trousers": "a pair of trousers", "ankle boot": "an ankle boot"}
_SEED = 0
_STREAM: dict[Split, int] = {"train": 0, "heldout": 1}


class _Draws:
    """Choices that depend on a key alone, for every release of numpy."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def of(self, choices: Sequence[_T]) -> _T:
        return choices[int(self._bits.random_raw()) % len(choices)]


@dataclass(frozen=True)
class Stories(BuiltIn):
    """Stories of each split, with pictures of the same split."""

    pictures: FashionMnist
    modality, side = MODALITY, SIDE
    long = "split"

    def describe(self) -> dict[str, object]:
        words = [NAMES, OCCASIONS, OPENINGS, NAMED, GUESSED, CLOSINGS]
        return {"data": "stories", "stories": STORIES, "seed": _SEED, "pieces": PIECES, "words": words}

    def documents(self, split: Split, tokenizer: Tokenizer) -> list[Document]:
        """Return texts and images in turn, beginning and ending with a text."""
        images, labels = self.pictures.splits[split]
        by_class = [images[labels == label][..., None] for label in range(len(CLASSES))]
        if not all(map(len, by_class)):
            got = sorted(set(labels.tolist()))
            raise InputError(f"pictures must be of all {len(CLASSES)} classes, got {got}; give the whole data set")

        def segments(draws: _Draws) -> Iterator[Segment]:
            for part in _story(draws):
                if isinstance(part, str):
                    yield TextSegment(tokenizer.encode(part))
                else:
                    yield ImageSegment(draws.of(by_class[part]))

        return [tuple(segments(_Draws(_SEED, _STREAM[split], number))) for number in range(STORIES[split])]


def _story(draws: _Draws) -> Iterator[str | int]:
    """Yield texts, and the classes of the pictures between them."""
    fixed = {"name": draws.of(NAMES), "occasion": draws.of(OCCASIONS)}
    text = draws.of(OPENINGS).format(**fixed)
    for _ in range(draws.of(PIECES)):
        label = draws.of(range(len(CLASSES)))
        item = _ARTICLES.get(CLASSES[label], f"a {CLASSES[label]}")
        before, after = draws.of([(sentence, "") for sentence in NAMED] + [*GUESSED, *GUESSED])
        yield f"{text} {before.format(item=item, **fixed)}".lstrip()
        yield label
        text = after.format(item=item, **fixed)
    yield f"{text} {draws.of(CLOSINGS).format(**fixed)}".lstrip()
