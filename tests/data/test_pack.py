"""Documents and packs: lengths, best-fit decreasing, and what validation lets through."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion_fast.data.pack import (
    SEGMENT_COLUMNS,
    ImageSegment,
    ModalityInfo,
    Pack,
    TextSegment,
    make_pack,
    segment_length,
    validate_pack,
)
from transfusion_fast.errors import InputError

GREY = ModalityInfo("grey", channels=1, patch_size=2, encoding="pixels")
COLOUR = ModalityInfo("colour", channels=3, patch_size=1, encoding="pixels")
LATENT = ModalityInfo("latent", channels=4, patch_size=2, encoding="latents")
MODALITIES = (GREY, COLOUR)


def text(*ids):
    return TextSegment(np.array(ids, np.int32))


def image(height, width, modality=0, start=0):
    shape = (height, width, MODALITIES[modality].channels)
    return ImageSegment((np.arange(np.prod(shape)) + start).astype(np.uint8).reshape(shape), modality)


texts = st.lists(st.integers(0, 255), min_size=1, max_size=9).map(lambda ids: text(*ids))
greys = st.builds(lambda h, w, start: image(2 * h, 2 * w, 0, start), *[st.integers(1, 3)] * 2, st.integers(0, 99))
colours = st.builds(lambda h, w, start: image(h, w, 1, start), *[st.integers(1, 4)] * 2, st.integers(0, 99))
documents = st.lists(texts | greys | colours, min_size=1, max_size=5).map(tuple)


def plain(documents):
    """Return documents as lists that can be compared."""
    arrays = [[s.ids if isinstance(s, TextSegment) else s.values for s in document] for document in documents]
    modalities = [[getattr(s, "modality", None) for s in document] for document in documents]
    return modalities, [[(a.dtype, a.shape, a.tolist()) for a in document] for document in arrays]


@given(st.lists(documents, min_size=1, max_size=6))
def test_a_valid_pack_gives_its_documents_back(packed):
    pack = make_pack(packed, MODALITIES)
    validate_pack(pack, MODALITIES, 256, pack.num_positions)
    assert plain(pack.documents(MODALITIES)) == plain(packed)
    with pytest.raises(InputError, match="at most"):
        validate_pack(pack, MODALITIES, 256, pack.num_positions - 1)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_weights_are_stored_where_one_is_not_1(weight):
    ids = np.array([1, 2], np.int32)
    documents = [(TextSegment(ids), TextSegment(ids, weight))]
    assert make_pack(documents, ()).weights.tolist() == [1, weight]
    assert make_pack([(TextSegment(ids, 1.0),)], ()).weights is None


def test_rows_hold_offsets_in_ids_and_in_values():
    pack = make_pack([(text(7, 8, 9), image(4, 6)), (image(1, 2, modality=1), text(5))], MODALITIES)
    assert pack.segments.tolist() == [
        [0, 0, 0, 3, 0, 0],
        [0, 1, 0, 6, 4, 6],
        [1, 2, 24, 2, 1, 2],
        [1, 0, 3, 1, 0, 0],
    ]
    assert pack.tokens.tolist() == [7, 8, 9, 5]
    assert pack.latents.tolist() == [*range(24), *range(6)]
    # <bos> 3 ids <boi> 2x3 patches <eoi> <eos>, then <bos> <boi> 1x2 patches <eoi> 1 id <eos>
    assert pack.num_positions == (1 + 3 + 1 + 6 + 1 + 1) + (1 + 1 + 2 + 1 + 1 + 1)


def test_latents_are_kept_as_float16():
    values = np.linspace(-3, 3, 2 * 4 * 4).astype(np.float16).reshape(2, 4, 4)
    pack = make_pack([(text(1), ImageSegment(values))], (LATENT,))
    validate_pack(pack, (LATENT,), 256, 64)
    np.testing.assert_array_equal(pack.documents((LATENT,))[0][1].values, values, strict=True)


UNPACKABLE = {
    "empty text": (TextSegment(np.empty(0, np.int32)), "at least one id"),
    "int64 text": (TextSegment(np.array([1, 2])), "int32"),
    "two-dimensional text": (TextSegment(np.zeros((2, 2), np.int32)), "text ids must be int32 \\[n\\]"),
    "odd height": (image(3, 4), "multiples of its patch size 2, got 3 x 4"),
    "empty image": (image(0, 4), "got 0 x 4"),
    "wrong channels": (ImageSegment(np.zeros((2, 2, 3), np.uint8)), r"\[height, width, 1\]"),
    "wrong dtype": (ImageSegment(np.zeros((2, 2, 1), np.float32)), "must be uint8"),
    "no channel axis": (ImageSegment(np.zeros((2, 2), np.uint8)), "height, width"),
    "unknown modality": (ImageSegment(np.zeros((2, 2, 1), np.uint8), modality=2), r"in 0\.\.1, got 2"),
    "negative modality": (ImageSegment(np.zeros((2, 2, 3), np.uint8), modality=-1), "got -1"),
}


@pytest.mark.parametrize("case", UNPACKABLE)
def test_a_segment_that_cannot_be_packed_is_refused(case):
    segment, reason = UNPACKABLE[case]
    with pytest.raises(InputError, match=reason):
        segment_length(segment, MODALITIES)
    with pytest.raises(InputError, match=reason):
        make_pack([(segment,)], MODALITIES)


@pytest.mark.parametrize(
    ("packed", "modalities", "reason"),
    [
        ([(ImageSegment(np.full((2, 2, 4), np.inf, np.float16)),)], (LATENT,), "finite"),
        ([(text(1),), ()], MODALITIES, "at least one segment"),
        ([], MODALITIES, "at least one segment"),
        ([(text(1),)], (GREY, LATENT), "share one encoding"),
    ],
)
def test_documents_that_make_no_pack_are_refused(packed, modalities, reason):
    with pytest.raises(InputError, match=reason):
        make_pack(packed, modalities)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 0},
        {"patch_size": -1},
        {"patch_size": 1 << 40},
        {"encoding": "jpeg"},
        {"std": (1.0,)},
        {"std": (0.0,), "mean": (0.0,)},
        {"mean": (0.0, 0.0), "std": (1.0, 1.0)},
    ],
)
def test_a_modality_that_makes_no_sense_is_refused(change):
    with pytest.raises(InputError, match=f"{next(iter(change))} of modality 'grey' must be"):
        replace(GREY, **change)


def damaged(row, column, value):
    """A valid pack of which one number of the segments was changed."""
    pack = make_pack([(text(1, 2), image(2, 4)), (text(3),), (image(2, 2),)], (GREY,))
    segments = pack.segments.copy()
    segments[row, SEGMENT_COLUMNS.index(column)] = value
    return replace(pack, segments=segments)


@pytest.mark.parametrize(
    ("row", "column", "value", "reason"),
    [
        (0, "document", 1, "number its documents"),
        (0, "document", -1, "number its documents"),
        (2, "document", 2, "number its documents"),
        (3, "document", 0, "number its documents"),
        (1, "kind", 2, "kind in 0..1"),
        (1, "kind", -1, "kind in 0..1"),
        (0, "length", 0, "length in 1..64"),
        (0, "length", -(2**31), "length in 1..64"),
        (0, "length", 2**31 - 1, "length in 1..64"),
        (0, "length", 3, "end to end"),
        (1, "length", 3, "height and width"),
        (0, "height", 1, "height and width"),
        (1, "height", 0, "height and width"),
        (1, "height", -2, "height and width"),
        (1, "width", 2**31 - 2, "height and width"),
        (0, "offset", 1, "end to end"),
        (2, "offset", -1, "end to end"),
        (3, "offset", 2**31 - 1, "end to end"),
    ],
)
def test_a_changed_number_of_a_segment_is_found(row, column, value, reason):
    with pytest.raises(InputError, match=reason) as error:
        validate_pack(damaged(row, column, value), (GREY,), 256, 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "change", "reason"),
    [
        ("tokens", lambda a: a[:-1], "end to end"),
        ("tokens", lambda a: np.append(a, a), "end to end"),
        ("tokens", lambda a: a + 254, r"in 0\.\.255, got 255\.\.257"),
        ("tokens", lambda a: a - 2, r"in 0\.\.255, got -1"),
        ("latents", lambda a: a.astype(np.float16), "latents of a pack must be uint8"),
        ("latents", lambda a: np.append(a, a), "end to end"),
        ("latents", lambda a: a[:-1], "cover its 7 latents end to end, got 8"),
        ("segments", lambda a: a[:0], "must be one row or more"),
        ("weights", lambda a: a[:-1], "weights of a pack must be 3 numbers from 0 on"),
        ("weights", lambda a: -a, "numbers from 0 on, one a segment, got"),
        ("weights", lambda a: a + np.array([0, np.nan, 0], np.float32), "numbers from 0 on"),
        ("weights", lambda a: np.full_like(a, np.inf), "numbers from 0 on"),
        ("segments", lambda a: a + np.array([1, 0, 0, 0, 0, 0], np.int32), "number its documents"),
    ],
)
def test_a_changed_array_is_found(field, change, reason):
    pack = make_pack([(replace(text(1, 2), weight=2.0), image(2, 4)), (text(3),)], (GREY,))
    validate_pack(pack, (GREY,), 256, 64)
    with pytest.raises(InputError, match=reason):
        validate_pack(replace(pack, **{field: change(getattr(pack, field))}), (GREY,), 256, 64)


@given(st.lists(st.integers(-1, 4) | st.integers(-(2**31), 2**31 - 1), min_size=12, max_size=12))
def test_validation_of_any_numbers_ends_in_a_pack_that_can_be_read_or_an_input_error(numbers):
    pack = Pack(np.arange(4, dtype=np.int32), np.array(numbers, np.int32).reshape(2, 6), np.zeros(8, np.uint8))
    try:
        validate_pack(pack, MODALITIES, 256, 2**40)
    except InputError:
        return
    pack.documents(MODALITIES)


def test_a_size_that_is_zero_modulo_2_to_the_64_is_found():
    huge = ModalityInfo("huge", channels=2**15, patch_size=2**15, encoding="pixels")
    rows = np.array([[0, 1, 0, 2**19, 2**25, 2**24]], np.int32)
    with pytest.raises(InputError, match="cover its 0 latents end to end, got 18446744073709551616"):
        validate_pack(Pack(np.empty(0, np.int32), rows, np.empty(0, np.uint8)), (huge,), 256, 2**24)
