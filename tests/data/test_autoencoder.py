"""Latents are those of diffusers' own model, scaled by its config; a folder without a valid model gets one line."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from autoencoders import random_pixels, save_autoencoder
from safetensors.torch import load_file, save_file
from shard_damage import Planted

from transfusion_fast.data.autoencoder import CONFIG, WEIGHTS, read_autoencoder
from transfusion_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("on_the_cpu")
PIXELS = random_pixels(3, 8, 12, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "vae"
    save_autoencoder(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(saved, tmp_path / "vae")


def posterior(model, pixels):
    """Return mean and standard deviation, fp32 [n, channels, h, w], computed with diffusers alone."""
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = model.encode(images).latent_dist
    return found.mean, found.std


def stored(latents):
    """Return fp32 [n, channels, h, w] in the format of storage."""
    return latents.permute(0, 2, 3, 1).half().numpy()


@pytest.mark.parametrize(
    ("settings", "scale", "shift"),
    [({}, 0.18215, 0.0), ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 1.5305, 0.0609)],
)
def test_latents_are_the_mean_or_a_sample_shifted_and_scaled(tmp_path, settings, scale, shift):
    model = save_autoencoder(tmp_path, **settings)
    autoencoder = read_autoencoder(tmp_path)
    assert (autoencoder.stride, autoencoder.channels) == (2, 4)
    mean, std = posterior(model, PIXELS)
    assert np.array_equal(autoencoder.encode(PIXELS), stored((mean - shift) * scale))
    noise = np.random.default_rng(1).standard_normal((3, 4, 6, 4), dtype=np.float32)
    sample = mean + std * torch.from_numpy(noise).permute(0, 3, 1, 2)
    assert np.array_equal(autoencoder.encode(PIXELS, noise), stored((sample - shift) * scale))


def test_decoding_undoes_shift_and_scale_and_rounds_to_pixels(tmp_path):
    model = save_autoencoder(tmp_path, scaling_factor=0.5, shift_factor=-0.25)
    mean, _ = posterior(model, random_pixels(11, 8, 12, 3))  # more than are decoded together
    with torch.no_grad():
        images = model.decode(mean).sample.permute(0, 2, 3, 1)
    expected = ((images.clamp(-1, 1) + 1) * 127.5).round()
    decoded = read_autoencoder(tmp_path).decode(((mean + 0.25) * 0.5).permute(0, 2, 3, 1).numpy())
    assert decoded.dtype == np.uint8 and expected.std() > 5
    assert np.abs(decoded - expected.numpy()).max() <= 1


def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was(tmp_path):
    save_autoencoder(tmp_path)
    autoencoder, pixels = read_autoencoder(tmp_path), random_pixels(4, 64, 64, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(autoencoder.encode(pixels).tobytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_fingerprint_depends_on_settings_and_weights_alone(tmp_path):
    first = tmp_path / "first"
    save_autoencoder(first)
    shutil.copytree(first, tmp_path / "copy")
    edit(tmp_path / "copy", _diffusers_version="0.30.0", _name_or_path="elsewhere")
    save_autoencoder(tmp_path / "weights", seed=1)
    save_autoencoder(tmp_path / "scale", scaling_factor=0.2)
    expected = read_autoencoder(first).fingerprint
    same = {name: read_autoencoder(tmp_path / name).fingerprint == expected for name in ("copy", "weights", "scale")}
    assert same == {"copy": True, "weights": False, "scale": False}


def test_a_folder_that_has_changed_is_read_anew_but_not_while_it_is_in_use(tmp_path):
    save_autoencoder(tmp_path / "vae")
    autoencoder = read_autoencoder(tmp_path / "vae")
    before = autoencoder.encode(PIXELS)
    save_autoencoder(tmp_path / "vae", seed=1)
    assert not np.array_equal(read_autoencoder(tmp_path / "vae").encode(PIXELS), before)
    with pytest.raises(InputError, match="must not change while it is in use"):  # a process keeps one model
        autoencoder.encode(PIXELS)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_pickled_weights_are_refused_and_never_read(tmp_path, suffix):
    folder, written = tmp_path / "vae", tmp_path / "written"
    save_autoencoder(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).with_suffix(suffix).write_bytes(pickle.dumps(Planted(written)))
    with pytest.raises(InputError, match="never a pickle.*convert them" if suffix == ".bin" else "must be readable"):
        read_autoencoder(folder)
    assert not written.exists()
    pickle.loads(pickle.dumps(Planted(written)))
    assert written.exists()  # it is one


def test_weights_of_half_precision_alone_are_read_once_they_have_the_name(tmp_path):
    save_autoencoder(tmp_path)
    variant = (tmp_path / WEIGHTS).rename(tmp_path / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    save_file({name: value.half() for name, value in load_file(variant).items()}, variant)
    with pytest.raises(InputError, match=rf"must be in {WEIGHTS}, got only the variant {variant.name}; copy"):
        read_autoencoder(tmp_path)
    variant.rename(tmp_path / WEIGHTS)
    assert read_autoencoder(tmp_path).encode(PIXELS).dtype == np.float16


def remove_a_weight(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.bias"]
    save_file(weights, folder / WEIGHTS)


INVALID = (  # settings, and what is said of them
    ({"_class_name": "VQModel"}, "_class_name in .* must be 'AutoencoderKL', got 'VQ"),
    ({"latents_mean": [0.5] * 4}, "latents_mean in .* must be null"),
    ({"in_channels": 1}, "in_channels in .* must be 3, got 1"),
    ({"block_out_channels": 5}, "block_out_channels in .* must be a valid array, got 5"),
    ({"block_out_channels": [8, 16]}, "must be readable, got"),
    ({"latent_channels": "4"}, "latent_channels in .* must be a valid integer, got '4'"),
    ({"scaling_factor": 0}, "scaling_factor in .* must be greater than 0, got 0"),
    ({"shift_factor": "x"}, "shift_factor in .* must be a valid number, got 'x'"),
)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, "must be a folder with config.json, got none"),
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json must be JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), r"config.json must be an object, got \[\]"),
        *((lambda folder, changed=changed: edit(folder, **changed), complaint) for changed, complaint in INVALID),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("{}"), "must be one file"),
        (remove_a_weight, "must be those of its config, got a difference in encoder.conv_in.bias"),
        (lambda folder: os.truncate(folder / WEIGHTS, 1000), "must be readable, got"),
    ],
)
def test_an_invalid_autoencoder_gets_one_line(folder, damage, complaint, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    damage(folder)
    with pytest.raises(InputError, match=complaint) as error:
        read_autoencoder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not caplog.messages  # diffusers would print further lines


def test_without_diffusers_there_is_one_line_that_names_it(tmp_path, monkeypatch):
    save_autoencoder(tmp_path, seed=2)  # a model that no other test has read
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"package diffusers must be installed .*; pip install '.\[vae\]'"):
        read_autoencoder(tmp_path)


def test_diffusers_is_not_imported_before_it_is_needed():
    code = (
        "import sys, transfusion_fast.prepare.build, transfusion_fast.data.autoencoder; "
        "assert not {'diffusers', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_latents_of_another_autoencoder_are_refused(saved):
    autoencoder = read_autoencoder(saved)
    autoencoder.check_made(autoencoder.fingerprint, 4, "the run")
    autoencoder.check_made("", 4, "the run")  # not known
    for fingerprint, channels in (("0" * 64, 4), ("", 16)):
        with pytest.raises(InputError, match=f"autoencoder of the run must have .* and {channels} channels, got "):
            autoencoder.check_made(fingerprint, channels, "the run")
