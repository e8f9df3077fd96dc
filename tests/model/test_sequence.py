"""How documents are laid out: tokens, labels and positions, written out by hand and against plain loops.

Ten text ids, so <bos> is 10, <eos> 11, <boi> and <eoi> 12 and 13 for modality 0, 14 and 15 for modality 1.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import laid_out

from transfusion_fast.config import ModelConfig
from transfusion_fast.errors import InputError
from transfusion_fast.model.inputs import place_images
from transfusion_fast.model.packed_batch import build_batch
from transfusion_fast.model.sequence import (
    Vocabulary,
    before_captions,
    labels_of,
    patch_mask,
    positions_of,
    without_context,
)

VOCABULARY = Vocabulary(num_text_tokens=10, dims=(2, 2))
BOS, EOS, BOI, EOI, BOI1, EOI1 = 10, 11, 12, 13, 14, 15
NONE = -100  # no label


def modalities_of(scheme):
    return ModelConfig(dim_latent=(4, 6), positions=scheme).modalities


def described(documents, scheme, dropped=()):
    """Return tokens, labels and positions."""
    laid = laid_out(documents, VOCABULARY, dropped)
    is_patch = patch_mask(laid)
    arrays = laid.tokens, labels_of(laid, is_patch), positions_of(laid, modalities_of(scheme))
    return [array.tolist() for array in arrays]


def batch_of(*documents, total_length=None, scheme="sequential"):
    laid, images = laid_out(documents, VOCABULARY), []
    for modality, width in enumerate((4, 6)):
        latents = torch.zeros(int(laid.length[laid.modality == modality].sum()), width)
        images.append((latents, latents))
    return build_batch(laid, images, torch.arange(1.0, 1 + len(laid.start)), modalities_of(scheme), total_length)


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
    tokens, labels, positions = described([[[5, 6], (0, 2, 3)]], scheme)
    assert tokens == [BOS, 5, 6, BOI, 0, 0, 0, 0, 0, 0, EOI, EOS]
    assert labels == [5, 6, BOI, NONE, NONE, NONE, NONE, NONE, NONE, NONE, EOS, NONE]
    assert positions == expected


def test_sizes_stand_before_the_patches_and_are_labels() -> None:
    vocabulary = Vocabulary(10, (2, 1, 0), max_size=6)
    documents = [[[5], (0, 1, 2)], [(1, 3), [6], (2,)]]
    laid = laid_out(documents, vocabulary, [True, False, False])
    one, two, three, boi2 = 18, 19, 20, 16
    first, second = [BOI, one, two, 0, 0, EOI, EOS], [BOS, BOI1, three, 0, 0, 0, EOI1, 6, boi2, 0, boi2 + 1, EOS]
    assert laid.tokens.tolist() == [BOS, 5, *first, *second]
    assert laid.document_lengths.tolist() == [2, len(first), len(second)]
    labels = [5, NONE, one, two, NONE, NONE, NONE, EOS, NONE]
    labels += [BOI1, three, NONE, NONE, NONE, NONE, 6, boi2, NONE, NONE, EOS, NONE]
    assert labels_of(laid, patch_mask(laid)).tolist() == labels
    assert vocabulary.size == 24
    with pytest.raises(InputError, match=r"at most model.size_tokens=6 patches along each dimension, got one of 7"):
        laid_out([[(0, 7, 1)]], vocabulary)


def test_a_document_that_begins_with_boi_is_not_cut_behind_it():
    sequence = place_images(np.array([BOI, 0, 0, EOI]), np.array([4]), [(1, 0, torch.zeros(1, 2, 4))])
    assert without_context(sequence, np.array([True]), VOCABULARY).document_lengths.tolist() == [4]


def test_an_image_without_context_begins_a_document_with_what_follows_it():
    """Nothing predicts its <boi>."""
    documents = [[[5], (0, 1, 2), [6], (0, 1, 1)], [(0, 1, 1), [7]]]
    tokens, labels, positions = described(documents, "sequential", dropped=[True, False, True])
    first = [BOS, 5], [BOI, 0, 0, EOI, 6, BOI, 0, EOI, EOS]
    second = [BOS], [BOI, 0, EOI, 7, EOS]
    assert tokens == [*first[0], *first[1], *second[0], *second[1]]
    assert labels == [5, NONE, NONE, NONE, NONE, 6, BOI, NONE, NONE, EOS, NONE, NONE, NONE, NONE, 7, EOS, NONE]
    assert positions == [place for part in (*first, *second) for place in range(len(part))]


def test_rows_are_cut_at_an_image_that_no_token_opens():
    """The token before it may be anything, or of the row before."""
    tokens, images = np.array([1, 2, 0, 0, BOI, 0, 3, BOI]), [(2, 0, torch.zeros(2, 4)), (5, 0, torch.zeros(1, 4))]
    sequence = place_images(tokens, np.array([5, 3]), images)
    cut = without_context(sequence, np.array([True, True]), VOCABULARY)
    assert cut.document_lengths.tolist() == [2, 3, 3]


def test_only_the_image_of_an_image_first_pair_stands_before_its_caption():
    documents = {
        "pair": ([(0, 1, 2), [5]], [True]),
        "caption first": ([[5], (0, 1, 2)], [False]),
        "image alone": ([(0, 1, 2)], [False]),
        "empty caption": ([(0, 1, 2), []], [False]),
        "text on both sides": ([[5], (0, 1, 2), [6]], [False]),
        "two images": ([(0, 1, 2), [5], (1, 1, 1)], [False, False]),
    }
    laid = laid_out([pieces for pieces, _ in documents.values()], VOCABULARY)
    expected = [flag for _, flags in documents.values() for flag in flags]
    assert before_captions(laid, VOCABULARY).tolist() == expected


def walk(number, document, dropped, scheme):
    """Yield (document, token, whether it is a patch, position) of every position of a document, in plain loops.

    `dropped` says of each image whether a new document begins with its <boi>.
    """
    pieces, dropped = [[BOS]], iter(dropped)
    for piece in document:
        pieces += [piece] if isinstance(piece, list) else [[BOI + 2 * piece[0]], piece, [EOI + 2 * piece[0]]]
    index = part = 0
    for piece, following in pairwise([*pieces, [EOS], []]):
        if not isinstance(following, list) and next(dropped):
            index, part = 0, part + 1
        if isinstance(piece, list):
            yield from (((number, part), token, False, [index + i] * 2) for i, token in enumerate(piece))
            index += len(piece)
            continue
        _modality, rows, columns = piece
        for row, column in np.ndindex(rows, columns):
            patch = row * columns + column
            down, right = {"sequential": (patch, patch), "shared": (0, 0), "axial": (row, column)}[scheme]
            yield (number, part), 0, True, [index + down, index + right]
        index += {"sequential": rows * columns, "shared": 1, "axial": max(rows, columns)}[scheme]


texts = st.lists(st.integers(0, 9), max_size=3)
images = st.tuples(st.integers(0, 1), st.integers(1, 3), st.integers(1, 3))
documents = st.lists(texts | images, min_size=1, max_size=4)


@given(st.lists(documents, max_size=4), st.sampled_from(["sequential", "shared", "axial"]), st.data())
def test_layouts_are_those_of_a_walk_over_the_documents(documents, scheme, data):
    counts = [sum(not isinstance(piece, list) for piece in document) for document in documents]
    dropped = [data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for count in counts]
    places = [
        place
        for number, pair in enumerate(zip(documents, dropped, strict=True))
        for place in walk(number, *pair, scheme)
    ]
    tokens, labels, positions = described(documents, scheme, [flag for flags in dropped for flag in flags])
    assert tokens == [token for _, token, _, _ in places]
    following = [*places, (None, None, False, None)][1:]
    assert labels == [
        token if document == next_document and not patch and not next_patch else NONE
        for (document, _, patch, _), (next_document, token, next_patch, _) in zip(places, following, strict=True)
    ]
    assert positions == [both if scheme == "axial" else both[0] for *_, both in places]


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
