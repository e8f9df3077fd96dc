"""The quality of a model of captioned images, measured on data that training did not see.

Four figures: the fraction of generated images that a classifier, fitted to training images, assigns to their prompt;
the Frechet distance between generated and held-out images; the fraction of held-out images that get exactly their
caption; and the perplexity of held-out text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from transfusion_fast.data.images import latents_to_pixels, pixels_to_latents
from transfusion_fast.data.pack import ImageSegment, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.decoder import generate_images, sample
from transfusion_fast.sampling.frechet import MIN_IMAGES, ImageFeatures, flat_pixels, frechet_distance
from transfusion_fast.sampling.settings import ImageSettings

MAX_FITTED = 10_000
"""Most training images that a classifier is fitted to, since its time grows with the square of their number."""
MAX_CAPTIONED = 1_000
"""Most held-out images that are captioned; packs hold images in random order."""


@dataclass(frozen=True)
class Captioned:
    """Images uint8 [n, height, width, channels] with n captions, and the texts of documents without an image."""

    images: np.ndarray
    captions: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The results of an evaluation; accuracies are in [0, 1]."""

    generated_accuracy: float
    """Fraction of the generated images that the classifier assigns to their prompt."""
    caption_accuracy: float
    """Fraction of the captioned images that get exactly their caption."""
    text_perplexity: float | None
    """Perplexity per token, <eos> included; None if no held-out document is text alone."""
    classifier_accuracy: float
    """Accuracy of the classifier on held-out real images, which a perfect generator would reach."""
    frechet_distance: float | None
    """Frechet distance (frechet.py) between the generated and all held-out images; None if there are fewer than
    MIN_IMAGES of either, or of training images."""
    frechet_floor: float | None
    """The same of as many training images, which a perfect generator would reach on average."""
    num_generated: int
    num_heldout: int
    """Held-out images."""
    num_captioned: int
    num_texts: int
    seconds: float


def read_captioned(folder: Path, tokenizer: Tokenizer) -> Captioned:
    """Read all packs of a data folder.

    Raises:
        InputError: a document is neither text nor one image and its caption, or images are not pixels of one size.
    """
    reader = PackReader(folder)
    images: list[np.ndarray] = []
    captions: list[str] = []
    texts: list[str] = []
    for number in range(len(reader)):
        for document in reader.read(number).documents(reader.index.modalities):
            text = "".join(tokenizer.decode(s.ids) for s in document if isinstance(s, TextSegment))
            own = [s.values for s in document if isinstance(s, ImageSegment)]
            if own and len(document) != 2:
                raise InputError(
                    f"{folder}: evaluation needs documents of one image and its caption, got one of {len(own)} "
                    f"images in {len(document)} parts; give --data of captioned images"
                )
            images.extend(own)
            (captions if own else texts).append(text)
    if not images or len({image.shape for image in images}) > 1 or images[0].dtype != np.uint8:
        raise InputError(f"{folder}: evaluation needs captioned pixel images of one size; give a folder of them")
    return Captioned(np.stack(images), tuple(captions), tuple(texts))


def evaluate(
    model: Transfusion,
    tokenizer: Tokenizer,
    train: Captioned,
    heldout: Captioned,
    *,
    each: int,
    image: ImageSettings,
    patch_size: int,
    seed: int = 0,
) -> tuple[Report, dict[str, np.ndarray]]:
    """Measure a model.

    Args:
        each: images drawn of every caption of `train`.
        image: how they are drawn, with noise from `seed`.

    Returns:
        (report, the drawn images of each caption, uint8 [each, height, width, channels]).
    """
    start = time.perf_counter()
    drawn = _draw_images(model, tokenizer, train, each, image, patch_size, seed)
    svm = optional_module("sklearn.svm", "examples")
    classifier = svm.SVC(gamma="scale").fit(flat_pixels(train.images[:MAX_FITTED]), train.captions[:MAX_FITTED])
    hits = [classifier.predict(flat_pixels(images)) == caption for caption, images in drawn.items()]
    captions = _caption_images(model, tokenizer, heldout.images[:MAX_CAPTIONED], patch_size)
    distance, floor = _frechet(np.concatenate([*drawn.values()]), train, heldout.images)
    report = Report(
        generated_accuracy=float(np.mean(hits)),
        caption_accuracy=float(np.mean([a == b for a, b in zip(captions, heldout.captions, strict=False)])),
        text_perplexity=_perplexity(model, tokenizer, heldout.texts) if heldout.texts else None,
        classifier_accuracy=float(classifier.score(flat_pixels(heldout.images), heldout.captions)),
        frechet_distance=distance,
        frechet_floor=floor,
        num_generated=each * len(drawn),
        num_heldout=len(heldout.images),
        num_captioned=len(captions),
        num_texts=len(heldout.texts),
        seconds=time.perf_counter() - start,
    )
    return report, drawn


def _draw_images(
    model: Transfusion,
    tokenizer: Tokenizer,
    train: Captioned,
    each: int,
    image: ImageSettings,
    patch_size: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Draw `each` images of every caption of `train`, in the size of its images."""
    captions = list(dict.fromkeys(train.captions))
    prompts = [[_ids(tokenizer, caption)] for caption in captions for _ in range(each)]
    height, width = train.images.shape[1:3]
    grid = (height // patch_size, width // patch_size)
    latents = generate_images(model, prompts, grid, image=image, seed=seed)
    pixels = latents_to_pixels(latents.numpy(), patch_size)
    return dict(zip(captions, pixels.reshape(len(captions), each, *pixels.shape[1:]), strict=True))


def _caption_images(model: Transfusion, tokenizer: Tokenizer, images: np.ndarray, patch_size: int) -> list[str]:
    """Return greedy captions of images uint8 [n, height, width, channels]."""
    latents = pixels_to_latents(images, patch_size)
    rows, columns = latents.shape[1:3]
    produced = sample(model, [[one] for one in latents], grids=[(rows, columns)], max_images=0)
    return ["".join(tokenizer.decode(p.numpy()) for p in pieces if isinstance(p, torch.Tensor)) for pieces in produced]


def _frechet(drawn: np.ndarray, train: Captioned, heldout: np.ndarray) -> tuple[float | None, float | None]:
    """Return the distances of the drawn images, and of as many training images, to the held-out ones."""
    if min(map(len, (drawn, train.images, heldout))) < MIN_IMAGES:
        return None, None
    features = ImageFeatures(train.images, train.captions, MAX_FITTED)
    real, as_many = features(heldout), features(train.images[features.chosen[: len(drawn)]])
    return frechet_distance(features(drawn), real), frechet_distance(as_many, real)


@torch.no_grad()
def _perplexity(model: Transfusion, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return exp of the mean cross-entropy over all tokens of the texts, <eos> included."""
    return math.exp(model([[_ids(tokenizer, text)] for text in texts]).item())  # without images, all loss is text loss


def _ids(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode(text)).long()
