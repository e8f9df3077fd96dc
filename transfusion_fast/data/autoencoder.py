"""Autoencoders from pixels to latents and back: diffusers' `AutoencoderKL` from a local folder.

latents = (z - shift_factor) * scaling_factor, with the factors of its config, where z is the mean of the posterior or
mean + std * noise (Rombach et al., arXiv 2112.10752, section 3.1 and appendix G; later models added the shift).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, TypeAdapter
from torch import Tensor

from transfusion_fast.data.images import scale_pixels, unscale_pixels
from transfusion_fast.data.latent_encoder import CONFIG, LatentEncoder, device_of_latents, fingerprint_of, one_thread
from transfusion_fast.errors import optional_module
from transfusion_fast.files import parse_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
_DECODE_BATCH = 8  # a decoder's activations take several hundred times the memory of its latents


class _Config(BaseModel):
    """Settings that `encode` and `decode` depend on, with diffusers' defaults. Extra settings are diffusers' own."""

    class_name: Literal["AutoencoderKL"] = Field(alias="_class_name")
    latents_mean: None = None
    latents_std: None = None
    quantization_config: None = None
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: PositiveInt = 4
    block_out_channels: tuple[PositiveInt, ...] = (64,)
    scaling_factor: Annotated[FiniteFloat, Field(gt=0)] = 0.18215
    shift_factor: FiniteFloat | None = None


_CONFIGS = TypeAdapter(_Config)


@dataclass(frozen=True)
class Autoencoder(LatentEncoder):
    """An autoencoder in a folder, made by `read_autoencoder`."""

    scale: float
    shift: float
    kind: ClassVar[str] = "autoencoder"
    weights: ClassVar[str] = WEIGHTS
    settings: ClassVar[dict[str, str]] = {CONFIG: "give MODEL/vae of a model"}

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        model = self.model
        images = rearrange(torch.from_numpy(scale_pixels(pixels)), "n h w c -> n c h w")
        with one_thread():
            posterior = model.encode(images.to(model.device, model.dtype)).latent_dist
            z = posterior.mean.float()
            if noise is not None:
                z = z + posterior.std.float() * rearrange(torch.from_numpy(noise), "n h w c -> n c h w").to(z.device)
            latents = (z - self.shift) * self.scale
        return rearrange(latents.half(), "n c h w -> n h w c").cpu().numpy()

    @torch.inference_mode()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode [n, h, w, channels] of any float dtype to uint8 [n, height, width, 3], clipped to pixel values."""
        model = self.model
        z = torch.from_numpy(latents).float() / self.scale + self.shift
        z = rearrange(z, "n h w c -> n c h w").to(model.device, model.dtype)
        images: list[Tensor] = [model.decode(part).sample.float().cpu() for part in z.split(_DECODE_BATCH)]
        return unscale_pixels(rearrange(torch.cat(images), "n c h w -> n h w c").numpy())

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
        diffusers = optional_module("diffusers", "vae")
        # Missing or superfluous weights are an error; diffusers would only print warnings of several lines.
        logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
        model, found = diffusers.AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,  # True would need the package accelerate
            output_loading_info=True,
        )
        return model, [str(name) for names in found.values() for name in names]


def read_autoencoder(folder: Path) -> Autoencoder:
    """Return the autoencoder in a folder that diffusers' `save_pretrained` wrote, after reading its weights.

    Raises:
        InputError: The folder holds none, its weights are pickled or do not fit its config, or diffusers is missing.
    """
    folder = Path(folder).resolve()
    fingerprint, path = fingerprint_of(Autoencoder, folder), folder / CONFIG
    config = parse_json(_CONFIGS, path.read_bytes(), str(path), "give another autoencoder")
    stride = 2 ** (len(config.block_out_channels) - 1)
    scale, shift = config.scaling_factor, config.shift_factor or 0.0
    found = Autoencoder(folder, fingerprint, config.latent_channels, stride, device_of_latents(), scale, shift)
    found.model  # noqa: B018  # reads the weights
    return found
