"""The one seam between the model and the kernels: four ops, each on a backend chosen by name.

`backend` is "torch" (plain PyTorch, any device), "triton" (CUDA kernels; CPU tensors in Triton's interpreter), or
"auto": triton for CUDA tensors where the op has a Triton kernel, torch everywhere else; or a mapping from ops to these,
auto for an op that it does not name. A backend named outright is used or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast.kernels import reference, torch_attention
from transfusion_fast.kernels.layout import AttentionLayout

BACKENDS = ("auto", "torch", "triton")
Backend = str | Mapping[Any, str]


def _swiglu_in_dtype(gate: Tensor, up: Tensor) -> Tensor:
    """The reference without its detour over fp32, which on a CPU costs more than the matmuls around it."""
    return F.silu(gate) * up


def _triton_hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None = None
) -> Tensor:
    """Imports Triton at the first call: machines that never use it need not have it."""
    try:
        from transfusion_fast.kernels import hybrid_attention as kernel
    except ModuleNotFoundError as error:
        hint = 'install it, or use backend="torch"'
        raise NotImplementedError(
            f'hybrid_attention: backend="triton" needs the package {error.name}; {hint}'
        ) from error
    return kernel.hybrid_attention(q, k, v, layout, scale)


_TORCH: dict[str, Callable] = {
    "hybrid_attention": torch_attention.tiled_attention,
    "rope": reference.rope,
    "swiglu": _swiglu_in_dtype,
    "diffusion_mse": reference.diffusion_mse,
}
_TRITON: dict[str, Callable] = {"hybrid_attention": _triton_hybrid_attention}


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, *, scale: float | None = None, backend: Backend = "auto"
) -> Tensor:
    """Attention that is causal over text and bidirectional within each image, over packed documents.

    Args:
        q: [T, H, D]. k, v: [T, G, D], where G divides H; query head h reads key/value head h // (H / G).
        layout: what each of the T positions sees.
        scale: of the scores, positive; default D ** -0.5.

    Returns:
        [T, H, D] in q's dtype; zero at padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the layout.
        NotImplementedError: the backend has no kernel for this op.
    """
    T, H, _ = _check_heads("hybrid_attention", q, k)
    if v.shape != k.shape or v.dtype != q.dtype or v.device != q.device:
        raise ValueError(
            f"v must have k's shape {tuple(k.shape)} and q's dtype and device, {q.dtype} on {q.device}, "
            f"got {tuple(v.shape)}, {v.dtype} on {v.device}"
        )
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got H={H} and G={k.shape[1]}")
    if layout.total_length != T:
        raise ValueError(f"layout must be of q's length {T}, got {layout.total_length}; build it for this batch")
    if layout.device != q.device:
        raise ValueError(f"layout must be on q's device {q.device}, got {layout.device}; call layout.to(q.device)")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale}; to negate the scores, negate q")
    return _implementation("hybrid_attention", q, backend)(q, k, v, layout, scale=scale)


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    theta: float = 10000.0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k (pairs i and i + D/2), after an RMS norm of each head where weights are given.

    Args:
        q: [T, H, D]. k: [T, G, D], D even.
        positions: int [T], or [T, 2] for (row, column), which take turns over the frequencies.
        q_weight, k_weight: [D], both or neither.

    Raises:
        ValueError: shapes that do not fit. NotImplementedError: the backend has no kernel for this op.
    """
    T, _, D = _check_heads("rope", q, k)
    if D % 2:
        raise ValueError(f"the head dimension must be even to be rotated in pairs, got {D}")
    if positions.shape not in ((T,), (T, 2)):
        raise ValueError(f"positions must be [{T}] or [{T}, 2] for q of length {T}, got {tuple(positions.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together, got one of them")
    return _implementation("rope", q, backend)(q, k, positions, theta=theta, q_weight=q_weight, k_weight=k_weight)


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up, of one shape and dtype. Raises ValueError where they differ."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike, got {tuple(gate.shape)} {gate.dtype}, {tuple(up.shape)} {up.dtype}"
        )
    return _implementation("swiglu", gate, backend)(gate, up)


def diffusion_mse(prediction: Tensor, target: Tensor, image_offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Mean squared error of each image over packed patches.

    Args:
        prediction, target: [P, C].
        image_offsets: int32 [N + 1], ascending from 0 to P; image n is the patches [offset n, offset n + 1), not empty.

    Returns:
        fp32 [N].

    Raises:
        ValueError: shapes that do not fit. NotImplementedError: the backend has no kernel for this op.
    """
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(f"prediction and target must be [P, C], got {tuple(prediction.shape)}, {tuple(target.shape)}")
    if image_offsets.ndim != 1 or not len(image_offsets):
        raise ValueError(f"image_offsets must be [N + 1], got {tuple(image_offsets.shape)}")
    return _implementation("diffusion_mse", prediction, backend)(prediction, target, image_offsets)


def describe_backend(backend: Backend, device: torch.device) -> str:
    """Which ops run on which backend for tensors of `device`, for people. NotImplementedError as the ops raise it."""
    chosen = {op: _choose(op, device, backend) for op in _TORCH}
    if len(set(chosen.values())) == 1:
        return f"all ops on {next(iter(chosen.values()))}"
    return ", ".join(f"{op} on {name}" for op, name in chosen.items())


def _implementation(op: str, x: Tensor, backend: Backend) -> Callable:
    return {"torch": _TORCH, "triton": _TRITON}[_choose(op, x.device, backend)][op]


def _choose(op: str, device: torch.device, backend: Backend) -> str:
    if not isinstance(backend, str):
        backend = backend.get(op, "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and op in _TRITON else "torch"
    if backend == "triton" and op not in _TRITON:
        raise NotImplementedError(f'{op} has no "triton" kernel yet; use backend="torch" or "auto"')
    return backend


def _check_heads(op: str, q: Tensor, k: Tensor) -> tuple[int, int, int]:
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: q must be [T, H, D] and k [T, G, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"{op}: k must have q's dtype and device, got {k.dtype} on {k.device}, q {q.dtype} on {q.device}"
        )
    return q.shape[0], q.shape[1], q.shape[2]
