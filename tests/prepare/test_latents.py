"""Images become latents: each document its own, the same ones whatever the processes and whatever befell."""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset as wds
from autoencoders import random_pixels, save_autoencoder
from PIL import Image

from transfusion_fast.data.autoencoder import Autoencoder, read_autoencoder
from transfusion_fast.data.index import INDEX_NAME, parse_index
from transfusion_fast.data.pack import ImageSegment, ModalityInfo
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.tokenizer import ByteTokenizer
from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare import build as building
from transfusion_fast.prepare import encode as encoding
from transfusion_fast.prepare import images as latents_module
from transfusion_fast.prepare.build import Recipe, build
from transfusion_fast.prepare.encode import Encoder, ImageRule
from transfusion_fast.prepare.images import LatentRule
from transfusion_fast.prepare.sources.base import RawDocument
from transfusion_fast.prepare.sources.pairs import PairsSource

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOKENIZER = ByteTokenizer()
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
    return Encoder(
        TOKENIZER, 64, rule.modality("images", patch), ImageRule(shape, 12, patch * rule.autoencoder.stride),
        latents=rule,
    )  # fmt: skip


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(count):
    """Of three shapes, all different, small enough to stay as they are."""
    shapes = itertools.cycle([(8, 12), (12, 8), (10, 10), (8, 12)])
    return [random_pixels(*next(shapes), 3, seed=seed) for seed in range(count)]


def latents_of(document):
    [values] = [segment.values for segment in document if isinstance(segment, ImageSegment)]
    return values


def test_samples_are_of_the_posterior_and_the_images_own(rule):
    images = pictures(40)
    samples, means = rule(images), replace(rule, sampled=False)(images)
    assert all(np.array_equal(*pair) for pair in zip(samples, rule(images), strict=True))
    differences = [(a - b).astype(np.float32) for a, b in zip(samples, means, strict=True)]
    assert min(np.abs(difference).max() for difference in differences) > 0.1
    for shape in {d.shape for d in differences}:
        alike = [d.ravel() for d in differences if d.shape == shape]
        assert max(np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(alike, 2)) < 0.6
    assert abs(np.concatenate([d.ravel() for d in differences]).mean()) < 0.02


def test_what_lies_around_an_image_does_not_change_its_noise(rule):
    images = pictures(7)
    one_by_one, together = replace(rule, batch=1), rule(images)
    for image, latents in zip(reversed(images), reversed(together), strict=True):
        [alone] = one_by_one([image])
        assert np.abs(alone.astype(np.float32) - latents).max() < ROUNDING


@pytest.mark.parametrize("together", [1, 2000, 1 << 20])
def test_documents_keep_their_order_and_get_the_latents_of_their_own_image(rule, monkeypatch, together):
    monkeypatch.setattr(encoding, "_BYTES_TOGETHER", together)
    raws = [RawDocument(f"{n}", (f"caption {n}", png(image))) for n, image in enumerate(pictures(60))]
    given = list(raws)
    given[5] = RawDocument("5", ("caption 5", raws[5].parts[1][:120]))
    given[9] = Rejected("no image", "9")
    given[11] = RawDocument("11", ("text alone",))
    outcomes = list(encoder(rule).encode(given))
    rejected = {n: str(found) for n, found in enumerate(outcomes) if isinstance(found, Rejected)}
    assert rejected == {5: "image damaged: image file is truncated, 5", 9: "no image: 9"}
    assert [words(document) for [document] in outcomes[11:12]] == ["text alone"]
    for n in set(range(60)) - {5, 9, 11}:
        [found], [alone] = outcomes[n], encoder(rule)(raws[n])
        assert words(found) == f"caption {n}"
        assert np.abs(latents_of(found).astype(np.float32) - latents_of(alone)).max() < ROUNDING


def words(document):
    return TOKENIZER.decode(document[0].ids)


def test_processes_take_the_gpus_in_turn(rule, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda index: taken.append(index) or contextlib.nullcontext())
    monkeypatch.setattr(Autoencoder, "encode", lambda self, pixels, noise: np.zeros((len(pixels), 4, 6, 4), np.float16))
    on_gpu = replace(rule, autoencoder=replace(rule.autoencoder, device="cuda"))
    for number in (0, 3, 6):
        monkeypatch.setattr(latents_module, "worker_number", lambda number=number: number)
        on_gpu(pictures(1))
    assert taken == [0, 3, 2]


def test_images_of_one_shape_are_encoded_together_and_no_more_than_asked_for(rule, monkeypatch):
    shapes = []
    encode = Autoencoder.encode

    def counted(self, pixels, noise):
        shapes.append(pixels.shape)
        return encode(self, pixels, noise)

    monkeypatch.setattr(Autoencoder, "encode", counted)
    list(encoder(rule).encode(RawDocument("here", (png(image),)) for image in pictures(40)))
    assert Counter(shapes) == {(3, 8, 12, 3): 6, (2, 8, 12, 3): 1} | dict.fromkeys(
        [(3, 12, 8, 3), (3, 10, 10, 3)], 3
    ) | dict.fromkeys([(1, 12, 8, 3), (1, 10, 10, 3)], 1)


@pytest.mark.parametrize(("together", "most"), [(1 << 20, 48), (5 * 8 * 12 * 3, 5)])
def test_documents_do_not_wait_for_more_than_a_bounded_number_and_size_of_others(rule, monkeypatch, together, most):
    monkeypatch.setattr(encoding, "_BYTES_TOGETHER", together)
    read = []

    def raws():
        for number, image in enumerate(pictures(100)):
            read.append(number)
            yield RawDocument(f"{number}", (png(image),))

    waiting = [len(read) - given for given, _ in enumerate(encoder(rule).encode(raws()))]
    assert len(waiting) == 100 and max(waiting) == most


