"""Documents of text and images, laid out as one sequence of tokens.

Letters, here and in every file: T positions of a pack or micro-batch, D head dim, H query heads, G key/value heads,
E model width, F feed-forward width, V vocabulary, N images, P patches, C values of a patch.

A document is laid out as `<bos> text <boi> patches <eoi> text ... <eos>`. The label of a position is the token after
it if both positions are text of one document. So text predicts <boi>, <boi> and the patches have no label, and <eoi>
predicts what follows the image.

With size tokens, one for each dimension of the image's grid stands between <boi> and the patches, and gives the number
of patches along it: `<boi> <6> <2> patches <eoi>`. <boi> then predicts the first of them, and the last has no label.

A segment's loss may have a weight. It holds for the tokens of the segment, wherever they are predicted, and for the
special tokens beside them: <boi> and sizes have the weight of their image, <eos> that of the last segment. A token of
weight zero is no label. The segment is seen as context all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from transfusion_fast.config import ModelConfig
from transfusion_fast.errors import InputError
from transfusion_fast.modalities import ModalityConfig

IGNORED_LABEL = -100
TEXT = 0  # the kind of a text segment; an image of modality m has kind 1 + m


@dataclass(frozen=True)
class Vocabulary:
    """Text ids [0, num_text_tokens), then <bos>, <eos>, then <boi>, <eoi> of each modality, then the size tokens.

    dims: dimensions of the grids of each modality; max_size: the number of size tokens, <1> to <max_size>.
    """

    num_text_tokens: int
    dims: tuple[int, ...]
    max_size: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> Vocabulary:
        """Return the vocabulary of a model."""
        return cls(config.num_text_tokens, tuple(one.dims for one in config.modalities), config.size_tokens)

    @property
    def num_modalities(self) -> int:
        return len(self.dims)

    @property
    def bos(self) -> int:
        return self.num_text_tokens

    @property
    def eos(self) -> int:
        return self.num_text_tokens + 1

    def boi(self, modality: int = 0) -> int:
        return self.num_text_tokens + 2 + 2 * modality

    def eoi(self, modality: int = 0) -> int:
        return self.num_text_tokens + 3 + 2 * modality

    @property
    def first_size(self) -> int:
        """The id of the size token <1>; the others follow it."""
        return self.num_text_tokens + 2 + 2 * self.num_modalities

    @property
    def size(self) -> int:
        return self.first_size + self.max_size

    @property
    def num_sizes(self) -> np.ndarray:
        """Number of size tokens before the patches of an image of each modality, int64 [modalities]."""
        return np.array(self.dims, dtype=np.int64) * (self.max_size > 0)

    def opening(self, modality: int, grid: Sequence[int]) -> list[int]:
        """Return the tokens before an image of the `grid`: <boi>, and its size tokens if the model has them.

        Raises:
            InputError: the image is larger than the size tokens can say.
        """
        sides = np.array((1, 1, 1, *grid))[len(grid) + 3 - self.num_sizes[modality] :]
        return [self.boi(modality), *self.size_ids(sides).tolist()]

    def side(self, token: int) -> int:
        """Return the number of patches that a size token says."""
        return token - self.first_size + 1

    def size_ids(self, sides: np.ndarray) -> np.ndarray:
        """Return the size tokens of numbers of patches, int64 of the same shape; InputError if one is too large."""
        if sides.max(initial=0) > self.max_size:
            rule = f"an image must have at most model.size_tokens={self.max_size} patches along each dimension"
            raise InputError(f"{rule}, got one of {sides.max()}; raise size_tokens, or set it to 0")
        return self.first_size - 1 + sides


@dataclass(frozen=True, eq=False)
class Segments:
    """S segments of documents, in order, as int64 columns [S].

    `document` counts from 0; `kind` is TEXT or 1 + modality; `length` counts ids or patches; `shape` is [S, 3]: frames,
    rows and columns of an image's grid of patches, 1 for dimensions that it lacks; `weight`, fp32, is that of the loss,
    None for 1 everywhere.
    """

    document: np.ndarray
    kind: np.ndarray
    length: np.ndarray
    shape: np.ndarray
    weight: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens, and the positions of documents and images among them. All arrays are numpy, int64.

    tokens [length of all documents], zero at patches; document_lengths [documents]. For the N images in order: start,
    length, modality, each [N], and shape [N, 3] as of `Segments`. weights: fp32 [length of all documents], the weight
    of each token's segment, or None for 1 everywhere.
    """

    tokens: np.ndarray
    document_lengths: np.ndarray
    start: np.ndarray
    length: np.ndarray
    shape: np.ndarray
    modality: np.ndarray
    weights: np.ndarray | None = None


