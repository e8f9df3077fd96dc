"""Autoencoders and a vision encoder with random weights, which run in milliseconds, in folders as they are saved."""

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


def save_vision_encoder(folder: Path, seed: int = 0, **settings: Any) -> Any:
    """Write a vision transformer of patches of 4 pixels and 16 channels to a folder; return transformers' own object.

    Its position table is that of 16 x 16 pixels.
    """
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.3, **settings))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return model.eval()


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random uint8 of that shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
