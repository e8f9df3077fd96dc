"""The U-Net codec (arXiv 2408.11039, section 3.1): convolutions between the values of patches and the transformer.

The patches of an image, of p x p values, are folded back into the image. Down blocks halve it log2(p) times, to one
vector for each patch; up blocks reverse this, and each also reads what the down block of its resolution returned. As in
the paper, plain layer norms take the place of adaptive ones. Timesteps are added within blocks.

The pixels of all images are one axis [S, channels], images in the order of their shapes. Norms and linear layers work
on single pixels; convolutions take the images of each shape as one batch. So each module is called once and returns one
tensor, whatever a batch holds: ZeRO-3 gathers weights at every call, on all ranks together. Without images S is 0.
Letters as in sequence.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion_fast.errors import InputError
from transfusion_fast.model.layers import Linear, TimestepEmbedding
from transfusion_fast.model.packed_batch import ModalityBatch

TIMESTEP_DIM = 256
Grids = Sequence[tuple[int, int, int]]
"""(images, rows, columns) of each shape."""


class Encoded(NamedTuple):
    """The results of encoding that decoding needs, for the N' trained images with P' patches alone.

    order: int64 [P'], their patches in the order of shapes; grids: their shapes; timesteps: [N', TIMESTEP_DIM];
    skips: the outputs of the down blocks, finest first.
    """

    order: Tensor
    grids: Grids
    timesteps: Tensor
    skips: list[Tensor]


class Convolution(nn.Module):
    """A 3 x 3 convolution of pixels [S, inputs] -> [S, outputs], zero outside of each image, plus shifts [N, outputs].

    The constructor draws the weights, because ZeRO-3 scatters them over the ranks as soon as it returns.
    """

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        std = gain * (9 * inputs) ** -0.5
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, grids: Grids, shifts: Tensor | None = None) -> Tensor:
        parts = []
        shifts_of: Iterable[Tensor | None] = repeat(None) if shifts is None else shifts.split([n for n, _, _ in grids])
        for pixels, (n, h, w), shift in zip(_split(x, grids), grids, shifts_of, strict=False):
            # A view whose channels are last in memory, in which tensor cores compute without a transposition.
            images = pixels.unflatten(0, (n, h, w)).permute(0, 3, 1, 2)
            out = F.conv2d(images, self.weight, self.bias, padding=1)
            out = out if shift is None else out + shift[:, :, None, None]
            parts.append(out.permute(0, 2, 3, 1).flatten(0, 2))
        return _joined(parts)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + timestep))) for pixels x [S, inputs] -> [S, outputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(inputs), nn.LayerNorm(outputs)
        self.first, self.second = Convolution(inputs, outputs), Convolution(outputs, outputs, gain=0.1)
        self.timestep = Linear(TIMESTEP_DIM, outputs)
        self.skip = Linear(inputs, outputs, std=inputs**-0.5) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, grids: Grids, timesteps: Tensor) -> Tensor:
        hidden = self.first(F.silu(self.first_norm(x)), grids, self.timestep(timesteps))
        return self.skip(x) + self.second(F.silu(self.second_norm(hidden)), grids)


class UNetCodec(nn.Module):
    """Down and up blocks for images. Channels: half the transformer's width at the grid of patches, and half as many at
    each finer resolution, in multiples of 8.

    Raises:
        InputError: the patch size is not given, or does not divide the width.
    """

    def __init__(self, dim_latent: int, patch_size: int | None, dim: int):
        super().__init__()
        if patch_size is None or dim_latent % patch_size**2:
            rule = f"patch_size must be given with codec=unet, and its square must divide dim_latent={dim_latent}"
            raise InputError(f"{rule}, got {patch_size}; give the patches' height in values")
        self.patch_size, self.levels = patch_size, patch_size.bit_length() - 1
        values = dim_latent // patch_size**2
        channels = [max(8, dim >> (1 + self.levels - level) + 3 << 3) for level in range(self.levels + 1)]
        self.values, self.channels = values, channels
        pairs = list(pairwise(channels))
        self.timestep = TimestepEmbedding(TIMESTEP_DIM)
        self.enter = Convolution(values, channels[0])
        self.down = nn.ModuleList(ResidualBlock(c, c) for c in channels)
        self.shrink = nn.ModuleList(Linear(4 * c, above, bias=True, std=(4 * c) ** -0.5) for c, above in pairs)
        self.encoder_norm = nn.LayerNorm(channels[-1])
        self.encoder = Linear(channels[-1], dim, bias=True)
        self.decoder = Linear(dim, channels[-1], bias=True, std=dim**-0.5)
        self.up = nn.ModuleList(ResidualBlock(2 * c, c) for c in channels)
        self.grow = nn.ModuleList(Linear(above, 4 * c, bias=True, std=above**-0.5) for c, above in pairs)
        self.leave_norm = nn.LayerNorm(channels[0])
        self.leave = Convolution(channels[0], values, gain=0.1)  # so that the first prediction is near zero

    def encode(self, x_t: Tensor, images: ModalityBatch) -> tuple[Tensor, Encoded]:
        """Map noisy patches fp32 [P, C] to [P, E] in the weights' dtype; return them, and what `decode` needs."""
        grids = [(n, rows, columns) for n, _, rows, columns in images.shapes] or [(0, 1, 1)]
        if sum(_pixels(grids)) != len(x_t):
            raise ValueError(f"shapes must be those of all {len(x_t)} patches, got {images.shapes}; do not cut images")
        order = _patches_by_shape(images, grids)
        timesteps = F.silu(self.timestep(images.timesteps)).index_select(0, images.by_shape)
        x = _fold(x_t.index_select(0, order), grids, self.patch_size)
        x, skips = self.enter(x.to(timesteps.dtype), self._grids(grids, 0)), []
        for level, block in enumerate(self.down):
            x = block(x, self._grids(grids, level), timesteps)
            skips.append(x[: images.trained_patches * 4 ** (self.levels - level)])
            if level < self.levels:
                x = self.shrink[level](_unfold(x, self._grids(grids, level + 1), 2))
        patches = self.encoder(self.encoder_norm(x))
        ends = accumulate(_pixels(grids))  # trained images come first
        trained = [grid for grid, end in zip(grids, ends, strict=True) if end <= images.trained_patches] or [(0, 1, 1)]
        encoded = Encoded(order[: images.trained_patches], trained, timesteps[: images.num_trained], skips)
        return torch.zeros_like(patches).index_copy(0, order, patches), encoded

    def decode(self, hidden: Tensor, encoded: Encoded) -> Tensor:
        """Map [P', E] to the model's prediction [P', C] in the weights' dtype."""
        order, grids, timesteps, skips = encoded
        x = self.decoder(hidden.index_select(0, order))
        for level in reversed(range(self.levels + 1)):
            if level < self.levels:
                x = _fold(self.grow[level](x), self._grids(grids, level + 1), 2)
            x = self.up[level](torch.cat([x, skips[level]], dim=1), self._grids(grids, level), timesteps)
        x = self.leave(F.silu(self.leave_norm(x)), self._grids(grids, 0))
        patches = _unfold(x, grids, self.patch_size)
        return torch.zeros_like(patches).index_copy(0, order, patches)

    def multiply_adds(self) -> tuple[float, float]:
        """Return the multiply-adds of matrices and convolutions to encode a patch, and to decode one."""
        encoding = self._multiply_adds(self.enter, self.encoder, self.down, self.shrink)
        return encoding, self._multiply_adds(self.leave, self.decoder, self.up, self.grow)

    def kept_bytes(self, itemsize: int) -> tuple[float, float]:
        """Return the bytes that encoding a patch and decoding one keep for backward, with weights of `itemsize` bytes.

        A block of c channels keeps its input, and the inputs of SiLUs and convolutions: 6 c numbers a pixel down, and
        9 c up, where its input is two tensors joined. Its output is kept by what leads to the next level, and at the
        end by a norm that is followed by a SiLU or a linear layer. A norm also keeps a mean and a deviation in fp32,
        and the restored order of patches a copy. What `decoder` reads is left out, as a linear codec reads it too.
        """
        pixels = [4.0 ** (self.levels - level) for level in range(self.levels + 1)]
        widths = [n * c for n, c in zip(pixels, self.channels, strict=True)]
        encoding = itemsize * (pixels[0] * self.values + 7 * sum(widths) + widths[-1] + self.encoder.out_features)
        decoding = itemsize * (10 * sum(widths) + 2 * widths[0] + pixels[0] * self.values)
        return encoding + 8 * (2 * sum(pixels) + pixels[-1]), decoding + 8 * (2 * sum(pixels) + pixels[0])

    def _multiply_adds(self, pixels: nn.Module, patches: nn.Module, blocks: Any, between: Any) -> float:
        parts = [(pixels, 0), (patches, self.levels), *((block, level) for level, block in enumerate(blocks))]
        parts += [(linear, level) for level, linear in enumerate(between, start=1)]
        return sum(
            weight.numel() * 4 ** (self.levels - level)
            for part, level in parts
            for name, weight in part.named_parameters()
            if weight.ndim > 1 and "timestep" not in name
        )

    def _grids(self, grids: Grids, level: int) -> Grids:
        """Return the sizes of images after `level` halvings."""
        scale = self.patch_size >> level
        return [(n, h * scale, w * scale) for n, h, w in grids]


