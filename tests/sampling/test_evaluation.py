"""Evaluation of a model that was trained on a known mapping, so that every figure has one right value."""

import math

import numpy as np
import pytest
import torch

from transfusion_fast import Transfusion
from transfusion_fast.data.images import pixels_to_latents
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.sampling.evaluation import Captioned, evaluate
from transfusion_fast.sampling.frechet import ImageFeatures, frechet_distance
from transfusion_fast.sampling.settings import ImageSettings

BLACK, GREY, WHITE = (np.full((2, 2, 1), value, np.uint8) for value in (0, 128, 255))
TOKENIZER = ByteTokenizer()
TRANSFORMER = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32}
SETTINGS = {"each": 3, "image": ImageSettings(steps=8, guidance=1, clip=1.0), "patch_size": 2}


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
    report, drawn = evaluate(model, TOKENIZER, train, heldout, **SETTINGS)
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
    report, drawn = evaluate(model, TOKENIZER, train, heldout, **{**SETTINGS, "each": 32})
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
        report, _ = evaluate(model, TOKENIZER, fitted, other, **{**SETTINGS, "each": each})
        assert report.frechet_distance is None and report.frechet_floor is None


def test_drawing_is_repeatable_and_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Transfusion(dim_latent=4, transformer=TRANSFORMER).eval()  # untrained, it draws something else each time
    monkeypatch.setattr("transfusion_fast.sampling.evaluation.MAX_CAPTIONED", 1)
    data = captioned(*((caption, np.tile(image, (1, 2, 1))) for caption, image in (("a", BLACK), ("b", WHITE))))
    draws = [evaluate(model, TOKENIZER, data, data, **SETTINGS, seed=seed) for seed in (0, 0, 1)]
    (report, one), (_, again), (_, other) = draws
    assert report.text_perplexity is None and report.num_texts == 0
    assert (report.num_captioned, report.num_heldout, one["a"].shape) == (1, 2, (3, 2, 4, 1))
    assert all(np.array_equal(one[caption], again[caption]) for caption in "ab")
    assert not np.array_equal(one["a"], other["a"])
