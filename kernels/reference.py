"""The specification of every op in plain PyTorch: what the kernels must compute, written to be read, not to be fast.

The torch backend runs `rope`, `rms_norm`, `swiglu` and `diffusion_mse` much as they stand here. In eager mode every
operation is a pass over memory, so on a CPU large ones are compiled (compiled.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast.kernels.layout import AttentionLayout


def hybrid_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None) -> Tensor:
    """Compute softmax(scale Q K^T + mask) V with a dense mask. q [T, H, D], k and v [T, G, D] -> [T, H, D].

    Query head h reads key/value head h // (H / G). Rows that see nothing, the padding, are zero.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores_HTT = torch.einsum("thd,shd->hts", _fp32(q), _fp32(k)) * scale
    mask_TT = layout.dense_mask()
    weights_HTT = scores_HTT.masked_fill(~mask_TT, float("-inf")).softmax(dim=-1)
    weights_HTT = weights_HTT.masked_fill(~mask_TT.any(dim=-1)[:, None], 0.0)
    return torch.einsum("hts,shd->thd", weights_HTT, _fp32(v)).to(q.dtype)


class Rotary(NamedTuple):
    """cos and sin of every angle of a sequence, fp32 [T, D / 2], computed once a step for all layers and heads."""

    cos: Tensor
    sin: Tensor


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor | Rotary,
    theta: float = 10000.0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (i, i + D/2) of q [T, H, D] and k [T, G, D], after an optional RMS norm of each head.

    `positions` are the positions that `rotary` takes, or the table that it returns. RoFormer, arXiv 2104.09864,
    equation 34, with the halves paired as in Llama.
    """
    table = positions if isinstance(positions, Rotary) else rotary(positions, q.shape[-1], theta)
    cos, sin = (angles[:, None] for angles in table)

    def norm_and_rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        x_or_normed = x if weight is None else F.rms_norm(_fp32(x), x.shape[-1:], _fp32(weight), eps)
        # Halves are converted apart: a compiler would write the joined fp32 values to memory first.
        first, second = (_fp32(half) for half in x_or_normed.chunk(2, dim=-1))
        return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)], dim=-1)

    return norm_and_rotate(q, q_weight), norm_and_rotate(k, k_weight)


def rotary(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Rotary:
    """Return cos and sin of the angles position * theta^(-2i/D) of every pair i.

    Positions are [T], or [T, A] for A axes: then pair i is rotated by coordinate i mod A. With equal coordinates this
    is the one-dimensional rotation.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    if positions.ndim == 2:
        axis = torch.arange(head_dim // 2, device=positions.device) % positions.shape[1]
        coordinates = positions.float()[:, axis]
    else:
        coordinates = positions.float()[:, None]
    angles = coordinates * frequencies
    return Rotary(angles.cos(), angles.sin())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute x / rms(x) * weight over the last axis in fp32 (arXiv 1910.07467); return it and x."""
    return F.rms_norm(_fp32(x), weight.shape, _fp32(weight), eps).to(x.dtype), x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up in fp32, for any shape (GLU variants, arXiv 2002.05202)."""
    return (F.silu(_fp32(gate)) * _fp32(up)).to(gate.dtype)


def halves(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the inputs of `swiglu`: gate [.., F] and up, or without `up` the halves of gate [.., 2F]."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return gate, up


def diffusion_mse(prediction: Tensor, target: Tensor, image_offsets: Tensor) -> Tensor:
    """Compute the mean squared error of each image: prediction, target [P, C], image_offsets int32 [N + 1] -> fp32 [N].

    Image n is the patches [image_offsets[n], image_offsets[n + 1]).
    """
    return mean_of_images(squared_error(prediction, target), image_offsets)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each patch, fp32 [P]."""
    return (_fp32(prediction) - _fp32(target)).square().mean(dim=-1)


def mean_of_images(x: Tensor, image_offsets: Tensor) -> Tensor:
    """Return the mean [N] over the patches of each image of x [P]."""
    return torch.segment_reduce(x, "mean", offsets=image_offsets)


def diffusion_mse_from_noise(
    prediction: Tensor, x_0: Tensor, eps: Tensor, image_offsets: Tensor, coefficients: Tensor | None = None
) -> Tensor:
    """Compute `diffusion_mse` against eps - x_0, or against a_n x_0 + b_n eps with coefficients [N, 2]."""
    target = target_from_noise(x_0, eps, per_patch(coefficients, image_offsets, len(eps)))
    return diffusion_mse(prediction, target, image_offsets)


def target_from_noise(x_0: Tensor, eps: Tensor, coefficients: Tensor | None) -> Tensor:
    """Return eps - x_0, or a x_0 + b eps with the coefficients [P, 2] of patches; never in half precision."""
    x_0, eps = _fp32(x_0), _fp32(eps)
    return eps - x_0 if coefficients is None else coefficients[:, :1] * x_0 + coefficients[:, 1:] * eps


def per_patch(x: Tensor | None, image_offsets: Tensor, patches: int) -> Tensor | None:
    """Repeat the row of each image for its patches, [N, ..] -> [P, ..]."""
    return x if x is None else x.repeat_interleave(image_offsets.diff(), dim=0, output_size=patches)


def _fp32(x: Tensor) -> Tensor:
    """Convert x to fp32, or keep fp64: sums and exponentials are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