def test_a_gpu_that_is_full_is_one_line(rule, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\n")

    monkeypatch.setattr(Autoencoder, "encode", full)
    with pytest.raises(InputError, match=r"an autoencoder a process and 3 images each.* with fewer processes"):
        rule(pictures(1))


def test_a_document_with_latents_beyond_float16_is_left_out_and_counted(tmp_path, folder):
    rule = LatentRule(read_autoencoder(folder), sampled=False)
    images = pictures(4)
    largest = [float(np.abs(latents.astype(np.float32)).max()) for latents in rule(images)]
    scale = 0.18215 * 65504 / np.mean(sorted(largest)[-2:])  # between the largest and the one behind it
    save_autoencoder(tmp_path, scaling_factor=scale)
    raws = [RawDocument(f"here {n}", ("a", png(image), "b")) for n, image in enumerate(images)]
    outcomes = list(encoder(LatentRule(read_autoencoder(tmp_path), sampled=False)).encode(raws))
    bad = int(np.argmax(largest))
    assert [isinstance(found, Rejected) for found in outcomes] == [n == bad for n in range(4)]
    assert str(outcomes[bad]) == (
        f"latents not finite: the autoencoder gives values that float16 cannot hold, here {bad}"
    )


@pytest.mark.parametrize(
    "pixels",
    [random_pixels(9, 11), random_pixels(9, 11, 4), random_pixels(40, 3, 3), random_pixels(1, 1, 3)],
    ids=["grey", "transparent", "thin", "one pixel"],
)
def test_odd_images_are_cropped_in_colour(rule, pixels):
    [document] = encoder(rule, "crop", patch=2)(RawDocument("here", ("a", png(pixels))))
    assert latents_of(document).shape == (6, 6, 4) and latents_of(document).dtype == np.float16


def test_an_image_that_no_pack_holds_is_rejected_before_it_is_encoded(rule):
    small = replace(encoder(rule, "crop"), sequence_length=38)
    with pytest.raises(Rejected, match="image too long: its 38 positions do not fit a pack, here"):
        small(RawDocument("here", (png(random_pixels(12, 12, 3)),)))


@pytest.fixture
def recipe(rule, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(3):
        with wds.TarWriter(str(tars / f"{number:05d}.tar")) as writer:
            for i, image in enumerate(pictures(11)):
                writer.write(
                    {"__key__": f"{number}{i:03d}", "png": png(np.roll(image, number)), "txt": f"{number} {i}"}
                )
    return Recipe(PairsSource.of([tars]), encoder(rule), packs_per_shard=4)


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_number_of_processes_changes_no_byte(tmp_path, recipe):
    for processes in (1, 3):
        build(recipe, tmp_path / str(processes), processes)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    reader = PackReader(tmp_path / "1")
    [modality] = reader.index.modalities
    assert (
        modality == recipe.encoder.modality and modality.autoencoder == recipe.encoder.latents.autoencoder.fingerprint
    )
    found = [d for n in range(len(reader)) for d in reader.read(n).documents(reader.index.modalities)]
    assert len(found) == 33 and len({latents_of(document).tobytes() for document in found}) == 33


class Stop(BaseException):
    """A kill."""


def test_a_run_that_was_killed_goes_on_with_the_same_bytes(tmp_path, recipe, monkeypatch):
    build(recipe, tmp_path / "whole")
    begun = []

    def killed(folder, number, documents, modalities):
        begun.append(number)
        written(folder, number, documents if number < 1 else _until_killed(documents), modalities)

    written = building.write_unit
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_unit", killed)
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
    assert begun == [0, 1]
    build(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def _until_killed(documents):
    yield from itertools.islice(documents, 5)
    raise Stop


def test_other_latents_do_not_go_on_with_what_was_begun(tmp_path, recipe, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(building, "write_shard", lambda *arguments: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(recipe, tmp_path / "out")
    save_autoencoder(tmp_path / "other", seed=1)
    rule = recipe.encoder.latents
    others = [
        LatentRule(read_autoencoder(tmp_path / "other"), batch=3), replace(rule, batch=4), replace(rule, sampled=False),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(
            InputError, match=r"was begun otherwise: encoder\.(modalities.0.autoencoder|latents.(batch|sampled)) .* -> "
        ):
            build(replace(recipe, encoder=encoder(other)), tmp_path / "out")


def test_an_index_without_the_autoencoders_fingerprint_is_refused(tmp_path, recipe):
    build(recipe, tmp_path / "out")
    path = tmp_path / "out" / INDEX_NAME
    fields = json.loads(path.read_text())
    for value, complaint in ((5, "must be a valid string, got 5"), ("ab", "must be 64 hexadecimal digits")):
        fields["modalities"][0]["autoencoder"] = value
        path.write_text(json.dumps(fields))
        with pytest.raises(InputError, match=complaint):
            parse_index(tmp_path / "out")
    del fields["modalities"][0]["autoencoder"]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="autoencoder of a modality must be given, got nothing"):
        parse_index(tmp_path / "out")


def test_pixels_have_no_autoencoder():
    with pytest.raises(InputError, match=r"64 hexadecimal digits for latents, or empty, got 'a+' for pixels"):
        ModalityInfo("images", 3, 4, "pixels", "a" * 64)


def test_batches_of_none_are_refused(rule):
    with pytest.raises(InputError, match="encoded together must be 1 or more, got 0"):
        replace(rule, batch=0)


def test_the_folder_of_an_autoencoder_may_move(tmp_path, rule, folder):
    moved = replace(rule, autoencoder=read_autoencoder(shutil.copytree(folder, tmp_path / "elsewhere")))
    assert moved.describe() == rule.describe()
