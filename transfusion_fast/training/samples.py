"""Pictures of what a model draws while it is trained, always of the same captions and from the same noise."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from PIL import Image

from transfusion_fast.config import TrainConfig
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.files import write_atomically
from transfusion_fast.model.transfusion import Transfusion
from transfusion_fast.sampling.decoder import generate_images
from transfusion_fast.sampling.pictures import draw_grid, images_to_pixels, open_autoencoder
from transfusion_fast.sampling.settings import ImageSettings
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.run_folder import DataDescription

SAMPLES = "samples"
"""Folder of a run with a picture for each step, and an animation of them."""
_ANIMATION = "learned.png"
_FRAME, _LAST_FRAME = 600, 2400  # milliseconds


class PromptSampler:
    """A sampler of the captions of `train.sample_prompts`, and the folder of its pictures."""

    def __init__(self, settings: TrainConfig, data: DataDescription, run: Path, ranks: Ranks):
        """Open the autoencoder, if the run is on latents.

        Raises:
            InputError: the run has no images, their autoencoder is not given, or matplotlib is not installed.
        """
        if not data.modalities:
            raise InputError(f"train.sample_every must be 0 for {run}, a run on text alone; leave it out")
        self.settings, self.data, self.folder, self.ranks = settings, data, run / SAMPLES, ranks
        vae = None if settings.sample_vae is None else Path(settings.sample_vae)
        self.autoencoder = open_autoencoder(vae, data.modalities[:1], "train.sample_vae", str(run))
        optional_module("matplotlib", "examples")
        ids = [torch.from_numpy(data.tokenizer.encode(prompt)).long() for prompt in settings.sample_prompts]
        self.prompts = [[one] for one in ids for _ in range(settings.sample_each)]

    def path(self, step: int) -> Path:
        """Return the picture of a step."""
        return self.folder / f"step-{step:08d}.png"

    def draw(self, model: Transfusion) -> torch.Tensor:
        """Return the images, fp32 [prompts x each, rows, columns, C], drawn by all ranks together. Collective.

        Each rank draws some of them. Each has noise of its own, so that the number of ranks does not matter.
        """
        modality = self.data.completed(model.config).modalities[0]
        grid = modality.shape or self.data.grid(0)
        settings = ImageSettings(self.settings.sample_steps, eta=self.settings.sample_eta, clip=modality.bound)
        numbers = range(len(self.prompts))
        own = self.ranks.own([*numbers]) or [0]  # all ranks run the model as often, since ZeRO gathers its weights
        prompts = [self.prompts[number] for number in own]
        try:
            images = generate_images(model, prompts, grid, image=settings, prompt_numbers=own)
        except InputError as error:  # a picture is no reason to end a run
            print(f"black samples are written, since {error}", file=sys.stderr, flush=True)
            images = torch.full((len(own), *grid, modality.dim_latent), -1.0)
        drawn = dict(self.ranks.gather([*zip(own, images, strict=True)]))
        return torch.stack([drawn[number] for number in numbers])

    def write(self, images: torch.Tensor, step: int) -> Path:
        """Write the picture of a step: a row for each caption."""
        pixels, each = images_to_pixels(images, self.data.modalities[0], self.autoencoder), self.settings.sample_each
        rows = [(prompt, [pixels[i * each :][:each]]) for i, prompt in enumerate(self.settings.sample_prompts)]
        self.folder.mkdir(exist_ok=True)
        picture = io.BytesIO()
        draw_grid(rows, picture, [f"step {step:,}"])
        write_atomically(self.path(step), picture.getvalue())
        return self.path(step)

    def animate(self, last_step: int) -> Path | None:
        """Write an animated PNG of the pictures up to a step; None if there are fewer than two."""
        paths = [path for path in sorted(self.folder.glob("step-*.png")) if path <= self.path(last_step)]
        if len(paths) < 2:
            return None
        first, *others = [Image.open(path).convert("RGB") for path in paths]
        animation = io.BytesIO()
        durations = [_FRAME] * len(others) + [_LAST_FRAME]
        first.save(animation, "PNG", save_all=True, append_images=others, duration=durations)
        write_atomically(self.folder / _ANIMATION, animation.getvalue())
        return self.folder / _ANIMATION
