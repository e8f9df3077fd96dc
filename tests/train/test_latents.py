"""From tars of pictures by way of an encoder's latents to pictures that a run draws."""

import json

import numpy as np
import pytest
from autoencoders import random_pixels, save_autoencoder, save_vision_encoder
from build_cases import make_pairs
from image_files import png, saved
from launching import metrics, train
from PIL import Image

from transfusion_fast.data.autoencoder import read_autoencoder
from transfusion_fast.data.pack import ImageSegment
from transfusion_fast.data.reader import PackReader
from transfusion_fast.data.vision_encoder import read_vision_encoder
from transfusion_fast.prepare import recipe

SMALL = ("--image-size", 16, "--seq-len", 64, "--processes", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tar of captioned pictures, and autoencoders."""
    folder = tmp_path_factory.mktemp("latents")
    images = [saved(Image.fromarray(random_pixels(20, 24, 3, seed=i)), "JPEG") for i in range(24)]
    make_pairs(folder / "pairs.tar", {f"{i:03d}": (image, f"picture {i}") for i, image in enumerate(images)})
    save_autoencoder(folder / "vae")
    save_autoencoder(folder / "other", seed=1)
    save_vision_encoder(folder / "vit")
    return folder


@pytest.fixture
def prepare(folder, command):
    """Runs `prepare pairs` of the tar into a folder."""
    return lambda out, *options: command("prepare", "pairs", folder / "pairs.tar", "--out", out, *SMALL, *options)


@pytest.fixture
def run(folder, prepare):
    """A run of two steps beside its data, made for the first test that needs it."""
    if not (folder / "run").exists():
        code, out, err = prepare(folder / "data", "--vae", folder / "vae")
        assert (code, err) == (0, "") and "24 documents" in out
        train(1, folder / "data", folder / "run", "train.steps=2", "model.dim_latent=16")
    return folder / "run"


def test_a_run_on_latents_trains_draws_and_captions_through_its_autoencoder(folder, run, tmp_path, command):
    assert all(np.isfinite(row["diffusion_loss"]) for row in metrics(run))
    fingerprint = read_autoencoder(folder / "vae").fingerprint
    [modality] = PackReader(folder / "data").index.modalities
    assert (modality.encoding, modality.patch_size, modality.autoencoder) == ("latents", 2, fingerprint)
    assert json.loads((run / "data.json").read_text())["modalities"][0]["autoencoder"] == fingerprint
    drawn, file = tmp_path / "drawn.png", tmp_path / "grey.png"
    options = ("--prompt", "picture 1", "--each", 2, "--steps", 2, "--out", drawn)
    code, out, _ = command("sample", run, "--vae", folder / "vae", *options)
    assert code == 0 and f"drew 2 images of 16 x 16: {drawn}" in out
    assert len(Image.open(drawn).convert("L").getcolors(256) or []) > 8
    file.write_bytes(png(random_pixels(9, 30)))
    code, out, _ = command("sample", run, "--vae", folder / "vae", "--caption", file, "--max-tokens", 3)
    assert code == 0 and out.startswith(f"{file}: ")


def test_evaluation_of_latents_measures_pictures_through_the_autoencoder_and_captions_without_it(
    folder, run, tmp_path, command
):
    options = ("--data", folder / "data", "--each", 1, "--steps", 1, "--out", tmp_path / "samples.png")
    reports = []
    for vae in ((), ("--vae", folder / "vae")):
        code, out, _ = command("evaluate", run, *options, *vae, "--encoder", folder / "vit")
        assert code == 0
        reports.append(json.loads((run / "evaluation.json").read_text()))
        assert ("latents need --vae" in out, (tmp_path / "samples.png").exists()) == (not vae, bool(vae))
    without, drawn = reports
    assert without["frechet_distance"] is None and "--vae" in without["not_measured"]["frechet_distance"]
    assert (without["num_generated"], drawn["num_generated"], drawn["num_captioned"]) == (0, 24, 24)
    assert without["caption_accuracy"] == drawn["caption_accuracy"] is not None
    assert without["validation"] == drawn["validation"] and drawn["validation"]["diffusion_loss"] > 0
    assert drawn["not_measured"]["frechet_distance"].startswith("it needs 32 images of each kind, got 24 drawn, 24")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("sample RUN --prompt a", "--vae must be given for"),
        ("sample RUN --caption a.png", "give the autoencoder of its data"),
        ("sample RUN --prompt a --vae OTHER", "other; give the folder that its data was prepared"),
        ("sample RUN --prompt a --vae nowhere", "nowhere must be a folder with config.json"),
        ("evaluate RUN --data DATA --vae OTHER", "other; give the folder that its data was prepared"),
    ],
)
def test_a_missing_or_other_autoencoder_is_named_in_one_line(
    folder, run, tmp_path, monkeypatch, command, options, complaint
):
    monkeypatch.chdir(tmp_path)
    named = {"RUN": run, "OTHER": folder / "other", "DATA": folder / "data"}
    code, _, err = command(*(named.get(option, option) for option in options.split()))
    assert code == 2 and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--vae VAE --image-size 18", "image size must be a positive multiple of 4, got 18; give such a size"),
        ("--vae VAE --patch-size 3", "image size must be a positive multiple of 6, got 16"),
        ("--vae VAE --vae-batch 0", "images encoded together must be 1 or more, got 0"),
        ("--vae nowhere", "nowhere must be a folder with config.json"),
        ("--latents mean", "--latents must come with --vae"),
        ("--vae-batch 2", "--vae-batch must come with --vae or --encoder"),
        ("--vae VAE --encoder VIT", "--vae or --encoder must be given alone"),
        ("--encoder VIT --latents mean", "--latents must come with --vae"),
        ("--encoder nowhere", "nowhere must be a folder with config.json"),
        ("--encoder VIT --image-size 18", "image size must be a positive multiple of 4, got 18"),
        ("--encoder-like DATA", "--encoder-like must come with --encoder"),
        ("--encoder VIT --encoder-like DATA", "--encoder-like must be a folder of features"),
    ],
)
def test_settings_that_do_not_fit_are_named_in_one_line(folder, run, tmp_path, prepare, options, complaint):
    named = {"VAE": folder / "vae", "VIT": folder / "vit", "DATA": folder / "data"}
    given = (named.get(option, option) for option in options.split())
    code, _, err = prepare(tmp_path / "out", *given)
    assert code == 2 and complaint in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_image_without_finite_latents_is_named_and_left_out(tmp_path, prepare):
    save_autoencoder(tmp_path / "vae", scaling_factor=1e9)
    code, _, err = prepare(tmp_path / "out", "--vae", tmp_path / "vae")
    assert code == 2 and "(24 x latents not finite)" in err and err.count("\n") == 1


def test_latents_are_sampled_or_their_mean_and_pixels_need_no_autoencoder(folder, tmp_path, prepare):
    found = {}
    for kind in ("mean", "sampled", "pixels"):
        options = () if kind == "pixels" else ("--vae", folder / "vae", "--latents", kind)
        assert prepare(tmp_path / kind, *options)[0] == 0
        found[kind] = PackReader(tmp_path / kind)
    mean, sampled = (found[kind].read(0).latents for kind in ("mean", "sampled"))
    assert mean.shape == sampled.shape and np.abs(mean - sampled).max() > 0.1
    [modality] = found["pixels"].index.modalities
    assert (modality.encoding, modality.patch_size, modality.autoencoder) == ("pixels", 16, "")


def values_in(folder):
    """Return the modality of a folder of features, and all features, fp32 [images, rows, columns, C], in any order."""
    reader = PackReader(folder)
    packs = (reader.read(number) for number in range(len(reader)))
    segments = (s for pack in packs for document in pack.documents(reader.index.modalities) for s in document)
    [modality] = reader.index.modalities
    return modality, np.stack([s.values for s in segments if isinstance(s, ImageSegment)]).astype(np.float32)


def test_a_run_on_a_vision_encoders_features_trains_but_draws_no_pictures(
    folder, tmp_path, prepare, command, monkeypatch
):
    encoder, vit = read_vision_encoder(folder / "vit"), ("--encoder", folder / "vit")
    code, out, err = prepare(tmp_path / "data", *vit)
    assert (code, err) == (0, "") and "24 documents" in out
    modality, values = values_in(tmp_path / "data")
    assert (modality.channels, modality.patch_size, values.shape) == (16, 1, (24, 4, 4, 16))
    assert np.abs(values.mean((0, 1, 2))).max() < 0.01 and np.abs(values.std((0, 1, 2)) - 1).max() < 0.01
    assert prepare(tmp_path / "pixels")[0] == 0
    pixels = values_in(tmp_path / "pixels")[1].astype(np.uint8)
    raw = encoder.encode(pixels).astype(np.float32)  # equals a forward pass of transformers' model, by its own test
    restored = values * np.float32(modality.std) + np.float32(modality.mean)
    by_first = [array[np.argsort(array[:, 0, 0, 0])] for array in (raw, restored)]
    np.testing.assert_allclose(*by_first, rtol=4e-3, atol=4e-3)

    monkeypatch.setattr(recipe, "MEASURED", 8)  # other images, and so another mean
    assert "already there" in prepare(tmp_path / "data", *vit)[1]
    assert prepare(tmp_path / "fewer", *vit)[0] == 0
    assert prepare(tmp_path / "like", *vit, "--encoder-like", tmp_path / "data")[0] == 0
    assert values_in(tmp_path / "like")[0] == modality != values_in(tmp_path / "fewer")[0]

    train(1, tmp_path / "data", tmp_path / "run", "train.steps=2", "model.dim_latent=16")
    assert all(np.isfinite(row["diffusion_loss"]) for row in metrics(tmp_path / "run"))
    code, _, err = command("sample", tmp_path / "run", "--prompt", "picture 1", "--out", tmp_path / "a.png")
    assert code == 2 and "on a vision encoder's features" in err and err.count("\n") == 1
