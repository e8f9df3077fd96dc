"""The one place where the model calls kernels: the fused ops, each on a backend that is chosen by name.

`backend` is one of
    torch      PyTorch, on any device
    triton     CUDA kernels; with TRITON_INTERPRET=1 they run on CPU tensors
    reference  the specification, with attention over all pairs of positions; for comparisons
    auto       triton for CUDA tensors, torch for all others
or a mapping from ops to these names; an op that it does not name is auto. A backend that is named is used or refused,
never replaced.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.reference import Rotary
from transfusion_fast.model.backends import (
    BACKENDS,
    IMPLEMENTATIONS,
    Backend,
    choose,
    describe,
    implementation,
    triton_rotary_attention,
)

__all__ = ["BACKENDS", "IMPLEMENTATIONS", "Backend", "Rotary", "choose", "describe"]  # besides the ops


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, *, scale: float | None = None, backend: Backend = "auto"
) -> Tensor:
    """Attend causally over text and bidirectionally within each image, over packed documents.

    Args:
        q: [T, H, D]. k, v: [T, G, D], where G divides H; query head h reads key/value head h // (H / G).
        layout: the mask of the T positions.
        scale: positive factor of the scores; default D ** -0.5.

    Returns:
        [T, H, D] in q's dtype; zero at padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the layout.
        NotImplementedError: the backend has no kernel for these inputs.
    """
    _check_attention(q, k, v, layout)
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale}; to negate the scores, negate q")
    return implementation("hybrid_attention", q.device, backend)(q, k, v, layout, scale)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> None:
    T, H, _ = _check_heads("hybrid_attention", q, k)
    if v.shape != k.shape or v.dtype != q.dtype or v.device != q.device:
        raise ValueError(
            f"v must have k's shape {tuple(k.shape)} and q's dtype and device, {q.dtype} on {q.device}, "
            f"got {tuple(v.shape)}, {v.dtype} on {v.device}"
        )
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got H={H} and G={k.shape[1]}")
    if layout.total_length != T:
        raise ValueError(f"layout must have q's length {T}, got {layout.total_length}; build it for this batch")
    if layout.device != q.device:
        raise ValueError(f"layout must be on q's device {q.device}, got {layout.device}; call layout.to(q.device)")


def rotary(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Rotary:
    """Return the cosines and sines that `rope` rotates by; computed once a step and shared by all layers and heads.

    Args:
        positions: int [T], or [T, 2] for (row, column) or [T, 3] for (frame, row, column), which take turns over the
            frequencies.
        head_dim: D, even.

    Returns:
        cos and sin of position * theta^(-2i/D) for the pairs i, fp32 [T, D / 2] each.

    Raises:
        ValueError: positions of another shape, an odd head dimension.
    """
    if positions.ndim not in (1, 2) or positions.shape[1:] not in ((), (2,), (3,)):
        raise ValueError(f"positions must be [T], [T, 2] or [T, 3], got {tuple(positions.shape)}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"the head dimension must be even to be rotated in pairs, got {head_dim}")
    if not 0 < theta < float("inf"):
        raise ValueError(f"theta must be a positive number, got {theta}")
    return reference.rotary(positions, head_dim, theta)


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor | Rotary,
    *,
    theta: float = 10000.0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions (pairs i and i + D/2), after an RMS norm of each head if weights are given.

    Source: RoFormer, arXiv 2104.09864; QK norm, arXiv 2302.05442.

    Args:
        q: [T, H, D]. k: [T, G, D], D even; views of one fused projection are read without a copy.
        positions: the positions that `rotary` takes, or the table that it returned. A table has its own theta, and the
            argument `theta` is then ignored.
        q_weight, k_weight: [D], both or neither; the norm adds 1e-6 to the mean square.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit. NotImplementedError: the backend cannot run here.
    """
    table = _check_rope(q, k, positions, theta, q_weight, k_weight)
    return implementation("rope", q.device, backend)(q, k, table, q_weight, k_weight)


