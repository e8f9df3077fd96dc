"""Autoencoders from pixels to latents and back: diffusers' `AutoencoderKL` from a local folder.

latents = (z - shift_factor) * scaling_factor, with the factors of its config, where z is the mean of the posterior or
mean + std * noise (Rombach et al., arXiv 2112.10752, section 3.1 and appendix G; later models added the shift). On a
CPU it runs in fp32 and one thread, so that neither the number of cores nor bf16 support changes a bit. On a GPU it runs
in bf16, as fp16 overflows in some of these models.

Weights are read from safetensors alone, as a pickle can run code. diffusers, which takes seconds to import, is imported
when a model is first read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from einops import rearrange
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from transfusion_fast.data.images import scale_pixels, unscale_pixels
from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.files import parse_json

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
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
class Autoencoder:
    """An autoencoder in a folder, without its weights; made by `read_autoencoder`.

    Picklable: each process reads the weights when it first needs them.
    """

    folder: Path
    fingerprint: str
    """sha256 of the config and the weights, as hexadecimal digits."""
    channels: int
    """Channels of its latents."""
    stride: int
    """Pixels a side of one latent value."""
    scale: float
    shift: float
    device: str
    """Device of every process that it is sent to: "cuda" or "cpu"."""

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Encode uint8 [n, height, width, 3] to float16 [n, h, w, channels]; sides must be multiples of `stride`.

        Returns the mean of the posterior, or a sample of it with `noise`, fp32 [n, h, w, channels]. Values beyond
        float16 become infinite.
        """
        model = _model(self.folder, self.fingerprint, self.device)
        images = rearrange(torch.from_numpy(scale_pixels(pixels)), "n h w c -> n c h w")
        with _one_thread():
            posterior = model.encode(images.to(model.device, model.dtype)).latent_dist
            z = posterior.mean.float()
            if noise is not None:
                z = z + posterior.std.float() * rearrange(torch.from_numpy(noise), "n h w c -> n c h w").to(z.device)
            latents = (z - self.shift) * self.scale
        return rearrange(latents.half(), "n c h w -> n h w c").cpu().numpy()

    @torch.inference_mode()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode [n, h, w, channels] of any float dtype to uint8 [n, height, width, 3], clipped to pixel values."""
        model = _model(self.folder, self.fingerprint, self.device)
        z = torch.from_numpy(latents).float() / self.scale + self.shift
        z = rearrange(z, "n h w c -> n c h w").to(model.device, model.dtype)
        images: list[Tensor] = [model.decode(part).sample.float().cpu() for part in z.split(_DECODE_BATCH)]
        return unscale_pixels(rearrange(torch.cat(images), "n c h w -> n h w c").numpy())

    def check_made(self, fingerprint: str, channels: int, what: str) -> None:
        """Raise InputError if another autoencoder made the latents of `what`; an empty fingerprint is unknown."""
        if fingerprint not in ("", self.fingerprint) or channels != self.channels:
            raise InputError(
                f"autoencoder of {what} must have fingerprint {fingerprint[:12] or 'unknown'} and {channels} channels, "
                f"got {self.fingerprint[:12]} and {self.channels} in {self.folder}; "
                "give the folder that its data was prepared with"
            )


def read_autoencoder(folder: Path) -> Autoencoder:
    """Return the autoencoder in a folder that diffusers' `save_pretrained` wrote, after reading its weights.

    Raises:
        InputError: The folder holds none, its weights are pickled or do not fit its config, or diffusers is missing.
    """
    folder = Path(folder).resolve()
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"autoencoder {folder} must be a folder with {CONFIG}, got none; give MODEL/vae of a model")
    config = parse_json(_CONFIGS, path.read_bytes(), str(path), "give another autoencoder")
    fingerprint, device = _fingerprint(folder), "cuda" if torch.cuda.is_available() else "cpu"
    _model(folder, fingerprint, device)
    stride = 2 ** (len(config.block_out_channels) - 1)
    scale, shift = config.scaling_factor, config.shift_factor or 0.0
    return Autoencoder(folder, fingerprint, config.latent_channels, stride, scale, shift, device)


def _fingerprint(folder: Path) -> str:
    """Digest weights and settings, except diffusers' notes (names with _) of its version and the model's origin."""
    # diffusers would read an index of several files before the one file, and a pickle if there are no safetensors.
    names = sorted(path.name for path in folder.iterdir())
    if WEIGHTS not in names or f"{WEIGHTS}.index.json" in names:
        raise InputError(
            f"weights of {folder} must be one file {WEIGHTS}, never a pickle, got {', '.join(names):.200}; "
            "convert them with save_pretrained(.., safe_serialization=True)"
        )
    settings = json.loads((folder / CONFIG).read_bytes())
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with (folder / WEIGHTS).open("rb") as file:
        sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()


@lru_cache(maxsize=1)
def _model(folder: Path, fingerprint: str, device: str) -> Any:
    """Return the model on a device. The fingerprint is in the cache's key, so that a changed folder is noticed."""
    if _fingerprint(folder) != fingerprint:
        raise InputError(f"autoencoder {folder} must not change while it is in use, got other files; start again")
    diffusers = optional_module("diffusers", "vae")
    # Missing or superfluous weights are an error below; diffusers would only print warnings of several lines.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    try:
        model, found = diffusers.AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            low_cpu_mem_usage=False,  # True would need the package accelerate
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"autoencoder {folder} must be readable, got {line:.200}; copy it or save it again") from error
    # diffusers leaves weights that the file lacks at random values.
    wrong = [str(name) for names in found.values() for name in names]
    if wrong:
        raise InputError(f"weights in {folder} must be those of its config, got a difference in {wrong[0]}; save again")
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread, as the number of threads changes the last digit of sums; processes use the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
