"""A small real data set that needs no download: scikit-learn's 1797 handwritten digits, and sums in words.

A digit is an 8 x 8 grey image captioned with its name ("seven"); a sum is a text-only document ("two plus five is
seven"). The split is fixed: 300 images and every tenth sum are held out. Interleaved, a document names and shows four
digits in turn, and ends with a word.
"""

import numpy as np

from transfusion_fast.data.order import keyed_permutation
from transfusion_fast.data.pack import Document, ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.prepare.examples.built_in import SPLITS, BuiltIn, Split

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODALITY = ModalityInfo("digits", channels=1, patch_size=2, encoding="pixels")
SIDE = 8
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SPLIT_SEED = 1797
_LARGEST_VALUE = 16  # of a pixel in scikit-learn's data
_HELDOUT_IMAGES, _HELDOUT_SUMS = 6, 10  # one of 6 images, and one of 10 sums
_ROW, _END = 4, "end"  # digits of an interleaved document, and the text after the last one


class Digits(BuiltIn):
    """The digits and sums as a built-in data set."""

    modality, side = MODALITY, SIDE

    def describe(self) -> dict[str, object]:
        return {"data": "digits", "split": [_SPLIT_SEED, _HELDOUT_IMAGES, _HELDOUT_SUMS]}

    def documents(self, split: Split, tokenizer: Tokenizer) -> list[Document]:
        """Return (caption, image) pairs, and then sums as text alone."""
        images, labels = load_split(split)
        captions = [TextSegment(tokenizer.encode(word)) for word in DIGIT_WORDS]
        pairs = zip(images[..., None], labels, strict=True)
        documents: list[Document] = [(captions[label], ImageSegment(image)) for image, label in pairs]
        return documents + [(TextSegment(tokenizer.encode(sentence)),) for sentence in arithmetic_sentences(split)]


class InterleavedDigits(Digits):
    """The same digits, each once, in documents of several: word, digit, word, digit, ..., end; and the same sums."""

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "interleaved": [_ROW, _END]}

    def documents(self, split: Split, tokenizer: Tokenizer) -> list[Document]:
        """Return documents of four digits in a fixed random order, the last one maybe shorter, and then sums."""
        documents = super().documents(split, tokenizer)
        pairs = [document for document in documents if len(document) == 2]
        order = keyed_permutation(len(pairs), _SPLIT_SEED, 2 + SPLITS.index(split))
        rows = [order[start : start + _ROW].tolist() for start in range(0, len(pairs), _ROW)]
        end = TextSegment(tokenizer.encode(_END))
        interleaved: list[Document] = [(*(part for i in row for part in pairs[i]), end) for row in rows]
        return interleaved + documents[len(pairs) :]


def load_split(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the images uint8 [n, 8, 8] of 0..255 and labels int64 [n] of 0..9 of a split."""
    digits = optional_module("sklearn.datasets", "examples").load_digits()
    images = np.rint(digits.images * (255 / _LARGEST_VALUE)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    shuffled = keyed_permutation(len(labels), _SPLIT_SEED, 0)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    chosen = np.sort(_select(by_label, split, _HELDOUT_IMAGES))
    return images[chosen], labels[chosen]


def arithmetic_sentences(split: Split) -> list[str]:
    """Return sums, differences (never negative) and products of two digits, in words."""
    digits = range(10)
    sentences = [_sentence(a, "plus", b, a + b) for a in digits for b in digits]
    sentences += [_sentence(a, "minus", b, a - b) for a in digits for b in digits if a >= b]
    sentences += [_sentence(a, "times", b, a * b) for a in digits for b in digits]
    shuffled = keyed_permutation(len(sentences), _SPLIT_SEED, 1)
    return [sentences[i] for i in np.sort(_select(shuffled, split, _HELDOUT_SUMS))]


def _select(items: np.ndarray, split: Split, every: int) -> np.ndarray:
    if split not in SPLITS:
        raise InputError(f"split must be train or heldout, got {split!r}; give one of them")
    return items[(np.arange(len(items)) % every == 0) == (split == "heldout")]


def _sentence(a: int, operation: str, b: int, result: int) -> str:
    return f"{DIGIT_WORDS[a]} {operation} {DIGIT_WORDS[b]} is {_number_in_words(result)}"


def _number_in_words(number: int) -> str:
    if number < 20:
        return (DIGIT_WORDS + _TEENS)[number]
    tens, unit = divmod(number, 10)
    return f"{_TENS[tens - 2]} {DIGIT_WORDS[unit]}" if unit else _TENS[tens - 2]
