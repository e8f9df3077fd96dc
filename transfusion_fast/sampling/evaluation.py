"""How good a run on captioned images is, measured on packs that training did not see.

Three numbers: how many generated images a classifier, fitted to training images, takes for what the prompt said;
how many held-out images get exactly their caption; the perplexity of held-out text.
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
from transfusion_fast.data.pack import Document, ImageSegment, TextSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import Tokenizer
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.model.inputs import pack_documents
from transfusion_fast.model.sequence import Text
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.decoder import ImageSettings, generate_images, sample

FITTED = 10_000
"""Training images, at most, that the classifier is fitted to: its time grows with the square."""
CAPTIONED = 1_000
"""Held-out images, at most, that are captioned; packs have them in random order."""


@dataclass(frozen=True)
class Captioned:
    """Images uint8 [n, height, width, channels] with their captions, and the texts that stand alone."""

    images: np.ndarray
    captions: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was measured: accuracies in [0, 1], perplexity per token with <eos>, and over how many."""

    generated_accuracy: float
    caption_accuracy: float
    text_perplexity: float | None
    """None where no held-out text stands alone."""
    classifier_accuracy: float
    """Of the classifier itself, on held-out real images: what a perfect generator would score."""
    num_generated: int
    num_captioned: int
    num_texts: int
    seconds: float


def read_captioned(folder: Path, tokenizer: Tokenizer) -> Captioned:
    """Reads all packs of a folder; InputError where its images are not pixels of one size."""
    reader = PackReader(folder)
    images: list[np.ndarray] = []
    captions, texts = [], []
    for number in range(len(reader)):
        for document in reader.read(number).documents(reader.index.modalities):
            words = "".join(tokenizer.decode(s.ids) for s in document if isinstance(s, TextSegment))
            pictures = _pictures(document)
            if pictures and len(document) != 2:
                raise InputError(
                    f"{folder}: evaluation needs documents of one image and its caption, got one of {len(pictures)} "
                    f"images in {len(document)} parts; give --data of captioned images"
                )
            images.extend(pictures)
            captions.extend([words] * len(pictures))
            if not pictures:
                texts.append(words)
    if not images or len({image.shape for image in images}) > 1 or images[0].dtype != np.uint8:
        raise InputError(f"{folder}: evaluation needs captioned pixel images of one size; give a folder of such")
    return Captioned(np.stack(images), tuple(captions), tuple(texts))


def generated_accuracy(
    model: Transfusion,
    tokenizer: Tokenizer,
    train: Captioned,
    heldout: Captioned,
    *,
    each: int,
    image: ImageSettings,
    patch_size: int,
    seed: int = 0,
) -> tuple[float, float, dict[str, np.ndarray]]:
    """Draws `each` images of every caption and classifies them.

    Returns:
        (accuracy on the drawn images, accuracy on held-out real ones, the drawn images of each caption in uint8).
    """
    svm = optional_module("sklearn.svm", "examples")
    classifier = svm.SVC(gamma="scale").fit(_features(train.images[:FITTED]), train.captions[:FITTED])
    captions = sorted(set(train.captions), key=train.captions.index)
    prompts = [[torch.from_numpy(tokenizer.encode(caption)).long()] for caption in captions for _ in range(each)]
    height, width = train.images.shape[1:3]
    generator = torch.Generator().manual_seed(seed)
    grid = (height // patch_size, width // patch_size)
    drawn = generate_images(model, prompts, grid, image=image, generator=generator)
    pixels = latents_to_pixels(drawn.numpy(), patch_size)
    wanted = np.repeat(captions, each)
    accuracy = float(np.mean(classifier.predict(_features(pixels)) == wanted))
    real = float(classifier.score(_features(heldout.images), heldout.captions))
    return accuracy, real, dict(zip(captions, pixels.reshape(len(captions), each, *pixels.shape[1:]), strict=True))


def caption_images(model: Transfusion, tokenizer: Tokenizer, images: np.ndarray, patch_size: int) -> list[str]:
    """Greedy captions of uint8 images [n, height, width, channels]."""
    prompts = [[latents] for latents in pixels_to_latents(images, patch_size)]
    grid = prompts[0][0].shape[:2]
    produced = sample(model, prompts, grids=[(grid[0], grid[1])], max_images=0)
    return ["".join(tokenizer.decode(p.ids.numpy()) for p in pieces if isinstance(p, Text)) for pieces in produced]


@torch.no_grad()
def text_perplexity(model: Transfusion, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """exp of the mean cross-entropy over all tokens of the texts, <eos> included."""
    documents = [[Text(torch.from_numpy(tokenizer.encode(text)).long())] for text in texts]
    batch = pack_documents(documents, model.config).to(model.device)
    return math.exp(model(batch).text.item())


def evaluate(
    model: Transfusion,
    tokenizer: Tokenizer,
    train: Captioned,
    heldout: Captioned,
    *,
    each: int,
    image: ImageSettings,
    patch_size: int,
) -> tuple[Report, dict[str, np.ndarray]]:
    """All three measurements, and the images that were drawn for the first."""
    began = time.perf_counter()
    accuracy, real, drawn = generated_accuracy(
        model, tokenizer, train, heldout, each=each, image=image, patch_size=patch_size
    )
    captions = caption_images(model, tokenizer, heldout.images[:CAPTIONED], patch_size)
    report = Report(
        generated_accuracy=accuracy,
        caption_accuracy=float(np.mean([a == b for a, b in zip(captions, heldout.captions, strict=False)])),
        text_perplexity=text_perplexity(model, tokenizer, heldout.texts) if heldout.texts else None,
        classifier_accuracy=real,
        num_generated=each * len(drawn),
        num_captioned=len(captions),
        num_texts=len(heldout.texts),
        seconds=time.perf_counter() - began,
    )
    return report, drawn


def _pictures(document: Document) -> list[np.ndarray]:
    return [s.values for s in document if isinstance(s, ImageSegment)]


def _features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0