def lay_out(segments: Segments, text_ids: np.ndarray, vocabulary: Vocabulary) -> TokenSequence:
    """Lay segments out with their special tokens. `text_ids` are the ids of all text segments, in order.

    Raises:
        InputError: an image is larger than the size tokens can say.
    """
    is_image = segments.kind != TEXT
    first, last = _first_and_last(segments.document)
    sizes = np.concatenate([[0], vocabulary.num_sizes])[segments.kind]
    before = is_image.astype(np.int64) + first + sizes  # <bos>, <boi> and the size
    extent = before + segments.length + is_image + last  # ... <eoi> and <eos>
    end = np.cumsum(extent)
    start = end - extent + before

    tokens = np.zeros(end[-1] if len(end) else 0, dtype=np.int64)
    text = ~is_image
    tokens[ranges(start[text], segments.length[text])] = text_ids
    tokens[(start - before)[first]] = vocabulary.bos
    tokens[(end - 1)[last]] = vocabulary.eos
    modality = segments.kind[is_image] - 1
    image_start, image_length = start[is_image], segments.length[is_image]
    shape, sizes = segments.shape[is_image], sizes[is_image]
    tokens[image_start - 1 - sizes] = vocabulary.boi() + 2 * modality
    tokens[image_start + image_length] = vocabulary.eoi() + 2 * modality
    for dimension in range(1, 1 + sizes.max(initial=0)):  # counted from the last one
        sized = sizes >= dimension
        tokens[image_start[sized] - dimension] = vocabulary.size_ids(shape[sized, -dimension])
    document_lengths = np.bincount(segments.document, weights=extent).astype(np.int64)
    weights = None if segments.weight is None else np.repeat(segments.weight, extent)
    return TokenSequence(tokens, document_lengths, image_start, image_length, shape, modality, weights)


def wrongly_sized(sequence: TokenSequence, vocabulary: Vocabulary) -> np.ndarray:
    """Return the numbers of the images that do not follow the size tokens of their size, int64."""
    sizes, wrong = vocabulary.num_sizes[sequence.modality], np.zeros(len(sequence.start), dtype=bool)
    for dimension in range(1, 1 + sizes.max(initial=0)):  # counted from the last one
        place, token = sequence.start - dimension, vocabulary.first_size - 1 + sequence.shape[:, -dimension]
        wrong |= (sizes >= dimension) & ((place < 0) | (sequence.tokens[place] != token))
    return np.flatnonzero(wrong)


def patch_mask(sequence: TokenSequence) -> np.ndarray:
    """Return bool [T], True at the positions of patches."""
    is_patch = np.zeros(len(sequence.tokens), dtype=bool)
    is_patch[ranges(sequence.start, sequence.length)] = True
    return is_patch


def labels_of(sequence: TokenSequence, is_patch: np.ndarray) -> np.ndarray:
    """Return int64 [T]: the next token where this and the next position are text of one document, else IGNORED_LABEL.

    `is_patch` is what `patch_mask` returns. A token of weight zero is never a label.
    """
    labels = np.full_like(sequence.tokens, IGNORED_LABEL)
    predicts = ~is_patch[:-1] & ~is_patch[1:]
    predicts[np.cumsum(sequence.document_lengths)[:-1] - 1] = False
    if sequence.weights is not None:
        predicts &= sequence.weights[1:] > 0
    labels[:-1][predicts] = sequence.tokens[1:][predicts]
    return labels