def _check_rope(
    q: Tensor, k: Tensor, positions: Tensor | Rotary, theta: float, q_weight: Tensor | None, k_weight: Tensor | None
) -> Rotary:
    """Return the table of the positions if all arguments of `rope` fit each other."""
    T, _, D = _check_heads("rope", q, k)
    if isinstance(positions, Tensor):
        if positions.shape[:1] != (T,):
            raise ValueError(f"positions must be [{T}], [{T}, 2] or [{T}, 3] for this q, got {tuple(positions.shape)}")
        positions = rotary(positions, D, theta)
    for name, table in zip(("cos", "sin"), positions, strict=True):
        if table.shape != (T, D // 2) or table.dtype != torch.float32 or table.device != q.device:
            raise ValueError(
                f"positions.{name} must be fp32 [{T}, {D // 2}] on {q.device} for this q, "
                f"got {table.dtype} {tuple(table.shape)} on {table.device}; call rotary for this batch"
            )
    if (q_weight is None) != (k_weight is None):
        given = "k_weight" if q_weight is None else "q_weight"
        raise ValueError(f"q_weight and k_weight must be given together, got {given} alone")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != (D,) or weight.device != q.device):
            raise ValueError(f"{name} must be [{D}] on {q.device}, got {tuple(weight.shape)} on {weight.device}")
    return positions


