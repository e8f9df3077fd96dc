"""The backends of the fused ops: what each op runs on a backend, chosen by name.

Triton, and the torch backend's attention with torch's compiler, are imported at the first call, so that machines which
never use them need not install or wait for them. Import statements do this, because torch.compile can follow them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfusion_fast.kernels import reference
from transfusion_fast.kernels.compiled import Compiled, used_compiler
from transfusion_fast.kernels.layout import AttentionLayout
from transfusion_fast.kernels.reference import Rotary

BACKENDS = ("auto", "torch", "triton", "reference")
Backend = str | Mapping[Any, str]


def implementation(op: str, device: torch.device, backend: Backend) -> Callable:
    """Return the function that computes `op` on tensors of `device`.

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
    """Return the name of the backend that computes `op` on tensors of `device`; ValueError for an unknown one."""
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
    """Describe which ops run on which backend for tensors of `device`. Raises the errors of `implementation`."""
    chosen = {}
    for op in IMPLEMENTATIONS["torch"]:
        implementation(op, device, backend)
        chosen[op] = choose(op, device, backend)
    compiles = device.type == "cpu" and "torch" in chosen.values() and (compiler := used_compiler())
    note = f", large ones except attention compiled by {compiler}" if compiles else ""
    if len(set(chosen.values())) == 1:
        return f"all ops on {next(iter(chosen.values()))}{note}"
    return ", ".join(f"{op} on {name}" for op, name in chosen.items()) + note


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, scale: float | None) -> Tensor:
    from transfusion_fast.kernels.attention_cpu import tiled_attention

    return tiled_attention(q, k, v, layout, scale)


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, Rotary(cos, sin), q_weight=q_weight, k_weight=k_weight)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x, weight, eps)[0]


def _eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)


def _reference_swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    return reference.swiglu(*reference.halves(gate, up))


def _eager_swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    """Compute the reference without its conversion to fp32, which on a CPU costs more than the matmuls around it."""
    gate, up = reference.halves(gate, up)
    return F.silu(gate) * up


def _squared_error(prediction: Tensor, target: Tensor, x_0: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """Return the mean of each patch, fp32 [P]; `coefficients` are [P, 2]."""
    if x_0 is not None:
        target = reference.target_from_noise(x_0, target, coefficients)
    return reference.squared_error(prediction, target)


_compiled_rope = Compiled(_rope)
_compiled_rms_norm = Compiled(_rms_norm, _eager_rms_norm)
_compiled_swiglu = Compiled(_reference_swiglu, _eager_swiglu)
_compiled_squared_error = Compiled(_squared_error)


def _torch_rope(
    q: Tensor, k: Tensor, table: Rotary, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _compiled_rope(q, k, *table, q_weight, k_weight)


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _compiled_rms_norm(x, weight, eps), x


def _torch_diffusion_mse(
    prediction: Tensor, target: Tensor, image_offsets: Tensor, x_0: Tensor | None, coefficients: Tensor | None
) -> Tensor:
    coefficients = reference.per_patch(coefficients, image_offsets, len(prediction))
    return reference.mean_of_images(_compiled_squared_error(prediction, target, x_0, coefficients), image_offsets)


def _reference_rope(
    q: Tensor, k: Tensor, table: Rotary, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _rope(q, k, *table, q_weight, k_weight)


def _reference_diffusion_mse(
    prediction: Tensor, target: Tensor, image_offsets: Tensor, x_0: Tensor | None, coefficients: Tensor | None
) -> Tensor:
    coefficients = reference.per_patch(coefficients, image_offsets, len(prediction))
    return reference.mean_of_images(_squared_error(prediction, target, x_0, coefficients), image_offsets)


def _triton_attention(*args: Any) -> Tensor:
    from transfusion_fast.kernels.hybrid_attention import hybrid_attention

    return hybrid_attention(*args)


def _triton_rope(*args: Any) -> tuple[Tensor, Tensor]:
    from transfusion_fast.kernels.rope import rope

    return rope(*args)


def triton_rotary_attention(*args: Any) -> Tensor:
    from transfusion_fast.kernels.rotary_attention import rotary_attention

    return rotary_attention(*args)


def _triton_rms_norm(*args: Any) -> tuple[Tensor, Tensor]:
    from transfusion_fast.kernels.rms_norm import rms_norm

    return rms_norm(*args)


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
        "rms_norm": _torch_rms_norm,
        "swiglu": _compiled_swiglu,
        "diffusion_mse": _torch_diffusion_mse,
    },
    "triton": {
        "hybrid_attention": _triton_attention,
        "rope": _triton_rope,
        "rms_norm": _triton_rms_norm,
        "swiglu": _triton_swiglu,
        "diffusion_mse": _triton_diffusion_mse,
    },
    "reference": {
        "hybrid_attention": reference.hybrid_attention,
        "rope": _reference_rope,
        "rms_norm": reference.rms_norm,
        "swiglu": _reference_swiglu,
        "diffusion_mse": _reference_diffusion_mse,
    },
}
