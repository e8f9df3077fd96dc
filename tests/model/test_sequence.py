"""How documents are laid out: tokens, labels and positions, written out by hand and against plain loops.

Ten text ids, so <bos> is 10, <eos> 11, <boi> and <eoi> 12 and 13 for modality 0, 14 and 15 for modality 1.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.model.sequence import (
    TEXT,
    Segments,
    Vocabulary,
    build_batch,
    labels_of,
    lay_out,
    patch_mask,
    positions_of,
    precedes_text,
)

VOCABULARY = Vocabulary(num_text_tokens=10, num_modalities=2)
BOS, EOS, BOI, EOI, BOI1, EOI1 = 10, 11, 12, 13, 14, 15
NONE = -100  # no label


def laid_out(*documents, delimited=None):
    """Lay out documents of texts (lists of ids) and images (modality, rows, columns)."""
    segments = [(number, piece) for number, document in enumerate(documents) for piece in document]
    rows = [
        (number, TEXT, len(piece), 0, 0)
        if isinstance(piece, list)
        else (number, 1 + piece[0], piece[1] * piece[2], piece[1], piece[2])
        for number, piece in segments
    ]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    delimited = np.array([True] * len(documents) if delimited is None else delimited, dtype=bool)
    ids = [i for _, piece in segments if isinstance(piece, list) for i in piece]
    return lay_out(Segments(*columns, delimited=delimited), np.array(ids, dtype=np.int64), VOCABULARY)


def labels(sequence):
    return labels_of(sequence, patch_mask(sequence)).tolist()


def positions(sequence, scheme):
    return positions_of(sequence, patch_mask(sequence), scheme).tolist()


def precedes(sequence):
    return precedes_text(sequence, VOCABULARY).tolist()


def batch_of(sequence, total_length=None, scheme="sequential"):
    images = []
    for modality, width in enumerate((4, 6)):
        latents = torch.zeros(int(sequence.length[sequence.modality == modality].sum()), width)
        images.append((latents, latents))
    return build_batch(sequence, images, torch.ones(len(sequence.start)), scheme, total_length)


def test_special_tokens_follow_the_text_ids():
    assert (VOCABULARY.bos, VOCABULARY.eos, VOCABULARY.boi(0), VOCABULARY.eoi(0)) == (10, 11, 12, 13)
    assert (VOCABULARY.boi(1), VOCABULARY.eoi(1), VOCABULARY.size) == (14, 15, 16)


def test_text_alone():
    laid = laid_out([[5, 6, 7]])
    assert laid.tokens.tolist() == [BOS, 5, 6, 7, EOS]
    assert labels(laid) == [5, 6, 7, EOS, NONE]
    for scheme in ("sequential", "shared"):
        assert positions(laid, scheme) == [0, 1, 2, 3, 4]
    assert positions(laid, "axial") == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]]
    assert precedes(laid) == []


def test_a_caption_before_its_image():
    laid = laid_out([[5, 6], (0, 2, 3)])
    assert laid.tokens.tolist() == [BOS, 5, 6, BOI, 0, 0, 0, 0, 0, 0, EOI, EOS]
    assert labels(laid) == [5, 6, BOI, NONE, NONE, NONE, NONE, NONE, NONE, NONE, EOS, NONE]
    assert positions(laid, "sequential") == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert positions(laid, "shared") == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 6]
    assert positions(laid, "axial") == [
        *([0, 0], [1, 1], [2, 2], [3, 3]),
        *([4, 4], [4, 5], [4, 6], [5, 4], [5, 5], [5, 6]),
        *([7, 7], [8, 8]),
    ]
    assert precedes(laid) == [False]


def test_a_caption_after_its_image():
    laid = laid_out([(0, 2, 1), [5, 6]])
    assert laid.tokens.tolist() == [BOS, BOI, 0, 0, EOI, 5, 6, EOS]
    assert labels(laid) == [BOI, NONE, NONE, NONE, 5, 6, EOS, NONE]
    assert positions(laid, "sequential") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert positions(laid, "shared") == [0, 1, 2, 2, 3, 4, 5, 6]
    assert positions(laid, "axial") == [[0, 0], [1, 1], [2, 2], [3, 2], [4, 4], [5, 5], [6, 6], [7, 7]]
    assert precedes(laid) == [True]


def test_a_bare_image_between_two_documents():
    """An image whose caption was dropped: no <bos> and no <eos>, and nothing to predict."""
    laid = laid_out([[5]], [(0, 1, 2)], [[6]], delimited=[True, False, True])
    assert laid.tokens.tolist() == [BOS, 5, EOS, BOI, 0, 0, EOI, BOS, 6, EOS]
    assert laid.document_lengths.tolist() == [3, 4, 3]
    assert labels(laid) == [5, EOS, NONE, NONE, NONE, NONE, NONE, 6, EOS, NONE]
    assert positions(laid, "sequential") == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert positions(laid, "shared") == [0, 1, 2, 0, 1, 1, 2, 0, 1, 2]
    assert positions(laid, "axial") == [
        *([0, 0], [1, 1], [2, 2]),
        *([0, 0], [1, 1], [1, 2], [3, 3]),
        *([0, 0], [1, 1], [2, 2]),
    ]
    assert precedes(laid) == [False]


def test_a_document_that_is_not_delimited_has_neither_bos_nor_eos():
    laid = laid_out([[5], (0, 1, 1), [6]], [[7, 8]], delimited=[False, False])
    assert laid.tokens.tolist() == [5, BOI, 0, EOI, 6, 7, 8]
    assert labels(laid) == [BOI, NONE, NONE, 6, NONE, 8, NONE]


def test_text_between_and_after_two_images():
    laid = laid_out([[5], (0, 1, 2), [6, 7], (0, 1, 1), [8]])
    assert laid.tokens.tolist() == [BOS, 5, BOI, 0, 0, EOI, 6, 7, BOI, 0, EOI, 8, EOS]
    assert labels(laid) == [5, BOI, NONE, NONE, NONE, 6, 7, BOI, NONE, NONE, 8, EOS, NONE]
    assert positions(laid, "shared") == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert positions(laid, "axial")[3:6] == [[3, 3], [3, 4], [5, 5]]
    assert (laid.start.tolist(), laid.length.tolist()) == ([3, 9], [2, 1])
    assert precedes(laid) == [True, True]


def test_images_of_two_modalities_in_a_row():
    laid = laid_out([(1, 1, 2), (0, 2, 1), [5]])
    assert laid.tokens.tolist() == [BOS, BOI1, 0, 0, EOI1, BOI, 0, 0, EOI, 5, EOS]
    assert labels(laid) == [BOI1, NONE, NONE, NONE, BOI, NONE, NONE, NONE, 5, EOS, NONE]
    assert laid.modality.tolist() == [1, 0]
    batch = batch_of(laid)
    assert batch.modalities[0].sequence_index.tolist() == [6, 7]
    assert batch.modalities[1].sequence_index.tolist() == [2, 3]
    assert batch.layout.image_spans.tolist() == [[2, 2], [6, 2]]


def test_text_of_another_document_or_before_an_image_does_not_cap_it():
    assert precedes(laid_out([[5], (0, 1, 1)], [[6], (0, 1, 1), (1, 1, 1), [7]], [[8]])) == [False, True, True]


def test_padding_is_no_label_no_position_and_no_document():
    batch = batch_of(laid_out([[5], (0, 1, 2)], [[6]]), total_length=13)
    assert batch.tokens.tolist() == [BOS, 5, BOI, 0, 0, EOI, EOS, BOS, 6, EOS, 0, 0, 0]
    assert batch.labels.tolist() == [5, BOI, NONE, NONE, NONE, EOS, NONE, 6, EOS, NONE, NONE, NONE, NONE]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0, 0]
    assert batch.supervised.tolist() == [0, 1, 5, 7, 8]
    assert batch.layout.total_length == 13
    assert batch.layout.document_offsets.tolist() == [0, 7, 10]
    assert (batch.num_tokens, batch.num_images) == (10, 1)


def test_padding_of_positions_in_the_plane_has_both_coordinates():
    batch = batch_of(laid_out([[5]]), total_length=5, scheme="axial")
    assert batch.positions.tolist() == [[0, 0], [1, 1], [2, 2], [0, 0], [0, 0]]


def test_no_document_at_all_is_all_padding():
    batch = batch_of(laid_out(), total_length=2)
    assert (batch.tokens.tolist(), batch.labels.tolist(), batch.supervised.tolist()) == ([0, 0], [NONE, NONE], [])
    assert batch.num_images == 0


def test_images_of_a_modality_follow_each_other_over_its_patches():
    batch = batch_of(laid_out([(0, 1, 2), (1, 1, 1)], [(0, 3, 1)]))
    assert batch.modalities[0].image_offsets.tolist() == [0, 2, 5]
    assert batch.modalities[1].image_offsets.tolist() == [0, 1]
    assert batch.modalities[0].image_offsets.dtype == torch.int32
    assert batch.num_images == 3


def test_a_batch_moves_with_everything_in_it():
    moved = batch_of(laid_out([[5], (0, 1, 2)])).to("meta")
    tensors = [*vars(moved).values(), *vars(moved.modalities[0]).values(), moved.layout.key_end]
    assert {x.device.type for x in tensors if isinstance(x, torch.Tensor)} == {"meta"}


texts = st.lists(st.integers(0, 9), max_size=3)
images = st.tuples(st.integers(0, 1), st.integers(1, 3), st.integers(1, 3))
delimited_documents = st.lists(st.lists(texts | images, min_size=1, max_size=4), max_size=4)


def walked(documents):
    """Every position in order as (document, token, whether it is a patch), by walking over the documents."""
    places = []
    for number, document in enumerate(documents):
        places.append((number, BOS, False))
        for piece in document:
            if isinstance(piece, list):
                places += [(number, i, False) for i in piece]
                continue
            modality, rows, columns = piece
            places.append((number, BOI + 2 * modality, False))
            places += [(number, 0, True)] * (rows * columns)
            places.append((number, EOI + 2 * modality, False))
        places.append((number, EOS, False))
    return places


@given(delimited_documents)
def test_tokens_and_labels_are_those_of_a_walk_over_the_documents(documents):
    places, laid = walked(documents), laid_out(*documents)
    assert laid.tokens.tolist() == [token for _, token, _ in places]
    following = [*places, (None, None, False)][1:]
    expected = [
        token if document == next_document and not patch and not next_patch else -100
        for (document, _, patch), (next_document, token, next_patch) in zip(places, following, strict=True)
    ]
    assert labels(laid) == expected


@given(delimited_documents, st.sampled_from(["sequential", "shared", "axial"]))
def test_positions_are_those_of_a_walk_over_the_documents(documents, scheme):
    expected = []
    for document in documents:
        index = 0

        def single(count):
            nonlocal index
            expected.extend([index + i] * 2 for i in range(count))
            index += count

        single(1)  # <bos>
        for piece in document:
            if isinstance(piece, list):
                single(len(piece))
                continue
            _modality, rows, columns = piece
            single(1)  # <boi>
            for row, column in np.ndindex(rows, columns):
                number = row * columns + column
                beyond = {"sequential": (number, number), "shared": (0, 0), "axial": (row, column)}[scheme]
                expected.append([index + beyond[0], index + beyond[1]])
            index += {"sequential": rows * columns, "shared": 1, "axial": max(rows, columns)}[scheme]
            single(1)  # <eoi>
        single(1)  # <eos>
    expected = expected if scheme == "axial" else [first for first, _second in expected]
    assert positions(laid_out(*documents), scheme) == expected


@given(delimited_documents)
def test_an_image_is_capped_where_text_follows_it_in_its_document(documents):
    expected = []
    for document in documents:
        for number, piece in enumerate(document):
            if not isinstance(piece, list):
                expected.append(any(isinstance(later, list) and later for later in document[number + 1 :]))
    assert precedes(laid_out(*documents)) == expected


@pytest.mark.parametrize("delimited", [True, False])
def test_a_document_alone_and_among_others_is_laid_out_alike(delimited):
    document = [[5, 6], (0, 2, 2), [7]]
    alone = laid_out(document, delimited=[delimited])
    among = laid_out([[1]], document, [(1, 1, 1)], delimited=[True, delimited, False])
    own = slice(3, 3 + len(alone.tokens))
    assert among.tokens[own].tolist() == alone.tokens.tolist()
    assert labels(among)[own] == labels(alone)
    for scheme in ("sequential", "shared", "axial"):
        assert positions(among, scheme)[own] == positions(alone, scheme)
