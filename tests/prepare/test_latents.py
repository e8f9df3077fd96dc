"""Images become latents: each document its own, the same for any number of processes or interruptions."""

import contextlib
import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from autoencoders import random_pixels, save_autoencoder
from build_cases import TOKENIZER, Stop, content, cut_off, documents_in, make_pairs, stop, words_of
from image_files import png

from transfusion_fast.data.autoencoder import Autoencoder, read_autoencoder
from transfusion_fast.data.index import INDEX_NAME, parse_index, read_index
from transfusion_fast.data.pack import ImageSegment, ModalityInfo
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare import encode as encoding
from transfusion_fast.prepare import images as latents_module
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder
from transfusion_fast.prepare.images import ImageRule, LatentRule
from transfusion_fast.prepare.sources.base import SourceDocument
from transfusion_fast.prepare.sources.pairs import PairsSource

pytestmark = pytest.mark.usefixtures("on_the_cpu")
ROUNDING = 2e-3  # of values below 2 to float16, and one more for what a batch changes in fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    save_autoencoder(folder)
    return folder


@pytest.fixture
def rule(folder):
    return LatentRule(read_autoencoder(folder), batch=3)


def encoder(rule, shape="native", patch=1):
    image = ImageRule(shape, 12, patch * rule.encoder.stride)
    return Encoder(TOKENIZER, 64, (rule.encoder.modality("images", patch),), image, latents=rule)


def pictures(count):
    """Different images of three shapes, small enough not to be scaled."""
    shapes = itertools.cycle([(8, 12), (12, 8), (10, 10), (8, 12)])
    return [random_pixels(*next(shapes), 3, seed=seed) for seed in range(count)]


def latents_of(document):
    [values] = [segment.values for segment in document if isinstance(segment, ImageSegment)]
    return values


def assert_close(one, other):
    assert np.abs(one.astype(np.float32) - other).max() < ROUNDING


def test_samples_differ_from_the_mean_and_between_images(rule):
    images = pictures(40)
    samples, means = rule(images), replace(rule, sampled=False)(images)
    assert all(np.array_equal(*pair) for pair in zip(samples, rule(images), strict=True))
    differences = [(a - b).astype(np.float32) for a, b in zip(samples, means, strict=True)]
    assert min(np.abs(difference).max() for difference in differences) > 0.1
    for shape in {d.shape for d in differences}:
        alike = [d.ravel() for d in differences if d.shape == shape]
        assert max(np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(alike, 2)) < 0.6
    assert abs(np.concatenate([d.ravel() for d in differences]).mean()) < 0.02
    for image, latents in zip(reversed(images), reversed(samples), strict=True):
        assert_close(*replace(rule, batch=1)([image]), latents)  # whose noise is its own


@pytest.mark.parametrize("together", [1, 2000, 1 << 20])
def test_documents_keep_their_order_and_the_latents_of_their_own_image(rule, monkeypatch, together):
    monkeypatch.setattr(encoding, "_BYTES_TOGETHER", together)
    raws = [SourceDocument(f"{n}", (f"caption {n}", png(image))) for n, image in enumerate(pictures(60))]
    given = list(raws)
    given[5] = SourceDocument("5", ("caption 5", raws[5].parts[1][:120]))
    given[9] = Rejected("no image", "9")
    given[11] = SourceDocument("11", ("text alone",))
    outcomes = list(encoder(rule).encode(given))
    rejected = {n: str(found) for n, found in enumerate(outcomes) if isinstance(found, Rejected)}
    assert rejected == {5: "image damaged: image file is truncated, 5", 9: "no image: 9"}
    assert [words_of(document) for document in outcomes[11]] == ["text alone"]
    for n in set(range(60)) - {5, 9, 11}:
        [found], [[alone]] = outcomes[n], encoder(rule).encode([raws[n]])
        assert words_of(found) == f"caption {n}"
        assert_close(latents_of(found), latents_of(alone))


def test_processes_take_the_gpus_in_turn(rule, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda index: taken.append(index) or contextlib.nullcontext())
    monkeypatch.setattr(Autoencoder, "encode", lambda self, pixels, noise: np.zeros((len(pixels), 4, 6, 4), np.float16))
    on_gpu = replace(rule, encoder=replace(rule.encoder, device="cuda"))
    for number in (0, 3, 6):
        monkeypatch.setattr(latents_module, "worker_number", lambda number=number: number)
        on_gpu(pictures(1))
    assert taken == [0, 3, 2]


def test_images_of_one_shape_are_encoded_in_batches_of_the_given_size(rule, monkeypatch):
    shapes, encode = Counter(), Autoencoder.encode

    def counted(self, pixels, noise):
        shapes[pixels.shape[:3]] += 1
        return encode(self, pixels, noise)

    monkeypatch.setattr(Autoencoder, "encode", counted)
    list(encoder(rule).encode(SourceDocument("here", (png(image),)) for image in pictures(40)))
    tall, square = ({(3, *shape): 3, (1, *shape): 1} for shape in ((12, 8), (10, 10)))
    assert shapes == {(3, 8, 12): 6, (2, 8, 12): 1, **tall, **square}


