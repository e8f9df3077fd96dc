"""The digits data set: what its documents hold, and a split that stays as it is."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from transfusion_fast.data.pack import make_pack
from transfusion_fast.data.tokenizer import ByteTokenizer, load_tokenizer
from transfusion_fast.errors import InputError
from transfusion_fast.prepare.examples.digits import DIGIT_WORDS, MODALITY, Digits, arithmetic_sentences, load_split

TOKENIZER = ByteTokenizer()


def test_every_digit_is_in_one_split():
    train, heldout = load_split("train"), load_split("heldout")
    assert (len(train[0]), len(heldout[0])) == (1497, 300)
    together = np.concatenate([train[0], heldout[0]])
    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in original)


def test_every_class_is_held_out_in_proportion():
    labels = load_split("heldout")[1]
    everything = np.bincount(load_digits().target)
    np.testing.assert_allclose(np.bincount(labels), everything / 6, atol=1)


def test_the_split_is_fixed():
    assert load_split("heldout")[1][:20].tolist() == [6, 0, 0, 5, 9, 0, 9, 5, 2, 6, 2, 7, 7, 2, 5, 9, 3, 8, 1, 0]
    np.testing.assert_array_equal(load_split("train")[0], load_split("train")[0])


def test_pixels_span_the_range_of_uint8():
    images = load_split("train")[0]
    assert (images.dtype, images.shape[1:]) == (np.uint8, (8, 8))
    assert set(np.unique(images)) == {round(value * 255 / 16) for value in range(17)}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents_are_captioned_digits_then_sums(split):
    documents = Digits().documents(split, TOKENIZER)
    images, labels = load_split(split)
    for (caption, image), pixels, label in zip(documents[: len(images)], images, labels, strict=True):
        assert TOKENIZER.decode(caption.ids) == DIGIT_WORDS[label]
        np.testing.assert_array_equal(image.values, pixels[..., None], strict=True)
    assert [TOKENIZER.decode(text.ids) for (text,) in documents[len(images) :]] == arithmetic_sentences(split)


def test_a_captioned_digit_takes_sixteen_patches():
    caption, image = Digits().documents("heldout", TOKENIZER)[0]
    assert make_pack([(caption, image)], (MODALITY,)).num_positions == 1 + len(caption.ids) + 1 + 16 + 1 + 1


def test_sums_are_right_and_split_nine_to_one():
    train, heldout = arithmetic_sentences("train"), arithmetic_sentences("heldout")
    assert (len(train), len(heldout)) == (229, 26)
    assert len(set(train + heldout)) == 100 + 55 + 100
    for sentence in ("two plus five is seven", "nine times nine is eighty one", "nine minus nine is zero"):
        assert sentence in train + heldout
    assert "four times five is twenty" in train + heldout
    assert "nine plus four is thirteen" in train + heldout


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="split must be train or heldout, got 'test'"):
        load_split("test")


def test_bytes_give_their_text_back():
    text = "Zahl: 七, π\n\0"
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([0xE4, 0x41]) == "�A"


def test_a_tokenizer_is_loaded_from_its_description_only(tmp_path):
    description = TOKENIZER.describe()
    assert load_tokenizer(description, tmp_path).describe() == description
    for field, value in {"name": "bpe", "num_text_tokens": 512, "sha256": "0" * 64}.items():
        with pytest.raises(InputError, match=repr(value)):
            load_tokenizer({**description, field: value}, tmp_path)
