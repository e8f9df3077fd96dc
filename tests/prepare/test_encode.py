"""Source documents become documents that fit a pack, and nothing of them is lost in silence."""

import numpy as np
import pytest
from build_cases import RGB, TOKENIZER
from hypothesis import given
from hypothesis import strategies as st
from image_files import picture, png

from transfusion_fast.data.pack import TextSegment, make_pack
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare import encode as encoding
from transfusion_fast.prepare import fitting
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import ImageRule
from transfusion_fast.prepare.sources.base import SourceDocument

PNG = png(picture(8, 8))


def encoded(encoder, *parts):
    [found] = encoder.encode([SourceDocument("here", parts)])
    if isinstance(found, Rejected):
        raise found
    return found


def encode(parts, sequence_length=32, size=8, **options):
    return encoded(Encoder(TOKENIZER, sequence_length, (RGB,), ImageRule("crop", size, 4), **options), *parts)


def content(document):
    return [TOKENIZER.decode(s.ids) if isinstance(s, TextSegment) else s.values.shape[:2] for s in document]


def test_texts_and_images_keep_their_order():
    [document] = encode(["a", PNG, "b"])
    assert content(document) == ["a", (8, 8), "b"]
    assert np.array_equal(document[1].values, picture(8, 8))


@given(st.lists(st.one_of(st.text("ab. \n", max_size=60), st.just(PNG)), max_size=6), st.integers(9, 40))
def test_documents_fit_and_hold_every_part(parts, sequence_length):
    expected = [part for part in parts if part]
    if not expected:
        with pytest.raises(Rejected, match="empty document"):
            encode(parts, sequence_length)
        return
    documents = encode(parts, sequence_length)
    assert all(make_pack([document], (RGB,)).num_positions <= sequence_length for document in documents)
    found = [entry for document in documents for entry in content(document)]
    assert "".join(entry for entry in found if isinstance(entry, str)) == "".join(p for p in expected if p != PNG)
    assert found.count((8, 8)) == expected.count(PNG)


def test_a_text_that_does_not_fit_behind_another_begins_a_document_of_its_own():
    assert [content(d) for d in encode(["x" * 12, "y" * 20])] == [["x" * 12, "y" * 18], ["yy"]]
    assert [content(d) for d in encode(["x" * 15, "y" * 20])] == [["x" * 15, "y" * 15], ["y" * 5]]
    assert [content(d) for d in encode(["x" * 16, "y" * 20])] == [["x" * 16], ["y" * 20]]


def test_each_piece_of_a_cut_text_begins_a_document_even_if_it_would_fit_behind_the_one_before():
    assert [content(d) for d in encode(["aaa\nbbb ccccc"], sequence_length=10)] == [["aaa\n"], ["bbb "], ["ccccc"]]


def test_what_does_not_fit_is_rejected(monkeypatch):
    assert len(encode(["x" * 30], long="reject")) == 1
    with pytest.raises(Rejected, match="too long: it takes more than 32 positions, here"):
        encode(["x" * 31], long="reject")
    assert len(encode([PNG], sequence_length=20, size=16)) == 1
    with pytest.raises(InputError, match=r"images must fit a pack of 19, got 18 positions for each; give a larger"):
        encode([PNG], sequence_length=19, size=16)
    with pytest.raises(Rejected, match=r"image in text: .*, here"):
        encoded(Encoder(TOKENIZER, 32), "a", b"x")
    monkeypatch.setattr(encoding, "_MAX_PIXEL_BYTES", 3 * 8 * 8 * 3)
    assert len(encode([PNG] * 3)[0]) == 3
    with pytest.raises(Rejected, match="document too large"):
        encode([PNG] * 4)


def test_parts_keep_their_weights_alone_and_beside_an_image_that_is_left_out():
    encoder = Encoder(TOKENIZER, 32, (RGB,), ImageRule("crop", 8, 4), bad_images="skip")
    for parts, weights, expected in (
        (("ab",), (0.5,), [("ab", 0.5)]),
        (("a", b"broken", "b", PNG), (0.5, 1.0, 2.0, 3.0), [("a", 0.5), ("b", 2.0), ((8, 8), 3.0)]),
    ):
        *repaired, [document] = encoder.encode([SourceDocument("here", parts, weights)])
        assert len(repaired) == parts.count(b"broken")
        assert [*zip(content(document), (part.weight for part in document), strict=True)] == expected


@pytest.mark.parametrize("length", [4, 2**24 + 1])
def test_pack_lengths_beyond_the_limits_are_refused(length):
    with pytest.raises(InputError, match=f"sequence length must be in 5..16777216, got {length}"):
        Encoder(TOKENIZER, length)


def test_a_text_of_many_packs_is_encoded_in_blocks_and_none_of_it_is_lost(monkeypatch):
    monkeypatch.setattr(fitting, "_BLOCK", 500)
    monkeypatch.setattr(fitting, "_BLOCK_PACKS", 4)
    longest = []

    class Measured(ByteTokenizer):
        def encode_with_starts(self, text):
            longest.append(len(text))
            return super().encode_with_starts(text)

    text = " ".join(f"This is sentence {number}." for number in range(500))
    parts = encoded(Encoder(Measured(), 64), text)
    assert 250 < max(longest) <= 500
    assert "".join(TOKENIZER.decode(segment.ids) for part in parts for segment in part) == text
    assert all(len(segment.ids) <= 62 for part in parts for segment in part)
