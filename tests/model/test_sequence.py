"""How documents are laid out: tokens, labels and positions, written out by hand and against plain loops.

Ten text ids, so <bos> is 10, <eos> 11, <boi> and <eoi> 12 and 13 for modality 0, 14 and 15 for modality 1.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import laid_out

from transfusion_fast.model.sequence import Vocabulary, build_batch, labels_of, patch_mask, positions_of, precedes_text

VOCABULARY = Vocabulary(num_text_tokens=10, num_modalities=2)
BOS, EOS, BOI, EOI, BOI1, EOI1 = 10, 11, 12, 13, 14, 15
NONE = -100  # no label


def described(documents, scheme, delimited=None):
    """Return tokens, labels, positions, and which images text follows."""
    laid = laid_out(documents, VOCABULARY, delimited)
    is_patch = patch_mask(laid)
    arrays = laid.tokens, labels_of(laid, is_patch), positions_of(laid, is_patch, scheme)
    return *(array.tolist() for array in arrays), precedes_text(laid, VOCABULARY).tolist()


def batch_of(*documents, total_length=None, scheme="sequential"):
    laid, images = laid_out(documents, VOCABULARY), []
    for modality, width in enumerate((4, 6)):
        latents = torch.zeros(int(laid.length[laid.modality == modality].sum()), width)
        images.append((latents, latents))
    return build_batch(laid, images, torch.arange(1.0, 1 + len(laid.start)), scheme, total_length)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("sequential", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("shared", [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 6]),
        (
            "axial",
            [*([0, 0], [1, 1], [2, 2], [3, 3]), *([4, 4], [4, 5], [4, 6], [5, 4], [5, 5], [5, 6]), *([7, 7], [8, 8])],
        ),
    ],
)
def test_a_caption_before_its_image(scheme, expected):
    tokens, labels, positions, capped = described([[[5, 6], (0, 2, 3)]], scheme)
    assert tokens == [BOS, 5, 6, BOI, 0, 0, 0, 0, 0, 0, EOI, EOS]
    assert labels == [5, 6, BOI, NONE, NONE, NONE, NONE, NONE, NONE, NONE, EOS, NONE]
    assert (positions, capped) == (expected, [False])


def test_a_bare_image_between_two_documents():
    """An image whose caption was dropped: no <bos> and no <eos>, and nothing to predict."""
    documents = [[[5]], [(0, 1, 2)], [[6]]]
    tokens, labels, positions, capped = described(documents, "sequential", delimited=[True, False, True])
    assert tokens == [BOS, 5, EOS, BOI, 0, 0, EOI, BOS, 6, EOS]
    assert labels == [5, EOS, NONE, NONE, NONE, NONE, NONE, 6, EOS, NONE]
    assert positions == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert capped == [False]


def walk(number, document, delimited, scheme):
    """Yield (document, token, whether it is a patch, position) of every position of a document, in plain loops."""
    pieces = [[BOS]] * delimited
    for piece in document:
        pieces += [piece] if isinstance(piece, list) else [[BOI + 2 * piece[0]], piece, [EOI + 2 * piece[0]]]
    index = 0
    for piece in [*pieces, *[[EOS]] * delimited]:
        if isinstance(piece, list):
            yield from ((number, token, False, [index + i] * 2) for i, token in enumerate(piece))
            index += len(piece)
            continue
        _modality, rows, columns = piece
        for row, column in np.ndindex(rows, columns):
            patch = row * columns + column
            down, right = {"sequential": (patch, patch), "shared": (0, 0), "axial": (row, column)}[scheme]
            yield number, 0, True, [index + down, index + right]
        index += {"sequential": rows * columns, "shared": 1, "axial": max(rows, columns)}[scheme]


texts = st.lists(st.integers(0, 9), max_size=3)
images = st.tuples(st.integers(0, 1), st.integers(1, 3), st.integers(1, 3))
documents = st.lists(texts | images, min_size=1, max_size=4)


@given(st.lists(st.tuples(documents, st.booleans()), max_size=4), st.sampled_from(["sequential", "shared", "axial"]))
def test_layouts_are_those_of_a_walk_over_the_documents(flagged, scheme):
    documents = [document for document, _ in flagged]
    delimited = [flag or not any(document) for document, flag in flagged]  # no document is empty
    places = [
        place
        for number, pair in enumerate(zip(documents, delimited, strict=True))
        for place in walk(number, *pair, scheme)
    ]
    tokens, labels, positions, capped = described(documents, scheme, delimited)
    assert tokens == [token for _, token, _, _ in places]
    following = [*places, (None, None, False, None)][1:]
    assert labels == [
        token if document == next_document and not patch and not next_patch else NONE
        for (document, _, patch, _), (next_document, token, next_patch, _) in zip(places, following, strict=True)
    ]
    assert positions == [both if scheme == "axial" else both[0] for *_, both in places]
    assert capped == [
        any(isinstance(later, list) and later for later in document[number + 1 :])
        for document in documents
        for number, piece in enumerate(document)
        if not isinstance(piece, list)
    ]


def test_padding_is_no_label_no_position_and_no_document():
    batch = batch_of([[5], (1, 1, 2), (0, 2, 1)], [[6], (1, 1, 1)], total_length=19)
    assert batch.tokens.tolist() == [BOS, 5, BOI1, 0, 0, EOI1, BOI, 0, 0, EOI, EOS, BOS, 6, BOI1, 0, EOI1, EOS, 0, 0]
    supervised = {0: 5, 1: BOI1, 5: BOI, 9: EOS, 11: 6, 12: BOI1, 15: EOS}
    assert batch.labels.tolist() == [supervised.get(place, NONE) for place in range(19)]
    assert batch.supervised.tolist() == list(supervised)
    assert batch.positions.tolist() == [*range(11), *range(6), 0, 0]
    assert batch.layout.total_length == 19
    assert batch.layout.document_offsets.tolist() == [0, 11, 17]
    assert batch.layout.image_spans.tolist() == [[3, 2], [7, 2], [14, 1]]
    assert (batch.num_tokens, batch.num_images) == (17, 3)
    first, second = batch.modalities
    assert (first.sequence_index.tolist(), second.sequence_index.tolist()) == ([7, 8], [3, 4, 14])
    assert (first.image_offsets.tolist(), second.image_offsets.tolist()) == ([0, 2], [0, 2, 3])
    assert (first.timesteps.tolist(), second.timesteps.tolist()) == ([2], [1, 3])
    assert first.image_offsets.dtype == torch.int32
    axial = batch_of([[5]], total_length=5, scheme="axial")
    assert axial.positions.tolist() == [[0, 0], [1, 1], [2, 2], [0, 0], [0, 0]]


def test_no_document_at_all_is_all_padding():
    batch = batch_of(total_length=2)
    assert (batch.tokens.tolist(), batch.labels.tolist(), batch.supervised.tolist()) == ([0, 0], [NONE, NONE], [])
    assert batch.num_images == 0


def test_a_batch_moves_with_everything_in_it():
    moved = batch_of([[5], (0, 1, 2)]).to("meta")
    tensors = [*vars(moved).values(), *vars(moved.modalities[0]).values(), moved.layout.key_end]
    assert {x.device.type for x in tensors if isinstance(x, torch.Tensor)} == {"meta"}
