"""Autoencoders with random weights that run in milliseconds, in folders as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_autoencoder(folder: Path, seed: int = 0, **settings: Any) -> Any:
    """Write an autoencoder of stride 2 and 4 latent channels to a folder; return diffusers' own object."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            **settings,
        )
    model.save_pretrained(folder)
    return model.eval()


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random uint8 of that shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
