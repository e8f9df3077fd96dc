"""Patch features of a frozen vision encoder as latents (representation autoencoders, arXiv 2510.11690).

latents = (feature - mean) / std per channel. The features are the last hidden states of a `transformers` model from a
local folder, one vector a patch; the image processor in the folder scales the pixels, whose size and shape are those of
the data and not of the processor.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from transfusion_fast.data.latent_encoder import CONFIG, LatentEncoder, device_of_latents, fingerprint_of, one_thread
from transfusion_fast.data.pack import ModalityInfo
from transfusion_fast.errors import InputError, optional_module

PROCESSOR = "preprocessor_config.json"
_REMEDY = "give a vision transformer with its image processor, as save_pretrained wrote them"
_EPSILON = 1e-5  # of the variance, so that a constant channel becomes zero


class _Features(nn.Module):
    """A model, or the vision half of a model of images and text, behind the image processor of its folder."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = getattr(model, "vision_model", model), processor
        patch = getattr(getattr(model.config, "vision_config", model.config), "patch_size", None)
        self.patch_size = patch[0] if isinstance(patch, list | tuple) and len(set(patch)) == 1 else patch
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        self.image_size = size.get("height") or size.get("shortest_edge")
        # Images may have another size than the position table; some models interpolate it only if told to.
        accepted = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}

    def forward(self, pixels: np.ndarray) -> Tensor:
        """Return the last hidden states, fp32 [n, tokens, C], of uint8 [n, height, width, 3]."""
        scaled = self.processor(
            images=list(pixels), do_resize=False, do_center_crop=False, input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"]  # fmt: skip
        weight = next(self.model.parameters())
        images = scaled.to(weight.device, weight.dtype)
        return self.model(pixel_values=images, **self.options).last_hidden_state.float()


@dataclass(frozen=True)
class VisionEncoder(LatentEncoder):
    """A vision encoder in a folder, made by `read_vision_encoder`."""

    image_size: int
    """Side of the images in pixels that its processor was made for."""
    mean: tuple[float, ...] = ()
    """Mean of each channel of the features; empty for features that are stored as they are."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel of the features."""
    kind: ClassVar[str] = "vision encoder"
    weights: ClassVar[str] = "model.safetensors"
    settings: ClassVar[dict[str, str]] = {CONFIG: _REMEDY, PROCESSOR: _REMEDY}

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Return the normalised features, as the base class says; they have no distribution, so `noise` must be None.

        Class and register tokens, which stand before those of the patches, are dropped.
        """
        assert noise is None
        height, width = pixels.shape[1:3]
        rows, columns = height // self.stride, width // self.stride
        with one_thread():
            try:
                tokens = self.model(pixels)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
                line = " ".join(str(error).split())
                raise InputError(
                    f"{self.kind} {self.folder} must give features of an image of {width} x {height} pixels, got "
                    f"{line:.200}; give another image size, or another encoder"
                ) from error
            if tokens.ndim != 3 or tokens.shape[1] < rows * columns:
                raise InputError(
                    f"{self.kind} {self.folder} must give a token for each of {rows} x {columns} patches, got features "
                    f"of shape {tuple(tokens.shape[1:])}; {_REMEDY}"
                )
            features = rearrange(tokens[:, -rows * columns :], "n (h w) c -> n h w c", h=rows)
            if self.mean:
                features = (features - features.new_tensor(self.mean)) / features.new_tensor(self.std)
        return features.half().cpu().numpy()

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
        transformers = optional_module("transformers", "encoder")
        # What it would warn of is an error below, or not used.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **local)
        model, found = transformers.AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            torch_dtype=dtype,
            ignore_mismatched_sizes=True,  # they are listed
            output_loading_info=True,
            **local,
        )
        # The heads of other tasks are superfluous, and a pooler that the file lacks is not used.
        different = [str(name) for key in ("missing_keys", "mismatched_keys") for name in found[key]]
        return _Features(model, processor), sorted(name for name in different if "pooler" not in name)

    def modality(self, name: str, patch_size: int) -> ModalityInfo:
        return replace(super().modality(name, patch_size), mean=self.mean, std=self.std)

    def normalised_like(self, modality: ModalityInfo, what: str) -> Self:
        """Return the encoder with the normalisation of the features of `what`; InputError if another one made them."""
        self.check_made(modality.autoencoder, modality.channels, what)
        return replace(self, mean=modality.mean, std=modality.std)

    def normalised_by(self, features: Sequence[np.ndarray]) -> Self:
        """Return the encoder with the mean and standard deviation of these features, [h, w, channels] each."""
        tokens = np.concatenate([values.reshape(-1, self.channels) for values in features])
        std = np.sqrt(tokens.var(axis=0, dtype=np.float64) + _EPSILON)
        return replace(self, mean=(*tokens.mean(axis=0, dtype=np.float64).tolist(),), std=(*std.tolist(),))


def read_vision_encoder(folder: Path) -> VisionEncoder:
    """Return the vision encoder in a folder, after reading its weights and encoding one image twice.

    Raises:
        InputError: The folder holds none, its weights are pickled or do not fit its config, its features are not one
            vector a patch or are random, or transformers is missing.
    """
    folder = Path(folder).resolve()
    unread = VisionEncoder(folder, fingerprint_of(VisionEncoder, folder), 1, 1, device_of_latents(), 1)
    patch, side = unread.model.patch_size, unread.model.image_size
    if not isinstance(patch, int) or not side or side < patch:
        raise InputError(f"patches of {folder} must be squares within its images, got {patch} in {side}; {_REMEDY}")
    found = replace(unread, stride=patch, image_size=side // patch * patch)
    probe = np.random.default_rng(0).integers(0, 256, (1, found.image_size, found.image_size, 3), dtype=np.uint8)
    first, second = found.encode(probe), found.encode(probe)
    if not np.array_equal(first, second, equal_nan=True):  # such as those of a masked autoencoder, which shuffles them
        raise InputError(f"features of {folder} must be the same for the same image, got others; {_REMEDY}")
    return replace(found, channels=first.shape[-1])