def positions_of(sequence: TokenSequence, modalities: Sequence[ModalityConfig]) -> np.ndarray:
    """Return int32 [T], or [T, 2] (row, column) or [T, 3] (frame, row, column) if an axial modality has such grids.

    Positions count from 0 in every document. "sequential" gives every patch an index of its own. "shared" gives an
    image one index. "axial" gives the patch at (row, column) the indices (first + row, first + column), and the text
    after it continues after the longest side.
    """
    total, lengths = len(sequence.tokens), sequence.document_lengths
    advance = np.ones(total, dtype=np.int64)
    axial = np.array([one.axes > 1 for one in modalities], dtype=bool)[sequence.modality]
    together = axial | np.array([one.positions == "shared" for one in modalities], dtype=bool)[sequence.modality]
    if together.any():
        start, length = sequence.start[together], sequence.length[together]
        advance[ranges(start, length)] = 0
        advance[start] = 1
        inside = start + length < total
        used = np.where(axial, sequence.shape.max(axis=1, initial=1), 1)[together]
        advance[(start + length)[inside]] = used[inside]
    index = np.cumsum(advance)
    document_start = np.cumsum(lengths) - lengths
    index -= np.repeat(index[document_start], lengths)
    axes = max((one.axes for one in modalities), default=1)
    if axes == 1:
        return index.astype(np.int32)
    indices = np.repeat(index[:, None], axes, axis=1)
    start, length, shape = sequence.start[axial], sequence.length[axial], sequence.shape[axial]
    patch = ranges(np.zeros_like(start), length)
    rows, columns = np.repeat(shape[:, 1:], length, axis=0).T
    coordinates = np.stack([patch // (rows * columns), patch // columns % rows, patch % columns], axis=1)
    indices[ranges(start, length)] += coordinates[:, -axes:]
    return indices.astype(np.int32)


def before_captions(sequence: TokenSequence, vocabulary: Vocabulary) -> np.ndarray:
    """Return bool [N], True for the image of an image-first pair: the only image of its document, with text after it
    and none before it."""
    # Patches count too, and change nothing: those of an only image stand neither before nor after it.
    count = np.concatenate([[0], np.cumsum(sequence.tokens < vocabulary.num_text_tokens)])
    document, bounds = documents_of_images(sequence)
    text_before = count[sequence.start] > count[bounds[document]]
    text_after = count[bounds[document + 1]] > count[sequence.start + sequence.length]
    return (np.bincount(document)[document] == 1) & text_after & ~text_before


def without_context(sequence: TokenSequence, chosen: np.ndarray, vocabulary: Vocabulary) -> TokenSequence:
    """Cut documents before the <boi> of the `chosen` images, bool [N].

    Such an image begins a document, as in the unconditional branch of classifier-free guidance, and sees nothing that
    precedes it. No token is added or removed.
    """
    document, bounds = documents_of_images(sequence)
    boi = sequence.start - 1 - vocabulary.num_sizes[sequence.modality]
    opened = (boi >= bounds[document]) & (sequence.tokens[boi] == vocabulary.boi() + 2 * sequence.modality)
    cuts = np.where(opened, boi, sequence.start)
    return replace(sequence, document_lengths=np.diff(np.union1d(bounds, cuts[chosen])))


def documents_of_images(sequence: TokenSequence) -> tuple[np.ndarray, np.ndarray]:
    """Return the document of each image [N], and the bounds of all documents [documents + 1]."""
    bounds = np.concatenate([[0], np.cumsum(sequence.document_lengths)])
    return np.searchsorted(bounds, sequence.start, side="right") - 1, bounds


def _first_and_last(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return bool [S] twice: the segments that open and that close their document."""
    change = np.diff(document) != 0
    border = np.ones(1 if len(document) else 0, dtype=bool)
    return np.concatenate([border, change]), np.concatenate([change, border])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the integers of [start, start + length) of all pairs."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
