"""The digits data set: what its documents hold, and a split that stays as it is."""

import numpy as np
import pytest
from build_cases import TOKENIZER, words_of
from sklearn.datasets import load_digits

from transfusion_fast.data.pack import make_pack
from transfusion_fast.data.reader import PackReader
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.digits import (
    DIGIT_WORDS,
    MODALITY,
    Digits,
    InterleavedDigits,
    arithmetic_sentences,
    load_split,
)


def test_every_digit_is_in_one_split_that_is_fixed_and_in_proportion():
    (train, _), (heldout, labels) = load_split("train"), load_split("heldout")
    assert (len(train), len(heldout), train.dtype) == (1497, 300, np.uint8)
    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, np.concatenate([train, heldout]))) == sorted(map(bytes, original))
    np.testing.assert_allclose(np.bincount(labels), np.bincount(load_digits().target) / 6, atol=1)
    assert labels[:20].tolist() == [6, 0, 0, 5, 9, 0, 9, 5, 2, 6, 2, 7, 7, 2, 5, 9, 3, 8, 1, 0]
    with pytest.raises(InputError, match="split must be train or heldout, got 'test'"):
        load_split("test")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents_are_captioned_digits_then_sums(split):
    documents = Digits().documents(split, TOKENIZER)
    images, labels = load_split(split)
    for document, pixels, label in zip(documents[: len(images)], images, labels, strict=True):
        assert words_of(document) == DIGIT_WORDS[label]
        np.testing.assert_array_equal(document[1].values, pixels[..., None], strict=True)
        assert make_pack([document], (MODALITY,)).num_positions == 1 + len(words_of(document)) + 1 + 16 + 1 + 1
    assert [words_of(document) for document in documents[len(images) :]] == arithmetic_sentences(split)


def test_sums_are_right_and_split_nine_to_one():
    train, heldout = arithmetic_sentences("train"), arithmetic_sentences("heldout")
    assert (len(train), len(heldout), len({*train, *heldout})) == (229, 26, 100 + 55 + 100)
    assert {
        "two plus five is seven", "nine times nine is eighty one", "nine minus nine is zero",
        "four times five is twenty", "nine plus four is thirteen",
    } <= {*train, *heldout}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_interleaved_documents_name_and_show_four_digits_each_digit_once_and_end_in_text(split):
    documents, images = InterleavedDigits().documents(split, TOKENIZER), load_split(split)[0]
    pairs = {pair[1].values.tobytes(): words_of(pair) for pair in Digits().documents(split, TOKENIZER)[: len(images)]}
    rows = [document for document in documents if len(document) > 1]
    assert [len(row) for row in rows[:-1]] == [9] * (len(rows) - 1) and len(rows[-1]) == 2 * (len(images) % 4 or 4) + 1
    shown = [(words_of(row[i : i + 1]), row[i + 1].values) for row in rows for i in range(0, len(row) - 1, 2)]
    assert all(words == pairs[values.tobytes()] for words, values in shown)
    assert sorted(values.tobytes() for _, values in shown) == sorted(map(bytes, images))
    assert {words_of(row[-1:]) for row in rows} == {"end"}
    assert [words_of(document) for document in documents[len(rows) :]] == arithmetic_sentences(split)


def test_digits_are_cut_into_patches_of_a_size_that_divides_them(tmp_path):
    prepare_splits(Digits(), tmp_path / "wide", 64, 64, patch_size=4)
    reader = PackReader(tmp_path / "wide" / "heldout")
    [modality] = reader.index.modalities
    segments = np.concatenate([reader.read(number).segments for number in range(len(reader))])
    assert modality.patch_size == 4 and set(segments[segments[:, 1] == 1, 3].tolist()) == {4}  # patches of an image
    with pytest.raises(InputError, match="patch size must divide 8, the side of the images, got 3"):
        prepare_splits(Digits(), tmp_path / "odd", 64, 64, patch_size=3)
