"""Codecs between latent patches and transformer vectors, one for each modality."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion_fast.model.layers import Linear, TimestepEmbedding


class LinearCodec(nn.Module):
    """One linear layer in each direction; the timestep is added to every patch first (arXiv 2408.11039, section 3.1),
    unless the blocks are given it.

    Letters as in sequence.py. A batch without images passes through as [0, C], so that every rank runs the same
    modules on any data.
    """

    def __init__(self, dim_latent: int, dim: int, add_timestep: bool = True):
        super().__init__()
        self.timestep = TimestepEmbedding(dim_latent) if add_timestep else None
        self.encoder = Linear(dim_latent, dim, bias=True)
        self.decoder = Linear(dim, dim_latent, bias=True, std=1 / dim)  # so that the first prediction is near zero

    def encode(self, x_t: Tensor, timesteps: Tensor, image_offsets: Tensor) -> Tensor:
        """Map noisy patches fp32 [P, C], timesteps [N] and image_offsets [N + 1] to [P, E] in the weights' dtype."""
        if self.timestep is None:
            return self.encoder(x_t.to(self.encoder.weight.dtype))
        image_P = torch.repeat_interleave(image_offsets.diff(), output_size=len(x_t))
        shift_PC = F.embedding(image_P, self.timestep(timesteps))  # its backward sums in a fixed order
        return self.encoder(x_t.to(shift_PC.dtype) + shift_PC)

    def decode(self, hidden: Tensor) -> Tensor:
        """Map [P, E] to the model's prediction [P, C] in the weights' dtype."""
        return self.decoder(hidden)
