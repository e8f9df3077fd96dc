"""The page of a pack: what the model sees of it, in order, and nothing that a document could smuggle in."""

import base64
import io
import re

import numpy as np
import pytest
from build_cases import TOKENIZER
from PIL import Image

from transfusion_fast.config import Config
from transfusion_fast.data.batch import KeyedPack
from transfusion_fast.data.loader import batch_builder
from transfusion_fast.data.pack import ImageSegment, ModalityInfo, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.prepare.examples.built_in import prepare
from transfusion_fast.prepare.preview import Picture, Special, page, shown_documents

PIXELS = ModalityInfo("photos", channels=3, patch_size=2, encoding="pixels")
LATENTS = ModalityInfo("latents", channels=4, patch_size=2, encoding="latents")
GRADIENT = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
CAT = TextSegment(TOKENIZER.encode("cat"))


def preview(folder, document, modality=PIXELS, epoch=0, decode=None, size_tokens=0, **data):
    prepare([document], folder, sequence_length=128, tokenizer=TOKENIZER, modalities=(modality,))
    reader = PackReader(folder)
    model = {"num_text_tokens": 256, "dim_latent": modality.channels * 4, "size_tokens": size_tokens}
    config = Config.model_validate({"model": model, "data": data})
    keyed = KeyedPack(reader.read(0), epoch, 0)
    return shown_documents(keyed, batch_builder(config, reader.index, packs=1), TOKENIZER, decode)


def shape(pieces):
    return [f"<{p.name}>" if isinstance(p, Special) else p if isinstance(p, str) else "IMAGE" for p in pieces]


def picture(*arguments, **settings):
    [found] = [piece for pieces in preview(*arguments, **settings) for piece in pieces if isinstance(piece, Picture)]
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"caption_first": 1.0, "prob_uncond": 0.0}, [["<bos>", "cat", "<boi 0>", "IMAGE", "<eoi 0>", "<eos>"]]),
        ({"caption_first": 0.0, "prob_uncond": 0.0}, [["<bos>", "<boi 0>", "IMAGE", "<eoi 0>", "cat", "<eos>"]]),
        ({"caption_first": 1.0, "prob_uncond": 1.0}, [["<bos>", "cat"], ["<boi 0>", "IMAGE", "<eoi 0>", "<eos>"]]),
        (
            {"caption_first": 1.0, "prob_uncond": 1.0, "size_tokens": 3},
            [["<bos>", "cat"], ["<boi 0>", "<size 2>", "<size 3>", "IMAGE", "<eoi 0>", "<eos>"]],
        ),
    ],
)
def test_order_and_drop_are_those_that_the_run_draws(tmp_path, settings, expected):
    documents = preview(tmp_path / "out", (CAT, ImageSegment(GRADIENT)), **settings)
    assert [shape(pieces) for pieces in documents] == expected


def test_an_image_is_shown_as_it_is_and_with_its_noise(tmp_path):
    document = (CAT, ImageSegment(GRADIENT), TextSegment(TOKENIZER.encode("!")))
    assert shape(preview(tmp_path / "0", document)[0]) == ["<bos>", "cat", "<boi 0>", "IMAGE", "<eoi 0>", "!", "<eos>"]
    shown = picture(tmp_path / "1", document[:2], noise_cap=1.0, caption_first=0.0, prob_uncond=0.0)
    clean, noisy = shown.images
    np.testing.assert_array_equal(clean, GRADIENT, strict=True)
    assert shown.caption == "photos, 6 x 4, t = 1"
    assert 0 < np.abs(noisy.astype(int) - GRADIENT).max() < 40
    other = picture(tmp_path / "2", document[:2], epoch=2, caption_first=1.0, prob_uncond=0.0)
    assert not np.array_equal(other.images[1], noisy)
    np.testing.assert_array_equal(other.images[0], GRADIENT)
    assert float(other.caption.rpartition(" ")[2]) > 300
    assert np.abs(other.images[1].astype(int) - GRADIENT).max() > 100, "noise follows the timestep"


def test_latents_are_shown_in_false_colours_or_decoded(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 4, 4)).astype(np.float16) * 7
    clean, _ = picture(tmp_path / "colours", (CAT, ImageSegment(values)), LATENTS).images
    assert clean.shape == (4, 4, 3) and (clean.min(), clean.max()) == (0, 255)
    order = np.argsort(values[..., :3].astype(np.float32), axis=None)
    assert (np.diff(clean.reshape(-1)[order].astype(int)) >= 0).all()

    def decode(latents):
        assert latents.shape == (1, 4, 4, 4)
        return np.repeat(np.repeat(latents[..., :3] * 10, 2, 1), 2, 2).astype(np.uint8)

    values = np.random.default_rng(0).integers(0, 20, (4, 4, 4)).astype(np.float16)
    clean, _ = picture(tmp_path / "decoded", (CAT, ImageSegment(values)), LATENTS, decode=decode).images
    np.testing.assert_array_equal(clean[::2, 1::2], values[..., :3] * 10)


def test_the_page_shows_markup_as_text():
    words = '<script>alert("x")</script> & more'
    shown = page("<b>title</b>", [[words, Special("bos"), Picture((GRADIENT,), "<i>")]])
    assert "<script" not in shown and "<b>title" not in shown and "<i>" not in shown
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; more" in shown
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', shown)[1]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), GRADIENT)
