"""Pixels to an autoencoder's latents, and back: diffusers' `AutoencoderKL` from a local folder.

latents = (z - shift_factor) * scaling_factor of its config, where z is the posterior's mean or mean + std * noise
(Rombach et al., arXiv 2112.10752, section 3.1 and appendix G; the shift came with later ones). In fp32 and one thread
on a CPU, so that neither the number of cores nor what the CPU has for bf16 changes a bit; in bf16 on a GPU, as fp16
overflows in some of these models.

Weights are read from safetensors alone: a pickle runs code. diffusers is imported when a model is first read, which
takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor

from transfusion_fast.data.images import scale_pixels, unscale_pixels
from transfusion_fast.errors import InputError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_SHARDED = f"{WEIGHTS}.index.json"
_CLASS = "AutoencoderKL"
_DECODED_TOGETHER = 8  # a decoder's activations are some hundred times its latents


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder by its folder, and what is known of it without its weights; made by `read_autoencoder`.

    Picklable: each process reads the weights when it first needs them.
    """

    folder: Path
    fingerprint: str
    """Hexadecimal sha256 of the config and the weights."""
    channels: int
    """Of its latents."""
    stride: int
    """Pixels a side that one latent value stands for."""
    scale: float
    shift: float
    device: str
    """Where it runs, in every process that it is sent to: "cuda" or "cpu"."""

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """uint8 [n, height, width, 3], sides multiples of `stride` -> float16 [n, h, w, channels].

        `noise`, fp32 [n, h, w, channels], makes them samples of the posterior; without it they are its mean. What
        float16 cannot hold becomes infinite.
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
        """[n, h, w, channels] of any float dtype -> uint8 [n, height, width, 3], clipped to what pixels can show."""
        model = _model(self.folder, self.fingerprint, self.device)
        z = torch.from_numpy(latents).float() / self.scale + self.shift
        z = rearrange(z, "n h w c -> n c h w").to(model.device, model.dtype)
        images: list[Tensor] = [model.decode(part).sample.float().cpu() for part in z.split(_DECODED_TOGETHER)]
        return unscale_pixels(rearrange(torch.cat(images), "n c h w -> n h w c").numpy())

    def check_made(self, fingerprint: str, channels: int, what: str) -> None:
        """InputError where the latents of `what`, of so many channels, were made by another autoencoder.

        An empty fingerprint says that it is not known which one made them.
        """
        if fingerprint not in ("", self.fingerprint):
            raise InputError(
                f"autoencoder of {what} must be the one of fingerprint {fingerprint[:12]}.., "
                f"got {self.fingerprint[:12]}.. in {self.folder}; give the folder that its data was prepared with"
            )
        if channels != self.channels:
            raise InputError(
                f"autoencoder of {what} must have {channels} channels, got {self.channels} in {self.folder}; "
                "give the folder that its data was prepared with"
            )


def read_autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder of a folder that diffusers' `save_pretrained` wrote, its weights read and held for use.

    InputError where the folder is none, its weights are pickled or do not fit its config, or diffusers is missing.
    """
    folder = Path(folder).resolve()
    config = _read_config(folder)
    fingerprint = _fingerprint(config, _weights(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full = _model(folder, fingerprint, device).config
    scale, shift = full.scaling_factor, 0.0 if full.shift_factor is None else full.shift_factor
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (scale, shift)) or scale <= 0:
        raise InputError(
            f"scaling_factor in {folder / CONFIG} must be a positive number and shift_factor a number or null, "
            f"got {scale!r} and {shift!r}; correct it"
        )
    stride = 2 ** (len(full.block_out_channels) - 1)
    return Autoencoder(folder, fingerprint, full.latent_channels, stride, float(scale), float(shift), device)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, of a class and of settings that `encode` and `decode` follow."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"autoencoder {folder} must be a folder with {CONFIG}, and is not; give MODEL/vae of a model")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON, and is not; copy it again") from error
    name = config.get("_class_name") if isinstance(config, dict) else config
    if name != _CLASS:
        raise InputError(f"_class_name in {path} must be {_CLASS}, got {name!r:.60}; give another autoencoder")
    for field in ("latents_mean", "latents_std", "quantization_config"):
        if config.get(field) is not None:
            raise InputError(f"{field} in {path} must be null, got {config[field]!r:.60}; give another autoencoder")
    for field in ("in_channels", "out_channels"):
        if config.get(field, 3) != 3:
            raise InputError(f"{field} in {path} must be 3 for colour, got {config[field]!r:.60}; give another one")
    return config


def _weights(folder: Path) -> Path:
    """The file of the weights, the only one that diffusers would read there."""
    if (folder / _SHARDED).exists():
        raise InputError(f"weights of {folder} must lie in one file {WEIGHTS}, got {_SHARDED}; save them as one")
    if not (folder / WEIGHTS).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise InputError(
            f"weights of {folder} must be {WEIGHTS}, never a pickle, and are not there, among {found:.200}; "
            "convert them with save_pretrained(.., safe_serialization=True)"
        )
    return folder / WEIGHTS


def _fingerprint(config: dict[str, Any], weights: Path) -> str:
    """Of the settings but not what diffusers notes beside them: its version, and where the model came from."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with weights.open("rb") as file:
        sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()


@lru_cache(maxsize=1)
def _model(folder: Path, fingerprint: str, device: str) -> Any:
    """The model on that device; the fingerprint is in the key lest a folder that has changed be taken for itself."""
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # diffusers raises the latter where what it imports is broken
        raise InputError(f"autoencoder {folder} needs the package diffusers ({_line(error)}); install it") from error
    if _fingerprint(_read_config(folder), _weights(folder)) != fingerprint:
        raise InputError(f"autoencoder {folder} must stay as it is while it is in use, and has changed; begin anew")
    # It would warn of weights that are missing or left over in lines of its own; they are an error below.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    try:
        model, found = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            low_cpu_mem_usage=False,  # which would need the package accelerate
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, SafetensorError) as error:
        raise InputError(f"autoencoder {folder} cannot be read ({_line(error)}); copy it or save it again") from error
    # diffusers leaves weights that the file lacks as they happen to be.
    wrong = [str(name) for names in found.values() for name in names]
    if wrong:
        raise InputError(f"weights in {folder} must be those of its config, and differ in {wrong[0]}; save it again")
    return model


def _line(error: Exception) -> str:
    """What it says, of any number of lines, in one."""
    return " ".join(str(error).split())[:200]


@contextmanager
def _one_thread() -> Iterator[None]:
    """How a sum is shared among threads would show in its last digit; processes use the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