@pytest.mark.parametrize(("together", "most"), [(1 << 20, 48), (5 * 8 * 12 * 3, 5)])
def test_waiting_documents_are_bounded_in_number_and_size(rule, monkeypatch, together, most):
    monkeypatch.setattr(encoding, "_BYTES_TOGETHER", together)
    read = []

    def raws():
        for image in pictures(100):
            read.append(image)
            yield SourceDocument("here", (png(image),))

    waiting = [len(read) - given for given, _ in enumerate(encoder(rule).encode(raws()))]
    assert len(waiting) == 100 and max(waiting) == most


def test_a_lack_of_gpu_memory_is_one_line(rule, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\n")

    monkeypatch.setattr(Autoencoder, "encode", full)
    with pytest.raises(InputError, match=r"an encoder a process and 3 images each.* with fewer processes"):
        rule(pictures(1))


def test_a_document_with_latents_beyond_float16_is_left_out_and_counted(tmp_path, folder):
    images = pictures(4)
    means = LatentRule(read_autoencoder(folder), sampled=False)(images)
    largest = [float(np.abs(latents.astype(np.float32)).max()) for latents in means]
    scale = 0.18215 * 65504 / np.mean(sorted(largest)[-2:])  # between the largest and the one behind it
    save_autoencoder(tmp_path, scaling_factor=scale)
    raws = [SourceDocument(f"here {n}", ("a", png(image), "b")) for n, image in enumerate(images)]
    outcomes = list(encoder(LatentRule(read_autoencoder(tmp_path), sampled=False)).encode(raws))
    bad = int(np.argmax(largest))
    assert [isinstance(found, Rejected) for found in outcomes] == [n == bad for n in range(4)]
    assert str(outcomes[bad]).startswith("latents not finite: ") and str(outcomes[bad]).endswith(f", here {bad}")


def test_an_image_that_no_pack_holds_is_rejected_before_it_is_encoded(rule, monkeypatch):
    monkeypatch.setattr(Autoencoder, "encode", pytest.fail)
    small = replace(encoder(rule, "native"), sequence_length=38)
    [found] = small.encode([SourceDocument("here", (png(random_pixels(12, 12, 3)),))])
    assert (
        str(found)
        == "image takes too many positions: its 38 positions do not fit a pack of 38; give a larger --seq-len, here"
    )


@pytest.fixture
def recipe(rule, tmp_path):
    (tmp_path / "tars").mkdir()
    for number in range(3):
        pairs = {f"{i:03d}": (png(np.roll(image, number)), f"{number} {i}") for i, image in enumerate(pictures(11))}
        make_pairs(tmp_path / "tars" / f"{number:05d}.tar", pairs, "png")
    return Recipe(PairsSource.of([tmp_path / "tars"]), encoder(rule), packs_per_shard=4)


def test_neither_processes_nor_interruptions_change_the_latents(tmp_path, recipe, monkeypatch):
    for processes in (1, 3):
        build(recipe, tmp_path / str(processes), processes)
    encode, calls = Autoencoder.encode, []

    def killed(self, pixels, noise):
        calls.append(len(pixels))
        return stop() if len(calls) == 9 else encode(self, pixels, noise)

    monkeypatch.setattr(Autoencoder, "encode", killed)
    with pytest.raises(Stop):
        build(recipe, tmp_path / "resumed")
    build(recipe, tmp_path / "resumed")
    assert sum(calls) < 2 * 33, "the first unit was encoded once"
    assert content(tmp_path / "1") == content(tmp_path / "3") == content(tmp_path / "resumed")
    [modality] = read_index(tmp_path / "1").modalities
    assert modality == recipe.encoder.modalities[0]
    assert modality.autoencoder == recipe.encoder.latents.encoder.fingerprint
    assert len({latents_of(document).tobytes() for document in documents_in(tmp_path / "1")}) == 33
    path = tmp_path / "1" / INDEX_NAME
    fields = json.loads(path.read_text())
    for value in (5, "ab", None):
        fields["modalities"][0]["autoencoder"] = value
        path.write_text(json.dumps(fields))
        with pytest.raises(InputError, match="autoencoder"):
            parse_index(tmp_path / "1")


def test_other_latents_are_not_mixed_with_those_that_were_begun(tmp_path, recipe, folder, monkeypatch):
    cut_off(recipe, tmp_path / "out", monkeypatch)
    save_autoencoder(tmp_path / "other", seed=1)
    rule = recipe.encoder.latents
    others = [LatentRule(read_autoencoder(tmp_path / "other"), batch=3), replace(rule, batch=4)]
    for other in [*others, replace(rule, sampled=False)]:
        with pytest.raises(InputError, match=r"encoder\.(modalities.0.autoencoder|latents.(batch|sampled)) .* -> "):
            build(replace(recipe, encoder=encoder(other)), tmp_path / "out")
    moved = replace(rule, encoder=read_autoencoder(shutil.copytree(folder, tmp_path / "elsewhere")))
    assert moved.describe() == rule.describe(), "the folder of an autoencoder may move"


def test_settings_that_make_no_latents_are_refused(rule):
    with pytest.raises(InputError, match="encoded together must be 1 or more, got 0"):
        replace(rule, batch=0)
    with pytest.raises(InputError, match=r"64 hexadecimal digits for latents, or empty, got 'a+'"):
        ModalityInfo("images", 3, 4, "pixels", "a" * 64)
