"""Evaluation of a model that was trained on a known mapping, so that every figure has one right value."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import random_pixels, save_vision_encoder
from PIL import Image

from transfusion_fast import Transfusion
from transfusion_fast.data.images import pixels_to_latents
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.data.vision_encoder import read_vision_encoder
from transfusion_fast.sampling.evaluation import evaluate
from transfusion_fast.sampling.frechet import ImageFeatures, frechet_distance
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.sampling.subject import Captioned, Subject

BLACK, GREY, WHITE = (np.full((2, 2, 1), value, np.uint8) for value in (0, 128, 255))
TOKENIZER = ByteTokenizer()
TRANSFORMER = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32}
SETTINGS = {"each": 3, "image": ImageSettings(steps=8, guidance=1, clip=1.0)}
MODALITIES = (ModalityInfo("image", channels=1, patch_size=2, encoding="pixels"),)


def ids(text: str) -> torch.Tensor:
    return torch.from_numpy(TOKENIZER.encode(text)).long()


@pytest.fixture(scope="module")
def model() -> Transfusion:
    """A model that draws black for "a" and white for "b" and "c", and captions black with "a" and white with "b"."""
    torch.manual_seed(0)
    model = Transfusion(dim_latent=4, transformer=TRANSFORMER, diffusion={"process": "flow", "prediction": "x0"})
    black, white = pixels_to_latents(np.stack([BLACK, WHITE]), 2)
    pairs = [[ids("a"), black], [ids("b"), white], [ids("c"), white], [black, ids("a")], [white, ids("b")]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        model(pairs * 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def captioned(*pairs: tuple[str, np.ndarray], texts: tuple[str, ...] = ()) -> Captioned:
    return Captioned(np.stack([image for _, image in pairs]), tuple(caption for caption, _ in pairs), texts)


def test_every_figure_is_that_of_the_known_mapping(model: Transfusion) -> None:
    train = captioned(*[("a", BLACK), ("b", WHITE), ("c", GREY)] * 4)
    heldout = captioned(("a", BLACK), ("b", WHITE), ("b", BLACK), ("bb", WHITE), ("c", GREY), texts=("ab", "c"))
    report, drawn = evaluate(Subject(model, TOKENIZER, MODALITIES), train, heldout, **SETTINGS)
    assert {c: images.mean() for c, images in drawn.items()} == pytest.approx({"a": 0, "b": 255, "c": 255}, abs=30)
    assert (report.num_generated, report.num_captioned, report.num_texts) == (9, 5, 2)
    assert report.generated_accuracy == pytest.approx(2 / 3)  # the model draws "c" as white, which is "b"
    assert report.classifier_accuracy == pytest.approx(3 / 5)
    assert report.caption_accuracy == pytest.approx(2 / 5)
    with torch.no_grad():
        total = 3 * model([[ids("ab")]]).item() + 2 * model([[ids("c")]]).item()  # tokens with <eos>
    assert report.text_perplexity == pytest.approx(math.exp(total / 5), rel=1e-4)


def test_the_frechet_distance_is_measured_of_64_images_and_its_floor_of_as_many_training_images(
    model: Transfusion,
) -> None:
    levels = np.random.default_rng(0).integers(0, 128, (300, 2, 2, 1)).astype(np.uint8)
    images = np.concatenate([levels[:100], levels[100:] + 128])
    train, few = (Captioned(x, ("a",) * 100 + ("b",) * (len(x) - 100), ()) for x in (images[:240], images[:163]))
    heldout = Captioned(images[230:], ("b",) * 70, ())
    report, drawn = evaluate(Subject(model, TOKENIZER, MODALITIES), train, heldout, **{**SETTINGS, "each": 32})
    features = ImageFeatures(train.images, train.captions, 10_000)
    distances = [
        frechet_distance(features(x), features(heldout.images))
        for x in (np.concatenate([drawn["a"], drawn["b"]]), train.images[features.chosen[:64]])
    ]
    assert [report.frechet_distance, report.frechet_floor] == pytest.approx(distances)
    assert (report.num_generated, report.num_heldout) == (64, 70) and min(distances) > 1e-3
    few_train = Captioned(images[69:132], ("a",) * 31 + ("b",) * 32, ())
    few_heldout = Captioned(images[237:], ("b",) * 63, ())
    for each, fitted, other in ((31, few, heldout), (32, few, few_heldout), (32, few_train, heldout)):
        report, _ = evaluate(Subject(model, TOKENIZER, MODALITIES), fitted, other, **{**SETTINGS, "each": each})
        assert report.frechet_distance is None and report.frechet_floor is None


def test_drawing_is_repeatable_and_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Transfusion(dim_latent=4, transformer=TRANSFORMER).eval()  # untrained, it draws something else each time
    monkeypatch.setattr("transfusion_fast.sampling.evaluation.MAX_CAPTIONED", 1)
    data = captioned(*((caption, np.tile(image, (1, 2, 1))) for caption, image in (("a", BLACK), ("b", WHITE))))
    draws = [evaluate(Subject(model, TOKENIZER, MODALITIES), data, data, **SETTINGS, seed=seed) for seed in (0, 0, 1)]
    (report, one), (_, again), (_, other) = draws
    assert report.text_perplexity is None and report.num_texts == 0
    assert (report.num_captioned, report.num_heldout, one["a"].shape) == (1, 2, (3, 2, 4, 1))
    assert all(np.array_equal(one[caption], again[caption]) for caption in "ab")
    assert not np.array_equal(one["a"], other["a"])


def test_images_of_several_sizes_are_drawn_in_the_size_of_their_caption_and_the_classifier_says_what_it_lacks(
    model: Transfusion,
) -> None:
    tall = np.tile(WHITE, (2, 1, 1))
    data = Captioned([BLACK, tall, tall], ("a", "b", "c"), ())
    report, drawn = evaluate(Subject(model, TOKENIZER, MODALITIES), data, data, **SETTINGS)
    assert [drawn[caption].shape[1:3] for caption in "abc"] == [(2, 2), (4, 2), (4, 2)]
    assert report.num_captioned == 3 and report.caption_accuracy is not None and report.generated_accuracy is None
    assert report.not_measured["generated_accuracy"] == "a classifier needs images of one size"
    alone, _ = evaluate(Subject(model, TOKENIZER, MODALITIES), None, captioned(("a", BLACK)), **SETTINGS)
    assert alone.caption_accuracy == 1 and alone.frechet_floor is alone.classifier_accuracy is None
    assert alone.not_measured["classifier_accuracy"] == "there are no captioned training images"


def test_captions_of_all_documents_with_an_image_are_its_references(model: Transfusion, monkeypatch) -> None:
    bleu = pytest.importorskip("sacrebleu").corpus_bleu
    monkeypatch.setattr(Subject, "caption", lambda self, images, _: ["one two three four"] * len(images))
    references = ("one two three five", "one two three four", "one two six four")
    heldout = captioned((references[0], BLACK), (references[1], BLACK), (references[2], WHITE))
    report, _ = evaluate(Subject(model, TOKENIZER, MODALITIES), None, heldout, **SETTINGS)
    expected = bleu(["one two three four"] * 2, [[references[0], references[2]], [references[1], None]]).score
    assert report.caption_bleu == pytest.approx(expected) and 0 < expected < 100
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    report, _ = evaluate(Subject(model, TOKENIZER, MODALITIES), None, heldout, **SETTINGS)
    assert report.caption_bleu is None and "pip install '.[evaluation]'" in report.not_measured["caption_bleu"]


def test_the_frechet_distance_is_over_the_features_of_a_given_encoder(model: Transfusion, tmp_path: Path) -> None:
    save_vision_encoder(tmp_path)
    encoder = read_vision_encoder(tmp_path)
    images = random_pixels(40, 2, 2, 1)
    data = Captioned(images, ("a", "b") * 20, ())
    report, drawn = evaluate(
        Subject(model, TOKENIZER, MODALITIES), data, data, encoder=encoder, **{**SETTINGS, "each": 16}
    )
    scaled = [
        np.stack([np.asarray(Image.fromarray(x[..., 0]).resize((16, 16), Image.Resampling.BICUBIC)) for x in some])
        for some in (np.concatenate([*drawn.values()]), images)
    ]
    one, other = (encoder.encode(x[..., None].repeat(3, 3)).astype(np.float64).mean((1, 2)) for x in scaled)
    assert report.frechet_distance == pytest.approx(frechet_distance(one, other), rel=1e-4)
    assert report.frechet_floor is not None and report.num_generated == 32
    few = data.first(31)
    report, _ = evaluate(Subject(model, TOKENIZER, MODALITIES), data, few, encoder=encoder, **SETTINGS)
    assert report.not_measured["frechet_distance"] == "it needs 32 images of each kind, got 6 drawn, 31 held out"
