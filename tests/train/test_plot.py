"""train/plot.py: what it draws of a run, and the one line that bad input gets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import train
from PIL import Image

from transfusion_fast.data.images import latents_to_pixels
from transfusion_fast.prepare.examples.built_in import prepare_splits
from transfusion_fast.prepare.examples.digits import Digits
from transfusion_fast.sampling import overview
from transfusion_fast.sampling.decoder import ImageSettings, generate_images
from transfusion_fast.training.run_folder import find_checkpoint, load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits with three checkpoints."""
    folder = tmp_path_factory.mktemp("overview")
    prepare_splits(Digits(), folder / "digits", sequence_length=128, packs_per_shard=16)
    train(1, folder / "digits" / "train", folder / "run", "train.steps=3", "train.checkpoint_every=1")
    return folder / "run"


def test_plot_draws_a_column_for_the_noise_and_each_checkpoint(run: Path, tmp_path: Path, command, monkeypatch) -> None:
    drawn = []
    draw = overview.draw_overview
    monkeypatch.setattr(overview, "draw_overview", lambda *arguments: (drawn.append(arguments), draw(*arguments)))
    picture = tmp_path / "new" / "run.png"
    code, out, _ = command("plot", run, "--steps", 2, "--prompt", "one", "two", "--out", picture)
    assert (code, out) == (0, f"picture: {picture}\n")
    [(_, samples, *_)] = drawn
    assert samples.steps == [0, 1, 2, 3] and samples.prompts == ["one", "two"]
    assert samples.images.shape == (4, 2, 8, 8, 1)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(samples.images[0], latents_to_pixels(noise.numpy(), 2))
    model, prompts = load_model(find_checkpoint(run)), [[torch.tensor([*word.encode()])] for word in ("one", "two")]
    seeded, image = torch.Generator().manual_seed(0), ImageSettings(2, clip=1.0)
    last = generate_images(model, prompts, (4, 4), image=image, generator=seeded)
    assert np.array_equal(samples.images[3], latents_to_pixels(last.numpy(), 2))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert samples.losses == [(row["step"], row["loss"]) for row in logged]
    assert len(np.unique(samples.images.reshape(4, -1), axis=0)) == 4  # noise, and three different models
    with Image.open(picture) as image:
        assert image.width == 1800 and len(image.convert("RGB").getcolors(1 << 20)) > 100


def test_plot_draws_the_same_picture_twice_and_the_captions_of_the_pack_by_default(run, tmp_path, command) -> None:
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        assert command("plot", run, "--steps", 1, "--out", picture)[0] == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_plot_refuses_what_it_cannot_draw_in_one_line(run: Path, tmp_path: Path, command) -> None:
    text_alone = shutil.copytree(run, tmp_path / "text")
    description = json.loads((text_alone / "data.json").read_text())
    (text_alone / "data.json").write_text(json.dumps({**description, "modalities": [], "image_sizes": []}))
    for arguments, complaint in (
        ((tmp_path,), "is not a run folder"),
        ((text_alone,), "plot needs a run on pixels"),
        ((run, "--pack", -1), "--pack must be 0 or more, got -1"),
        ((run, "--steps", 0), "diffusion steps must be at least 1, got 0"),
        ((run, "--out", "picture.jpg"), "picture must be a file NAME.png, got picture.jpg"),
    ):
        code, _, err = command("plot", *arguments)
        assert code == 2 and err.startswith("plot: ") and err.count("\n") == 1 and complaint in err
