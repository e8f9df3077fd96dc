"""The Frechet distance between two sets of images (arXiv 1706.08500), over features of a small classifier or encoder.

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))        m, C: mean and covariance of the features of a set

The classifier is fitted to training images with a fixed seed, so distances compare models of one data set. The features
of a vision encoder are the means over its patches, of images that are scaled to its size. Distances also depend on the
number of images: the fewer, the larger.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

from transfusion_fast.data.vision_encoder import VisionEncoder
from transfusion_fast.errors import optional_module
from transfusion_fast.sampling.pictures import Images

FEATURES = 32
"""Hidden units of the classifier."""
_BATCH = 32  # images that an encoder takes at once


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the distance between two sets of features [n, F], in fp64; 0 for equal sets."""
    (mean_1, cov_1), (mean_2, cov_2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in map(np.float64, (one, other)))
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # tr (C_1 C_2)^(1/2) is that of the symmetric (C_1^(1/2) C_2 C_1^(1/2))^(1/2), whose eigenvalues are real.
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(0)).sum()
    return max(0.0, float(np.square(mean_1 - mean_2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * shared))


def fixed_order(images: Images, captions: Sequence[str]) -> list[int]:
    """Return the numbers of the images in an order that depends on the images and their captions alone."""
    hashes = [hashlib.sha256(x.tobytes() + c.encode()).digest() for x, c in zip(images, captions, strict=True)]
    return sorted(range(len(images)), key=hashes.__getitem__)


class ImageFeatures:
    """Hidden units of a classifier, fitted to at most `limit` images, uint8 [n, ...], and their captions.

    Which images and in what order depends on the images alone, so that it is the same for data in other packs.
    """

    def __init__(self, images: np.ndarray, captions: Sequence[str], limit: int):
        network = optional_module("sklearn.neural_network", "examples").MLPClassifier((FEATURES,), random_state=0)
        self.chosen = fixed_order(images, captions)[:limit]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the number of epochs ended the fit, as it should
            network.fit(flat_pixels(images[self.chosen]), [captions[number] for number in self.chosen])
        self.weight, self.bias = network.coefs_[0], network.intercepts_[0]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features [n, FEATURES] of images."""
        return np.maximum(flat_pixels(images) @ self.weight + self.bias, 0)


def encoder_features(encoder: VisionEncoder, images: Images) -> np.ndarray:
    """Return the mean of an encoder's features over the patches of each image, fp64 [n, channels]."""
    size = (encoder.image_size, encoder.image_size)
    scaled = [np.asarray(to_colour(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    batches = [np.stack(scaled[start : start + _BATCH]) for start in range(0, len(scaled), _BATCH)]
    return np.concatenate([encoder.encode(batch).mean(axis=(1, 2), dtype=np.float64) for batch in batches])


def to_colour(image: np.ndarray) -> Image.Image:
    """Return an image uint8 [height, width, 1 or 3] in RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")


def flat_pixels(images: np.ndarray) -> np.ndarray:
    """Return uint8 images [n, ...] as rows [n, pixels] of numbers from 0 to 1."""
    return images.reshape(len(images), -1) / 255.0
