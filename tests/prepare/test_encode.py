"""Raw documents become documents that fit a pack, and nothing of them is lost without a word."""

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment, document_length
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare import encode as encoding
from transfusion_fast.prepare import fitting
from transfusion_fast.prepare.encode import Encoder, ImageRule
from transfusion_fast.prepare.sources.base import RawDocument

TOKENIZER = ByteTokenizer()
RGB = ModalityInfo("images", channels=3, patch_size=4, encoding="pixels")


def png(height, width, seed=0):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoder(sequence_length, long="split", shape="crop", size=8):
    return Encoder(TOKENIZER, sequence_length, RGB, ImageRule(shape, size, 4), long)


def encode(parts, sequence_length=32, **options):
    return encoder(sequence_length, **options)(RawDocument("here", tuple(parts)))


def words(document):
    return [TOKENIZER.decode(s.ids) if isinstance(s, TextSegment) else s.values.shape[:2] for s in document]


def test_texts_and_images_keep_their_order():
    [document] = encode(["a", png(8, 8), "b"])
    assert words(document) == ["a", (8, 8), "b"]
    assert np.array_equal(document[1].values, np.asarray(Image.open(io.BytesIO(png(8, 8)))))


@given(st.lists(st.one_of(st.text("ab. \n", max_size=60), st.just(png(8, 8))), max_size=6), st.integers(9, 40))
def test_parts_fit_and_hold_everything(parts, sequence_length):
    expected = [part for part in parts if part]
    if not expected:
        with pytest.raises(Rejected, match="empty document"):
            encode(parts, sequence_length)
        return
    documents = encode(parts, sequence_length)
    assert all(document_length(document, (RGB,)) <= sequence_length for document in documents)
    segments = [segment for document in documents for segment in document]
    texts = "".join(TOKENIZER.decode(s.ids) for s in segments if isinstance(s, TextSegment))
    assert texts == "".join(part for part in expected if isinstance(part, str))
    assert sum(isinstance(s, ImageSegment) for s in segments) == sum(isinstance(part, bytes) for part in expected)


def test_a_text_that_does_not_fit_behind_an_image_begins_a_document_of_its_own():
    assert [words(d) for d in encode(["x" * 12, "y" * 20])] == [["x" * 12, "y" * 18], ["yy"]]
    assert [words(d) for d in encode(["x" * 20, "y" * 20])] == [["x" * 20], ["y" * 20]]


def test_long_documents_are_rejected_where_that_is_asked_for():
    assert len(encode(["x" * 30], long="reject")) == 1
    with pytest.raises(Rejected, match="too long: it takes more than 32 positions"):
        encode(["x" * 31], long="reject")


def test_an_image_that_no_pack_holds_is_rejected():
    with pytest.raises(Rejected, match="image too long: its 18 positions do not fit a pack"):
        encode([png(16, 16)], sequence_length=18, size=16)


def test_text_alone_refuses_images():
    with pytest.raises(Rejected, match="image in text"):
        Encoder(TOKENIZER, 32)(RawDocument("here", ("a", b"x")))


def test_a_crop_is_the_middle_at_the_size_asked_for():
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 8:24] = 200
    assert np.array_equal(ImageRule("crop", 16, 4)(pixels), np.full((16, 16, 3), 200))
    for height, width in ((5, 7), (100, 8), (8, 100), (1, 300)):
        assert ImageRule("crop", 8, 4)(np.zeros((height, width, 3), dtype=np.uint8)).shape == (8, 8, 3)


@given(st.integers(4, 200), st.integers(4, 200))
def test_native_images_keep_their_shape_within_the_budget(height, width):
    rule = ImageRule("native", 32, 4)
    try:
        rows, columns, _ = rule(np.zeros((height, width, 3), dtype=np.uint8)).shape
    except Rejected as rejected:
        assert rejected.reason == "image too thin" and max(height, width) > 8 * min(height, width)
        return
    assert rows % 4 == columns % 4 == 0 and rows * columns <= 32 * 32
    scale = min(1, 32 / (height * width) ** 0.5)
    lost = np.array([height * scale - rows, width * scale - columns])
    assert (lost > -1e-6).all() and (lost < 4).all()


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_thin_image_takes_no_more_memory_than_it_has_pixels(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels.reshape(-1, 3)[9_995:10_005] = 200
    tracemalloc.start()
    square = ImageRule("crop", 256, 16)(pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert square.shape == (256, 256, 3) and square.min() == 200  # the middle pixel, enlarged
    assert peak < 1 << 20
    with pytest.raises(Rejected, match="image too thin"):
        ImageRule("native", 256, 16)(pixels)


def test_a_small_native_image_is_cut_and_not_scaled():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 9, 3), dtype=np.uint8)
    assert np.array_equal(ImageRule("native", 32, 4)(pixels), pixels[1:9, :8])


def test_sizes_that_cannot_be_cut_into_patches_are_refused():
    with pytest.raises(InputError, match="image size must be a positive multiple of 4, got 10"):
        ImageRule("crop", 10, 4)
    with pytest.raises(InputError, match="sequence length must be at least 5, got 4"):
        Encoder(TOKENIZER, 4)


def test_a_document_of_many_small_files_and_large_images_is_refused(monkeypatch):
    monkeypatch.setattr(encoding, "_MAX_PIXEL_BYTES", 3 * 8 * 8 * 3)
    [document] = encode([png(2, 2)] * 3)
    assert len(document) == 3
    with pytest.raises(Rejected, match="document too large"):
        encode([png(2, 2)] * 4)


def test_a_text_of_many_packs_is_encoded_in_blocks_and_none_of_it_is_lost(monkeypatch):
    monkeypatch.setattr(fitting, "_BLOCK", 500)
    monkeypatch.setattr(fitting, "_BLOCK_PACKS", 4)
    longest = []

    class Measured(ByteTokenizer):
        def encode_with_starts(self, text):
            longest.append(len(text))
            return super().encode_with_starts(text)

    text = " ".join(f"This is sentence {number}." for number in range(500))
    parts = Encoder(Measured(), 64)(RawDocument("here", (text,)))
    assert 250 < max(longest) <= 500
    assert "".join(ByteTokenizer().decode(segment.ids) for part in parts for segment in part) == text
    assert all(len(segment.ids) <= 62 for part in parts for segment in part)
