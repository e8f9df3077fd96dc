"""The Frechet distance: its formula, and features that depend on the images alone."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from transfusion_fast.sampling.frechet import ImageFeatures, frechet_distance


def gaussian(seed: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Return 50 rows whose mean is exactly `mean` and whose covariance is exactly root.T @ root."""
    rows = np.random.default_rng(seed).normal(size=(50, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return white @ root + mean


def test_the_distance_of_two_gaussians_has_its_closed_form() -> None:
    one = gaussian(0, np.array([1.0, 2, 3]), np.diag([1.0, 2, 3]))
    other = gaussian(1, np.array([1.0, 0, 3]), np.diag([4.0, 2, 1]))
    assert frechet_distance(one, other) == pytest.approx(2**2 + (1 - 4) ** 2 + (3 - 1) ** 2)  # as covariances commute
    turned = gaussian(2, np.zeros(3), np.array([[1.0, 2, 0], [0, 1, 3], [1, 0, 1]]))
    cov_1, cov_2 = (np.cov(x, rowvar=False) for x in (one, turned))
    expected = 14 + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)
    assert frechet_distance(one, turned) == pytest.approx(expected)
    assert frechet_distance(turned, one) == pytest.approx(expected)


def test_equal_sets_have_no_distance_also_where_features_are_constant_or_few_rows_leave_covariances_singular() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)
    rows[:, 5] = 0
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(rows, rows + np.eye(32)[5] * 3) == pytest.approx(9, abs=1e-5)


def test_features_depend_on_the_images_and_not_on_their_order() -> None:
    draws = np.random.default_rng(0)
    images, order = draws.integers(0, 256, (90, 2, 2, 1)).astype(np.uint8), draws.permutation(90)
    captions = np.where(images[:, 0, 0, 0] > 128, "bright", "dark")
    images[45:], captions[45:] = images[:45], "again"  # the same images with another caption
    one, other = ImageFeatures(images, captions, 60), ImageFeatures(images[order], captions[order], 60)
    assert np.array_equal(images[one.chosen], images[order][other.chosen]) and len(one.chosen) == 60
    assert np.array_equal(captions[one.chosen], captions[order][other.chosen])
    np.testing.assert_array_equal(one(images), other(images))
    assert one(images).shape == (90, 32) and one(images).min() == 0 and one(images).std(0).max() > 0
