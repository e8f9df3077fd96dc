"""Codecs between latent patches and transformer vectors, one for each modality. Letters as in sequence.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion_fast.modalities import ModalityConfig
from transfusion_fast.model.layers import Linear, TimestepEmbedding
from transfusion_fast.model.packed_batch import ModalityBatch
from transfusion_fast.model.unet import UNetCodec


class LinearCodec(nn.Module):
    """One linear layer in each direction; the timestep is added to every patch first (arXiv 2408.11039, section 3.1),
    unless the blocks are given it.

    A batch without images passes through as [0, C], so that every rank runs the same modules on any data.
    """

    def __init__(self, dim_latent: int, dim: int, add_timestep: bool = True):
        super().__init__()
        self.timestep = TimestepEmbedding(dim_latent) if add_timestep else None
        self.encoder = Linear(dim_latent, dim, bias=True)
        self.decoder = Linear(dim, dim_latent, bias=True, std=1 / dim)  # so that the first prediction is near zero

    def encode(self, x_t: Tensor, images: ModalityBatch) -> tuple[Tensor, None]:
        """Map noisy patches fp32 [P, C] to [P, E] in the weights' dtype; return them, and nothing for `decode`."""
        if self.timestep is None:
            return self.encoder(x_t.to(self.encoder.weight.dtype)), None
        image_P = torch.repeat_interleave(images.image_offsets.diff(), output_size=len(x_t))
        shift_PC = F.embedding(image_P, self.timestep(images.timesteps))  # its backward sums in a fixed order
        return self.encoder(x_t.to(shift_PC.dtype) + shift_PC), None

    def decode(self, hidden: Tensor, encoded: Any) -> Tensor:
        """Map [P', E] of trained images to the model's prediction [P', C] in the weights' dtype."""
        return self.decoder(hidden)


Codec = LinearCodec | UNetCodec


def make_codec(modality: ModalityConfig, dim: int, add_timestep: bool = True) -> Codec:
    """Return the codec of a modality for a transformer of width `dim`. A U-Net needs the timestep in any case."""
    if modality.codec == "unet":
        return UNetCodec(modality.dim_latent, modality.patch_size, dim)
    return LinearCodec(modality.dim_latent, dim, add_timestep)


def multiply_adds(modality: ModalityConfig, dim: int) -> tuple[float, float]:
    """Return the multiply-adds of a codec's matrices and convolutions to encode a patch, and to decode one."""
    if modality.codec == "linear":
        return modality.dim_latent * dim, modality.dim_latent * dim
    return _unet_without_memory(modality.dim_latent, modality.patch_size, dim).multiply_adds()


def kept_bytes(modality: ModalityConfig, dim: int, itemsize: int) -> tuple[float, float]:
    """Return the bytes that a codec keeps for backward to encode a patch, and to decode one from `dim` numbers."""
    encoding, decoding = itemsize * float(modality.dim_latent), 0.0
    if modality.codec == "unet":
        unet = _unet_without_memory(modality.dim_latent, modality.patch_size, dim)
        encoding, decoding = unet.kept_bytes(itemsize)
    return encoding, decoding + itemsize * (dim + modality.dim_latent)  # which the loss compares


@cache
def _unet_without_memory(dim_latent: int, patch_size: Any, dim: int) -> UNetCodec:
    with torch.device("meta"):
        return UNetCodec(dim_latent, patch_size, dim)
