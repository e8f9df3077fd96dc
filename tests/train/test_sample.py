"""train/sample.py: that it draws what the Python interface draws."""

from pathlib import Path

import torch
from launching import train

from transfusion_fast.data.images import latents_to_pixels
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.digits import Digits
from transfusion_fast.sampling.decoder import ImageSettings, generate_images
from transfusion_fast.sampling.pictures import draw_grid
from transfusion_fast.training.run_folder import find_checkpoint, load_model, read_data_description


def test_a_prompt_and_a_seed_draw_the_images_of_the_python_interface(tmp_path: Path, command) -> None:
    prepare_splits(Digits(), tmp_path / "digits", sequence_length=128, packs_per_shard=16)
    run = tmp_path / "run"
    train(1, tmp_path / "digits" / "train", run, "train.steps=1")
    drawn, expected = tmp_path / "drawn.png", tmp_path / "expected.png"
    command("sample", run, "--prompt", "one", "--each", 2, "--steps", 2, "--seed", 3, "--out", drawn)

    data, model = read_data_description(run), load_model(find_checkpoint(run))
    prompt = [torch.from_numpy(data.tokenizer.encode("one")).long()]
    settings = ImageSettings(steps=2, guidance=3.0, eta=1.0, clip=1.0)
    generator = torch.Generator().manual_seed(3)
    latents = generate_images(model, [prompt] * 2, data.grid(0), image=settings, generator=generator)
    draw_grid([("one", [latents_to_pixels(latents.numpy(), patch_size=2)])], expected)
    assert drawn.read_bytes() == expected.read_bytes()
