"""Evaluation of a model that was trained on a known mapping, so that every figure has one right value."""

import math

import numpy as np
import pytest
import torch

from transfusion_fast import Transfusion
from transfusion_fast.data.images import pixels_to_latents
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.sampling.decoder import ImageSettings
from transfusion_fast.sampling.evaluation import Captioned, evaluate

BLACK, GREY, WHITE = (np.full((2, 2, 1), value, np.uint8) for value in (0, 128, 255))
TOKENIZER = ByteTokenizer()
SETTINGS = {"each": 3, "image": ImageSettings(steps=4, guidance=1, clip=1.0), "patch_size": 2}


def ids(text: str) -> torch.Tensor:
    return torch.from_numpy(TOKENIZER.encode(text)).long()


@pytest.fixture(scope="module")
def model() -> Transfusion:
    """A model that draws black for "a" and white for "b" and "c", and captions black with "a" and white with "b"."""
    torch.manual_seed(0)
    transformer = {"dim": 32, "depth": 1, "heads": 2, "ffn_dim": 32}
    model = Transfusion(dim_latent=4, transformer=transformer, diffusion={"process": "flow"})
    black, white = pixels_to_latents(np.stack([BLACK, WHITE]), 2)
    pairs = [[ids("a"), black], [ids("b"), white], [ids("c"), white], [black, ids("a")], [white, ids("b")]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
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


def test_drawing_is_repeatable_and_depends_on_the_seed_alone(model: Transfusion) -> None:
    data = captioned(("a", BLACK), ("b", WHITE))
    draws = [evaluate(model, TOKENIZER, data, data, **SETTINGS, seed=seed) for seed in (0, 0, 1)]
    (report, one), (_, again), (_, other) = draws
    assert report.text_perplexity is None and report.num_texts == 0
    assert all(np.array_equal(one[caption], again[caption]) for caption in "ab")
    assert not np.array_equal(one["a"], other["a"])
