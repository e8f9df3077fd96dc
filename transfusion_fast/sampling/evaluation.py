"""The quality of a model, measured on documents that training did not see, and on what it draws for their captions.

What cannot be measured is None in the report, which has the reason.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from transfusion_fast.data.vision_encoder import VisionEncoder
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.sampling.clip import Clip
from transfusion_fast.sampling.frechet import (
    FEATURES,
    ImageFeatures,
    encoder_features,
    fixed_order,
    flat_pixels,
    frechet_distance,
)
from transfusion_fast.sampling.pictures import Images
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.sampling.subject import Captioned, Subject, Unmeasured, require

MAX_FITTED = 10_000
"""Most training images that a classifier is fitted to, since its time grows with the square of their number."""
MAX_CAPTIONED = 1_000
"""Most held-out images that are captioned, and most captions that are drawn; packs hold images in random order."""
MAX_HELDOUT = 10_000
"""Most held-out images that are compared with drawn ones."""
MAX_TEXTS = 10_000
"""Most held-out texts of which the perplexity is measured."""
MAX_CLASSES = 100
"""Most different captions of training images that count as classes."""


@dataclass(frozen=True)
class Report:
    """The results of an evaluation; accuracies are in [0, 1], and None is not measured."""

    generated_accuracy: float | None
    """Fraction of the generated images that the classifier assigns to their prompt."""
    caption_accuracy: float | None
    """Fraction of the captioned images that get exactly their caption."""
    text_perplexity: float | None
    """Perplexity per token of documents of text alone, <eos> included."""
    classifier_accuracy: float | None
    """Accuracy of the classifier on held-out real images, which a perfect generator would reach."""
    frechet_distance: float | None
    """Frechet distance (frechet.py) between the generated and the held-out images."""
    frechet_floor: float | None
    """The same of as many training images, which a perfect generator would reach on average."""
    caption_bleu: float | None
    """BLEU of the captions, 0 to 100, by sacrebleu; all captions of the same held-out image are its references."""
    clip_score: float | None
    """Mean CLIP score (clip.py) of the generated images with their prompts, 0 to 100."""
    clip_score_heldout: float | None
    """The same of the captioned held-out images with their captions."""
    num_generated: int
    num_heldout: int
    """Held-out images."""
    num_captioned: int
    num_texts: int
    num_others: int
    """Held-out documents that are neither text nor one image and its caption, of which only losses are measured."""
    not_measured: Mapping[str, str]
    """The reason for each figure that is None; CLIP scores that were not asked for are left out."""
    seconds: float


def evaluate(
    subject: Subject,
    train: Captioned | None,
    heldout: Captioned,
    *,
    each: int,
    image: ImageSettings,
    encoder: VisionEncoder | None = None,
    clip: Clip | None = None,
    seed: int = 0,
) -> tuple[Report, dict[str, np.ndarray]]:
    """Measure a model.

    Args:
        train: training documents, for the classifier; their captions are drawn if they are at most MAX_CLASSES, and
            otherwise those of `heldout`.
        each: images drawn of every caption.
        image: how they are drawn, with noise from `seed`.
        encoder: its features take the place of those of the classifier in the Frechet distance.

    Returns:
        (report, the drawn images of each caption, uint8 [each, height, width, channels]).
    """
    start = time.perf_counter()
    heldout = heldout.first(MAX_HELDOUT)
    if train is not None and subject.autoencoder is not None:
        train = train.first(MAX_FITTED)  # decoding takes long
    found = _Figures(subject, train, heldout, each, image, encoder, clip, seed)
    measures: dict[str, Callable[[], float]] = {
        "generated_accuracy": found.generated_accuracy,
        "classifier_accuracy": found.classifier_accuracy,
        "caption_accuracy": found.caption_accuracy,
        "caption_bleu": found.caption_bleu,
        "frechet_distance": found.frechet_distance,
        "frechet_floor": found.frechet_floor,
        "text_perplexity": found.text_perplexity,
    }
    if clip is not None:
        measures |= {"clip_score": found.clip_score, "clip_score_heldout": found.clip_score_heldout}
    figures: dict[str, float | None] = {"clip_score": None, "clip_score_heldout": None}
    reasons: dict[str, str] = {}
    for name, measure in measures.items():
        try:
            figures[name] = measure()
        except Unmeasured as reason:
            figures[name], reasons[name] = None, str(reason)
    drawn = found.drawn if found.can_draw else {}
    report = Report(
        **figures,
        num_generated=each * len(drawn),
        num_heldout=len(heldout.images),
        num_captioned=len(found.captioned),
        num_texts=len(found.texts),
        num_others=heldout.others,
        not_measured=reasons,
        seconds=time.perf_counter() - start,
    )
    return report, drawn


class _Figures:
    """The figures of an evaluation; each raises Unmeasured if it cannot be measured. They share what takes long."""

    def __init__(
        self,
        subject: Subject,
        train: Captioned | None,
        heldout: Captioned,
        each: int,
        image: ImageSettings,
        encoder: VisionEncoder | None,
        clip: Clip | None,
        seed: int,
    ) -> None:
        self.subject, self.train, self.heldout, self.encoder, self.clip = subject, train, heldout, encoder, clip
        self.each, self.image, self.seed = each, image, seed
        self.captioned, self.texts = heldout.images[:MAX_CAPTIONED], heldout.texts[:MAX_TEXTS]

    def generated_accuracy(self) -> float:
        classifier = self._classifier
        hits = [classifier.predict(flat_pixels(images)) == caption for caption, images in self.drawn.items()]
        return float(np.mean(hits))

    def classifier_accuracy(self) -> float:
        return float(self._classifier.score(flat_pixels(self._of_one_size(self._real)), self.heldout.captions))

    def caption_accuracy(self) -> float:
        return float(np.mean([a == b for a, b in zip(self._captions, self.heldout.captions, strict=False)]))

    def caption_bleu(self) -> float:
        try:
            bleu = optional_module("sacrebleu", "evaluation")
        except InputError as error:
            raise Unmeasured(str(error)) from error
        keys = [image.tobytes() for image in self.heldout.images]
        references: dict[bytes, list[str]] = defaultdict(list)
        for key, caption in zip(keys, self.heldout.captions, strict=True):
            references[key].append(caption)
        produced = dict(zip(keys, self._captions, strict=False))  # equal images get equal captions
        most = max(len(references[key]) for key in produced)
        padded = [[*references[key], *[None] * (most - len(references[key]))] for key in produced]
        found = bleu.corpus_bleu([*produced.values()], [*zip(*padded, strict=True)])
        require(found.totals[-1], "no caption that the model wrote has four words")
        return float(found.score)

    def frechet_distance(self) -> float:
        drawn = [image for images in self.drawn.values() for image in images]
        self._require_images(len(drawn), "drawn")
        return frechet_distance(self._features(drawn), self._real_features)

    def frechet_floor(self) -> float:
        as_many, captions = self.each * len(self.drawn), self._require_train().captions
        chosen = [self._fitted[number] for number in fixed_order(self._fitted, captions)[:as_many]]
        self._require_images(min(len(chosen), as_many), "in training")
        return frechet_distance(self._features(chosen), self._real_features)

    def clip_score(self) -> float:
        prompts = [caption for caption in self.drawn for _ in range(self.each)]
        return self._clip_score([image for images in self.drawn.values() for image in images], prompts)

    def clip_score_heldout(self) -> float:
        return self._clip_score(self._real[:MAX_CAPTIONED], self.heldout.captions[:MAX_CAPTIONED])

    def text_perplexity(self) -> float:
        require(self.texts, "no held-out document is text alone")
        return math.exp(self.subject.nats(self.texts))

    @property
    def can_draw(self) -> bool:
        """Whether the model can draw images for the captions."""
        try:
            return bool(self.drawn)
        except Unmeasured:
            return False

    @cached_property
    def drawn(self) -> dict[str, np.ndarray]:
        """The drawn images of each caption."""
        self._require_captioned()
        sizes = self.train.sizes() if self.train else {}
        if not 0 < len(sizes) <= MAX_CLASSES:
            sizes = dict([*self.heldout.sizes().items()][:MAX_CAPTIONED])
        images = self.subject.draw([*sizes.items()], self.heldout.modality, self.each, self.image, self.seed)
        return dict(zip(sizes, images, strict=True))

    @cached_property
    def _real(self) -> Images:
        self._require_captioned()
        return self.subject.pixels(self.heldout.images, self.heldout.modality)

    @cached_property
    def _fitted(self) -> Images:
        train = self._require_train()
        return self.subject.pixels(train.images, train.modality)

    @cached_property
    def _captions(self) -> list[str]:
        self._require_captioned()
        return self.subject.caption(self.captioned, self.heldout.modality)

    @cached_property
    def _classifier(self) -> Any:
        self._of_one_size(self.drawn.values())
        images, captions = self._classes()
        svm = optional_module("sklearn.svm", "examples")
        return svm.SVC(gamma="scale").fit(flat_pixels(images[:MAX_FITTED]), captions[:MAX_FITTED])

    @cached_property
    def _features(self) -> Callable[[Images], np.ndarray]:
        if self.encoder is not None:
            return partial(encoder_features, self.encoder)
        images, captions = self._classes()
        self._require_images(len(images), "in training")
        features = ImageFeatures(images, captions, MAX_FITTED)
        return lambda images: features(self._of_one_size(images))

    @cached_property
    def _real_features(self) -> np.ndarray:
        return self._features(self._real)

    def _classes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the training images and their captions, if these can be classes."""
        train = self._require_train()
        number = len(set(train.captions))
        require(
            2 <= number <= MAX_CLASSES,
            f"a classifier needs 2 to {MAX_CLASSES} different captions of training images, got {number}",
        )
        return self._of_one_size(self._fitted), train.captions

    def _of_one_size(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return images as one array that flattens to rows as long as those of the training images."""
        shapes = {image.shape[-3:] for image in [*images, *self._fitted]}
        require(len(shapes) == 1, "a classifier needs images of one size")
        return np.asarray(images) if isinstance(images, Sequence | np.ndarray) else np.stack([*images])

    def _clip_score(self, images: Images, captions: Sequence[str]) -> float:
        assert self.clip is not None
        return float(self.clip.scores(images, captions).mean())

    def _require_train(self) -> Captioned:
        if self.train is None or not self.train.captions:
            raise Unmeasured("there are no captioned training images")
        return self.train

    def _require_captioned(self) -> None:
        require(len(self.captioned), "no held-out document is one image and its caption")

    def _require_images(self, first: int, kind: str) -> None:
        least, real = 2 * (FEATURES if self.encoder is None else self.encoder.channels), len(self._real)
        reason = f"it needs {least} images of each kind, got {first} {kind}, {real} held out"
        require(min(first, real) >= least, reason)
