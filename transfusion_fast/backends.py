"""The implementations behind ops.py, by backend and op, all of one signature an op, and how one is chosen.

Triton, and torch's attention in tiles with torch's compiler, are imported at the first call: machines that never use
them need not have the one nor wait for the other. By import statements, which torch.compile can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.reference import Rotary

BACKENDS = ("auto", "torch", "triton", "reference")
Backend = str | Mapping[Any, str]


def implementation(op: str, device: torch.device, backend: Backend) -> Callable:
    """What computes `op` on tensors of `device`.

    Raises:
        ValueError: an unknown backend. NotImplementedError: a package that the backend needs is missing.
    """
    chosen = choose(op, device, backend)
    if chosen == "triton":
        try:
            import triton  # noqa: F401
        except ModuleNotFoundError as error:
            hint = 'install it, or use backend="torch"'
            raise NotImplementedError(f'{op}: backend="triton" needs the package {error.name}; {hint}') from error
    return IMPLEMENTATIONS[chosen][op]


def choose(op: str, device: torch.device, backend: Backend) -> str:
    """The name of the backend that computes `op` on tensors of `device`; ValueError for an unknown one."""
    if not isinstance(backend, str):
        unknown = set(backend) - set(IMPLEMENTATIONS["torch"])
        if unknown:
            names = ", ".join(IMPLEMENTATIONS["torch"])
            raise ValueError(f"backend must name ops of {names}, got {min(unknown)!r}; correct it")
        backend = backend.get(op, "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return backend


def describe(backend: Backend, device: torch.device) -> str:
    """Which ops run on which backend for tensors of `device`, for people. Raises as `implementation`."""
    chosen = {}
    for op in IMPLEMENTATIONS["torch"]:
        implementation(op, device, backend)
        chosen[op] = choose(op, device, backend)
    if len(set(chosen.values())) == 1:
        return f"all ops on {next(iter(chosen.values()))}"
    return ", ".join(f"{op} on {name}" for op, name in chosen.items())


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None) -> Tensor:
    from transfusion_fast.kernels.torch_attention import tiled_attention

    return tiled_attention(q, k, v, layout, scale)


def _torch_rope(
    q: Tensor, k: Tensor, table: Rotary, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, table, q_weight=q_weight, k_weight=k_weight)


def _torch_swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """The reference without its detour over fp32, which on a CPU costs more than the matmuls around it."""
    gate, up = _halves(gate, up)
    return F.silu(gate) * up


def _torch_diffusion_mse(prediction: Tensor, target: Tensor, image_offsets: Tensor, x_0: Tensor | None) -> Tensor:
    if x_0 is not None:
        target = target.to(torch.promote_types(target.dtype, torch.float32)) - x_0
    return reference.diffusion_mse(prediction, target, image_offsets)


def _reference_swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    return reference.swiglu(*_halves(gate, up))


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return first, second


def _triton_attention(*args: Any) -> Tensor:
    from transfusion_fast.kernels.hybrid_attention import hybrid_attention

    return hybrid_attention(*args)


def _triton_rope(*args: Any) -> tuple[Tensor, Tensor]:
    from transfusion_fast.kernels.rope import rope

    return rope(*args)


def _triton_swiglu(*args: Any) -> Tensor:
    from transfusion_fast.kernels.swiglu import swiglu

    return swiglu(*args)


def _triton_diffusion_mse(*args: Any) -> Tensor:
    from transfusion_fast.kernels.diffusion_mse import diffusion_mse

    return diffusion_mse(*args)


IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "torch": {
        "hybrid_attention": _torch_attention,
        "rope": _torch_rope,
        "swiglu": _torch_swiglu,
        "diffusion_mse": _torch_diffusion_mse,
    },
    "triton": {
        "hybrid_attention": _triton_attention,
        "rope": _triton_rope,
        "swiglu": _triton_swiglu,
        "diffusion_mse": _triton_diffusion_mse,
    },
    "reference": {
        "hybrid_attention": reference.hybrid_attention,
        "rope": _torch_rope,
        "swiglu": _reference_swiglu,
        "diffusion_mse": _torch_diffusion_mse,
    },
}
