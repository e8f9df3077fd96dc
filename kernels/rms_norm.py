"""RMS norm (arXiv 1910.07467) whose backward pass also adds the gradient of the residual connection.

    y = x r w,   r = (mean(x^2) + eps)^(-1/2)
    dx = r (w dy - x r^2 mean(x w dy)) + dresidual,   dw = sum over rows of dy x r

In a pre-norm block x goes to the norm and past it. Autograd would add the two gradients of x in a pass of its own,
which reads both and writes a third tensor. Here x is returned beside y, so that both gradients reach one kernel.

Both sums of a row are computed from the same loads, so only x and w are saved, and r is recomputed. Arithmetic is in
fp32. A program sums dw over ROWS rows, and the programs' sums are added in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_fast.kernels.launch import check_inputs, dense_rows, on_device

VALUES = 4096  # numbers of a tile: in 16 bits, each thread of 8 warps loads 16 bytes twice
VALUES_OF_WARP = 512
MOST_COLUMNS = 8192  # 16 warps, whose threads hold a row and its gradients in registers
ROWS = 64  # of a program in backward; few, so that 16,384 rows fill a GPU, and many, so that the sums stay small


@triton.jit
def _tile(first, T, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return the rows [BLOCK_T, 1] of a tile, the column of each of its numbers, and which of them exist.

    With columns in the shape of the tile, each thread loads the weights of its own numbers.
    """
    rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_E)[None, :] + tl.zeros([BLOCK_T, 1], tl.int32)
    exists = tl.broadcast_to(rows < T, [BLOCK_T, BLOCK_E])
    return rows, cols, exists if E == BLOCK_E else exists & (cols < E)


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def rms_norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, T, stride_x,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_T rows of y, contiguous [T, E]."""
    rows, cols, mask = _tile(tl.program_id(0) * BLOCK_T, T, E, BLOCK_E, BLOCK_T)
    x = _load(x_ptr + rows * stride_x + cols, mask)
    r = tl.rsqrt(tl.sum(x * x, 1) / E + EPS)[:, None]
    y = x * r * _load(weight_ptr + cols, mask)
    tl.store(y_ptr + rows * E + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def rms_norm_backward_kernel(
    dy_ptr, dresidual_ptr, x_ptr, weight_ptr, dx_ptr, sums_ptr, T, stride_dy, stride_dresidual, stride_x,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of dx, contiguous [T, E], and the sum of their contributions to dw: sums, fp32 [programs, E]."""
    dweight = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    start = tl.program_id(0) * ROWS
    for first in tl.range(start, tl.minimum(start + ROWS, T), BLOCK_T):
        rows, cols, mask = _tile(first, T, E, BLOCK_E, BLOCK_T)
        x = _load(x_ptr + rows * stride_x + cols, mask)
        dy = _load(dy_ptr + rows * stride_dy + cols, mask)
        r = tl.rsqrt(tl.sum(x * x, 1) / E + EPS)[:, None]
        n = x * r
        # Reloaded from the L1 cache for each tile: keeping them in registers would lower occupancy.
        dn = _load(weight_ptr + cols, mask) * dy
        dx = r * (dn - n * (tl.sum(n * dn, 1) / E)[:, None])
        if dresidual_ptr is not None:
            dx += _load(dresidual_ptr + rows * stride_dresidual + cols, mask)
        tl.store(dx_ptr + rows * E + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += n * dy
    columns = tl.arange(0, BLOCK_E)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * E + columns, tl.sum(dweight, 0), mask=columns < E)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute x / rms(x) * weight, and return x beside it; differentiable in both.

    Args:
        x: [.., E], fp16, bf16 or fp32, with rows of any stride, E at most 8,192.
        weight: [E], fp16, bf16 or fp32.

    Returns:
        y, contiguous, with the shape and dtype of x; and x, for the residual connection.

    Raises:
        ValueError: The kernels do not support the device, a dtype or the width.
    """
    check_inputs("rms_norm", x=x, weight=weight)
    if not 1 <= len(weight) <= MOST_COLUMNS:
        raise ValueError(
            f'a row must have 1 to {MOST_COLUMNS} numbers for backend="triton", got {len(weight)}; use backend="torch"'
        )
    y, residual = _WithResidual.apply(x, weight, eps)
    return y, residual


class _WithResidual(torch.autograd.Function):
    """The norm and the identity as one node of autograd, because an op may not return its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return _forward(x, weight, eps), x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dresidual, None, None
        x, weight = ctx.saved_tensors
        return *_backward(dy, dresidual, x, weight, ctx.eps), None


@torch.library.custom_op("transfusion_fast::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        sizes, options = constants("forward", len(weight), eps)
        rows = _rows(x)
        with on_device(x):
            rms_norm_forward_kernel[(triton.cdiv(len(rows), sizes["BLOCK_T"]),)](
                rows, weight.contiguous(), y, len(rows), rows.stride(0), **sizes, **options
            )
    return y


@torch.library.custom_op("transfusion_fast::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight), contiguous; dx includes dresidual, the gradient of x past the norm, if there is one."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = [None if part is None else _rows(part) for part in (dy, dresidual, x)]
    strides = [None if part is None else part.stride(0) for part in rows]
    T, E = x.numel() // len(weight), len(weight)
    programs = triton.cdiv(T, ROWS)
    sums = torch.empty((programs, E), dtype=torch.float32, device=x.device)
    if T:
        sizes, options = constants("backward", E, eps)
        with on_device(x):
            rms_norm_backward_kernel[(programs,)](*rows, weight.contiguous(), dx, sums, T, *strides, **sizes, **options)
    return dx, sums.sum(dim=0).to(weight.dtype)


_forward.register_fake(lambda x, *_: x.new_empty(x.shape))
_backward.register_fake(lambda _dy, _dresidual, x, weight, _: (x.new_empty(x.shape), weight.new_empty(weight.shape)))


def _rows(x: Tensor) -> Tensor:
    """Return x as [rows, E] with contiguous rows, as a view if its strides allow it."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def constants(kernel: str, E: int, eps: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants and options to compile the kernel "forward" or "backward" with, for rows of E numbers."""
    block_e = triton.next_power_of_2(E)
    block_t = min(ROWS, max(1, VALUES // block_e))
    sizes = {"E": E, "BLOCK_E": block_e, "BLOCK_T": block_t, "EPS": eps}
    warps = max(1, block_t * block_e // VALUES_OF_WARP)
    return sizes | ({"ROWS": ROWS} if kernel == "backward" else {}), {"num_warps": warps, "enable_fp_fusion": True}