def rotary_attention(
    qkv: Tensor,
    kv_heads: int,
    positions: Tensor | Rotary,
    layout: AttentionLayout,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return `hybrid_attention` of the queries, keys and values in one projection, after `rope` of queries and keys.

    Where triton computes both, backward writes the gradient of the projection once; autograd would join its parts.

    Args:
        qkv: [T, H + 2G, D]: H query heads, G key heads, G value heads.
        kv_heads: G, which divides H.
        positions, q_weight, k_weight: as in `rope`. layout: as in `hybrid_attention`.

    Returns:
        [T, H, D] in the dtype of qkv; zero at padding.

    Raises:
        As `rope` and `hybrid_attention`.
    """
    if qkv.ndim != 3 or not 0 < 2 * kv_heads < qkv.shape[1]:
        raise ValueError(f"qkv must be [T, H + 2G, D] with G={kv_heads} of at least 1, got {tuple(qkv.shape)}")
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    table = _check_rope(q, k, positions, 10000.0, q_weight, k_weight)
    _check_attention(q, k, v, layout)
    rotate, attend = (implementation(op, qkv.device, backend) for op in ("rope", "hybrid_attention"))
    if {choose(op, qkv.device, backend) for op in ("rope", "hybrid_attention")} == {"triton"}:
        return triton_rotary_attention(qkv, kv_heads, table, layout, q_weight, k_weight)
    q, k = rotate(q, k, table, q_weight, k_weight)
    return attend(q, k, v, layout, None)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * weight over the last axis (arXiv 1910.07467), and x for the residual connection.

    The residual must continue from the returned x: the triton backend then adds its gradient in the norm's backward.

    Args:
        x: [.., E]. weight: [E]. eps: added to the mean square.

    Returns:
        [.., E] in x's dtype, and x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit. NotImplementedError: the backend cannot run here.
    """
    _check_floating("rms_norm", "x", x)
    if x.shape[-1:] != weight.shape or weight.device != x.device:
        raise ValueError(
            f"weight must be {list(x.shape[-1:])} on {x.device} like x, got {list(weight.shape)} on {weight.device}"
        )
    return implementation("rms_norm", x.device, backend)(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """Return silu(gate) * up (arXiv 2002.05202).

    Args:
        gate, up: two tensors of the same shape and dtype; or `gate` alone, [.., 2F], holding the gate and then up.

    Returns:
        [.., F] in gate's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that differ. NotImplementedError: the backend cannot run here.
    """
    _check_floating("swiglu", "gate", gate)
    if up is None and (not gate.ndim or gate.shape[-1] % 2):
        raise ValueError(f"gate must be [.., 2F] if up is not given, got {tuple(gate.shape)}; give up as well")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device):
        raise ValueError(
            f"up must be like gate, {tuple(gate.shape)} {gate.dtype} on {gate.device}, "
            f"got {tuple(up.shape)} {up.dtype} on {up.device}"
        )
    return implementation("swiglu", gate.device, backend)(gate, up)


def diffusion_mse(prediction: Tensor, target: Tensor, image_offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the mean squared error of each image over packed patches.

    Args:
        prediction, target: [P, C].
        image_offsets: int32 [N + 1], ascending from 0 to P; image n has the patches [offset n, offset n + 1), at least
            one. On a GPU and under a compiler the offsets are not checked, as a check would wait for the device;
            patches that belong to no image then have undefined gradients.

    Returns:
        fp32 [N].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit. NotImplementedError: the backend cannot run here.
    """
    _check_patches(prediction, image_offsets, target=target)
    return implementation("diffusion_mse", prediction.device, backend)(prediction, target, image_offsets, None, None)


def diffusion_mse_from_noise(
    prediction: Tensor,
    x_0: Tensor,
    eps: Tensor,
    image_offsets: Tensor,
    coefficients: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return `diffusion_mse` against a combination of x_0 and eps, which is computed on the fly and never stored.

    Args:
        prediction, x_0, eps: [P, C]: the model's output, the clean latents, the noise.
        image_offsets: as in `diffusion_mse`.
        coefficients: fp32 [N, 2], (a, b) of each image, whose target is a x_0 + b eps; default: eps - x_0.

    Returns:
        fp32 [N].

    Raises:
        As `diffusion_mse`; ValueError for other coefficients.
    """
    _check_patches(prediction, image_offsets, x_0=x_0, eps=eps)
    if coefficients is not None:
        shape, device = (len(image_offsets) - 1, 2), prediction.device
        if (*coefficients.shape,) != shape or coefficients.dtype != torch.float32 or coefficients.device != device:
            raise ValueError(
                f"coefficients must be fp32 {list(shape)} on {device}, two for each image, got {coefficients.dtype} "
                f"{list(coefficients.shape)} on {coefficients.device}"
            )
        coefficients = coefficients.contiguous()
    compute = implementation("diffusion_mse", prediction.device, backend)
    return compute(prediction, eps, image_offsets, x_0, coefficients)


def _check_heads(op: str, q: Tensor, k: Tensor) -> tuple[int, int, int]:
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: q must be [T, H, D] and k [T, G, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    _check_floating(op, "q", q)
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"{op}: k must have q's dtype and device, got {k.dtype} on {k.device}, q {q.dtype} on {q.device}"
        )
    return q.shape[0], q.shape[1], q.shape[2]


def _check_floating(op: str, name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{op}: {name} must have a floating dtype, got {x.dtype}; convert it")


def _check_patches(prediction: Tensor, image_offsets: Tensor, **others: Tensor) -> None:
    """Check that `others` have the shape [P, C] and the device of the prediction; dtypes may differ."""
    if prediction.ndim != 2 or not prediction.shape[1]:
        raise ValueError(f"prediction must be [P, C] with at least one value C, got {tuple(prediction.shape)}")
    for name, x in {"prediction": prediction, **others}.items():
        _check_floating("diffusion_mse", name, x)
        if x.shape != prediction.shape or x.device != prediction.device:
            raise ValueError(
                f"{name} must be {list(prediction.shape)} on {prediction.device} like the prediction, "
                f"got {list(x.shape)} on {x.device}"
            )
    if image_offsets.ndim != 1 or not len(image_offsets) or image_offsets.dtype != torch.int32:
        raise ValueError(f"image_offsets must be int32 [N + 1], got {image_offsets.dtype} {tuple(image_offsets.shape)}")
    if image_offsets.device != prediction.device:
        raise ValueError(f"image_offsets must be on {prediction.device}, got {image_offsets.device}")
    # Only on a CPU, where reading them waits for no device, and not under a compiler, which cannot follow numbers.
    if image_offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = image_offsets.tolist()
        if offsets[0] != 0 or offsets[-1] != len(prediction) or any(a >= b for a, b in pairwise(offsets)):
            raise ValueError(f"image_offsets must ascend from 0 to P={len(prediction)}, no image empty, got {offsets}")
