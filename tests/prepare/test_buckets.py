"""Images are stored in a few shapes of nearly the same size, each in the one that cuts the least of it."""

import math

import numpy as np
import pytest
from autoencoders import save_autoencoder, save_vision_encoder
from build_cases import RGB, TOKENIZER, documents_in, make_pairs
from hypothesis import given
from hypothesis import strategies as st
from image_files import png
from PIL import Image

from transfusion_fast.data.autoencoder import read_autoencoder
from transfusion_fast.data.pack import ImageSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.vision_encoder import read_vision_encoder
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.decoding import DecodedImage
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import MAX_ASPECT, ImageRule, LatentRule, bucket_shapes
from transfusion_fast.prepare.inspect import Statistics
from transfusion_fast.prepare.sources.pairs import PairsSource

SIDES = [*range(1, 130), 256, 1000]
SIZES = st.integers(8, 400)


def stored(rule, pixels):
    return rule(DecodedImage(Image.fromarray(pixels), pixels.shape[:2]))


def test_the_buckets_of_256_pixels_in_patches_of_16_are_those_of_the_documentation():
    upright = [(16, 16), (17, 15), (18, 14), (19, 13), (21, 12), (23, 11), (25, 10)]
    assert bucket_shapes(16) == (*upright, *((columns, rows) for rows, columns in upright[1:]))


def test_buckets_are_few_and_use_nearly_the_whole_budget():
    for side in SIDES:
        shapes = bucket_shapes(side)
        assert len(set(shapes)) == len(shapes) <= 15
        assert (side, side) in shapes and {(columns, rows) for rows, columns in shapes} == set(shapes)
        for rows, columns in shapes:
            assert 7 / 8 * side * side <= rows * columns <= side * side
            assert max(rows, columns) <= MAX_ASPECT * min(rows, columns)


@given(SIZES, SIZES)
def test_an_image_gets_the_nearest_bucket_by_the_logarithm_of_its_aspect_ratio(height, width):
    rows, columns = ImageRule("buckets", 256, 16).covered(height, width)
    distances = {shape: abs(math.log(shape[0] / shape[1]) - math.log(height / width)) for shape in bucket_shapes(16)}
    assert distances[rows // 16, columns // 16] <= min(distances.values()) + 1e-12


@pytest.mark.parametrize(
    ("size", "shape"),
    [((1910, 1000), (21, 12)), ((1917, 1000), (23, 11)), ((1000, 1910), (12, 21)), ((1000, 1917), (11, 23))],
)
def test_between_two_buckets_the_mean_of_their_logarithms_decides(size, shape):
    """sqrt(21/12 * 23/11) is 1.913, and the mean of both ratios 1.920."""
    assert ImageRule("buckets", 16, 1).covered(*size) == shape


@given(SIZES, SIZES)
def test_no_more_than_9_percent_is_cut_of_an_image_of_a_usual_aspect_ratio(height, width):
    rule = ImageRule("buckets", 256, 16)
    rows, columns = rule.covered(height, width)
    scale = rule.scale(height, width)
    covered = np.array([height * scale, width * scale])
    assert (covered >= np.array([rows, columns]) - 1e-6).all(), "the image covers its bucket"
    kept, aspect = rows * columns / covered.prod(), max(height, width) / min(height, width)
    assert kept >= (0.91 if aspect <= 2.5 else 2.5 / aspect - 1e-9)


@pytest.mark.parametrize(("height", "width"), [(90, 190), (190, 90), (60, 61), (250, 60)])
def test_an_image_is_scaled_alike_in_both_directions_and_its_middle_kept(height, width):
    """On ramps, the differences and the mean of the values show the scale and the position."""
    rule = ImageRule("buckets", 64, 4)
    ramps = np.stack(np.indices((height, width)), axis=-1)
    pixels = np.concatenate([ramps, ramps[..., :1]], axis=-1).astype(np.uint8)
    found = stored(rule, pixels).astype(float)
    assert found.shape[:2] == rule.covered(height, width)
    inner = found[4:-4, 4:-4]
    steps = np.ptp(inner[:, 0, 0]) / (len(inner) - 1), np.ptp(inner[0, :, 1]) / (inner.shape[1] - 1)
    assert steps == pytest.approx([1 / rule.scale(height, width)] * 2, rel=0.03)
    assert found[..., :2].mean(axis=(0, 1)) == pytest.approx([(height - 1) / 2, (width - 1) / 2], abs=1.1)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """A tar of pictures of many shapes."""
    sizes = np.random.default_rng(0).integers(10, 60, (60, 2)).tolist()
    pictures = [png(np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8)) for n, size in enumerate(sizes)]
    folder = tmp_path_factory.mktemp("tar")
    return make_pairs(folder / "0.tar", {f"{n:03d}": (image, f"{n}") for n, image in enumerate(pictures)}, "png")


def test_a_folder_has_images_of_the_buckets_alone(tar, tmp_path):
    build(Recipe(PairsSource.of([tar]), Encoder(TOKENIZER, 64, (RGB,), ImageRule("buckets", 16, 4))), tmp_path / "out")
    reader = PackReader(tmp_path / "out")
    found = Statistics.of(reader.read(number) for number in range(len(reader)))
    assert set(found.shapes) == {(16, 16), (12, 20), (20, 12)} and found.shapes.total() == 60
    assert all(text in found.named_shapes(2) for text in ("height x width: ", " x 12: ", ", and 1 more"))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("kind", ["autoencoder", "vision encoder"])
def test_latents_have_the_shapes_of_buckets_too(tar, tmp_path, kind):
    if kind == "autoencoder":
        save_autoencoder(tmp_path)
        latents = LatentRule(read_autoencoder(tmp_path))
    else:
        save_vision_encoder(tmp_path)
        latents = LatentRule(read_vision_encoder(tmp_path), sampled=False)
    image = ImageRule("buckets", 16 * latents.encoder.stride, 4 * latents.encoder.stride)
    modality = latents.encoder.modality("images", 4)
    build(Recipe(PairsSource.of([tar]), Encoder(TOKENIZER, 64, (modality,), image, latents=latents)), tmp_path / "out")
    images = [part for found in documents_in(tmp_path / "out") for part in found if isinstance(part, ImageSegment)]
    assert {part.values.shape[:2] for part in images} == {(16, 16), (12, 20), (20, 12)} and len(images) == 60
