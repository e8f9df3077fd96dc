"""Latents are the normalised patch features of transformers' own model; anything else in a folder gets one line."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from autoencoders import random_pixels, save_vision_encoder
from safetensors.torch import load_file, save_file
from shard_damage import Planted

from transfusion_fast.data.vision_encoder import PROCESSOR, read_vision_encoder
from transfusion_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("on_the_cpu")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "vit"
    return folder, save_vision_encoder(folder)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(saved[0], tmp_path / "vit")


def features(model, pixels):
    """Return fp32 [n, rows, columns, 16] with transformers' model alone, its first token, of the class, left out."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    images = (scaled - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        tokens = model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    return tokens[:, 1:].reshape(len(pixels), pixels.shape[1] // 4, -1, 16)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_latents_are_the_features_of_patches_row_by_row_less_their_mean_over_their_deviation(saved, size):
    folder, model = saved
    encoder, pixels = read_vision_encoder(folder), random_pixels(3, *size, 3)
    assert (encoder.stride, encoder.channels, encoder.image_size) == (4, 16, 16)
    expected = features(model, pixels)
    raw = encoder.encode(pixels)
    torch.testing.assert_close(torch.from_numpy(raw).float(), expected, rtol=1e-3, atol=1e-3)
    normalised = encoder.normalised_by([*raw])
    mean, std = (f(expected, dim=(0, 1, 2)) for f in (torch.mean, lambda x, dim: torch.std(x, dim, correction=0)))
    found = torch.from_numpy(normalised.encode(pixels)).float()
    torch.testing.assert_close(found, (expected - mean) / std, rtol=2e-3, atol=4e-3)
    [restored] = [found * torch.tensor(info.std) + torch.tensor(info.mean) for info in [normalised.modality("i", 1)]]
    torch.testing.assert_close(restored, expected, rtol=2e-3, atol=4e-3)


def test_a_constant_channel_becomes_zero_and_another_encoders_normalisation_is_refused(saved):
    encoder = read_vision_encoder(saved[0])
    constant = encoder.normalised_by([np.full((2, 2, 16), 3.0, np.float16)])
    assert np.allclose(constant.mean, 3) and np.allclose(constant.std, 1e-5**0.5)
    made = constant.modality("images", 1)
    assert encoder.normalised_like(made, "OTHER") == constant
    with pytest.raises(InputError, match=r"vision encoder of OTHER must have fingerprint 000000000000 and 16 channels"):
        encoder.normalised_like(replace(made, autoencoder="0" * 64), "OTHER")


def test_the_size_of_images_is_that_of_the_processor_in_whole_patches(folder):
    edit(PROCESSOR, size={"height": 18, "width": 18})(folder)
    assert read_vision_encoder(folder).image_size == 16
    crop = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
    edit(PROCESSOR, size={"shortest_edge": 20}, crop_size={"height": 13, "width": 13}, **crop)(folder)
    assert read_vision_encoder(folder).image_size == 12


def test_of_a_model_of_images_and_text_the_vision_half_is_taken(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**sizes, "vocab_size": 9, "max_position_embeddings": 4, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(tmp_path)
    own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(size={"shortest_edge": 16}, **own).save_pretrained(tmp_path)
    encoder, pixels = read_vision_encoder(tmp_path), random_pixels(2, 16, 16, 3)
    with torch.no_grad():
        tokens = model.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
    found = torch.from_numpy(encoder.encode(pixels)).float()
    torch.testing.assert_close(found, tokens[:, 1:].reshape(2, 2, 2, 16), rtol=1e-3, atol=2e-3)


def edit(name, **fields):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(folder / "written")))


def without_a_weight(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["embeddings.cls_token"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def masked(folder):
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTMAEModel(ViTMAEConfig(**sizes, image_size=16, patch_size=4, mask_ratio=0.0)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, "must be a folder with config.json, got none"),
        (lambda folder: (folder / PROCESSOR).unlink(), f"must be a folder with {PROCESSOR}, got none"),
        (pickled, "must be one file model.safetensors, never a pickle"),
        (edit(CONFIG, model_type="gpt_nowhere", auto_map={"AutoModel": "planted.Model"}), "must be readable, got"),
        (edit(CONFIG, model_type="bert", architectures=["BertModel"]), "must be those of its config|must be readable"),
        (edit(CONFIG, hidden_size=32), "must be those of its config|must be readable"),
        (edit(PROCESSOR, size={"longest_edge": 16}), "must be squares within its images, got 4 in None"),
        (without_a_weight, "got a difference in embeddings.cls_token"),
        (masked, "must be the same for the same image"),
    ],
)
def test_what_is_not_a_vision_encoder_gets_one_line(folder, damage, complaint):
    damage(folder)
    with pytest.raises(InputError, match=complaint) as error:
        read_vision_encoder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (folder / "written").exists()


def test_a_grid_that_the_tokens_do_not_fill_is_refused(folder):
    edit(CONFIG, patch_size=2)(folder)  # the weights are those of patches of 4
    with pytest.raises(InputError):
        read_vision_encoder(folder)
    shutil.rmtree(folder)
    from transformers import SwinConfig, SwinModel, ViTImageProcessor

    SwinModel(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    with pytest.raises(InputError, match=r"a token for each of 16 x 16 patches, got features of shape \(64, 16\)"):
        read_vision_encoder(folder)