def _patches_by_shape(images: ModalityBatch, grids: Grids) -> Tensor:
    """Return the patches, int64 [P], of the images in the order of their shapes; no size here is read from a device."""
    first = images.image_offsets[:-1].index_select(0, images.by_shape).long()
    return torch.cat(
        [
            (start[:, None] + torch.arange(h * w, device=start.device)).flatten()
            for start, (_, h, w) in zip(first.split([n for n, _, _ in grids]), grids, strict=True)
        ]
    )


def _pixels(grids: Grids) -> list[int]:
    return [n * h * w for n, h, w in grids]


def _split(x: Tensor, grids: Grids) -> tuple[Tensor, ...]:
    return x.split(_pixels(grids))


# torch.compile takes seconds for each shape to trace einops, so these use torch's own functions.


def _fold(x: Tensor, grids: Grids, size: int) -> Tensor:
    """Give each value of [S, size * size * c], rows first, a pixel of its own: [S * size^2, c]. Grids are before."""
    parts = (x.unflatten(0, grid) for x, grid in zip(_split(x, grids), grids, strict=True))
    shape = (size, size, x.shape[1] // size**2)  # [n, h, w, p, q, c] -> [n h p w q, c]
    return _joined([part.unflatten(3, shape).permute(0, 1, 3, 2, 4, 5).flatten(0, 4) for part in parts])


def _unfold(x: Tensor, grids: Grids, size: int) -> Tensor:
    """Invert `_fold`: join the values of each size x size pixels. Grids are those after."""
    scaled = [(n, h * size, w * size) for n, h, w in grids]
    parts = zip(_split(x, scaled), grids, strict=True)
    split = (part.unflatten(0, (n, h, size, w, size)) for part, (n, h, w) in parts)
    return _joined([part.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2) for part in split])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # which would copy a single one
