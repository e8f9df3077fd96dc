"""Rotary embedding of queries and keys in one launch, with an RMS norm of each head in front where weights are given.

    x' = x r w,   r = (mean(x^2) + eps)^(-1/2)                             RMS norm (arXiv 1910.07467)
    y_i = x'_i cos_i - x'_{i+D/2} sin_i,   y_{i+D/2} = x'_{i+D/2} cos_i + x'_i sin_i     (arXiv 2104.09864, equation 34)

A rotation's gradient is turned back: dx' is dy turned by minus the angle. Through the norm, with n = x r,

    dx = r (w dx' - n mean(n w dx')),   dw = sum over tokens and heads of n dx'

cos and sin are a table, made once a step and shared by all layers. Saved for backward are the table alone, and with the
norm q, k and the weights; r is computed anew. Arithmetic is fp32. A program takes a tile of tokens with all their
heads, the halves of a head as two tiles of pairs. In backward through the norm it adds up dw over its tokens, and the
programs' sums are added in their order: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_fast.kernels.launch import check_device, check_dtype, on_device
from transfusion_fast.kernels.reference import Rotary

PAIRS = 1024  # of a tile at least: for each thread of 4 warps one load of 16 bytes of either half, in 16 bits
PAIRS_OF_WARP = 256
MOST_WARPS = 16
NORM_TILES = 16  # whose dw a program of the norm's backward adds up


@triton.jit
def _mask(first, T, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
          BLOCK_T: tl.constexpr):  # fmt: skip
    """[BLOCK_T * BLOCK_H, BLOCK_HALF]: which pairs of a tile there are. Its rows are the heads of one token after another."""
    rows, dims = tl.arange(0, BLOCK_T * BLOCK_H), tl.arange(0, BLOCK_HALF)
    mask = (rows // BLOCK_H < T - first)[:, None]
    if HEADS != BLOCK_H:
        mask = mask & (rows % BLOCK_H < HEADS)[:, None]
    if HALF != BLOCK_HALF:
        mask = mask & (dims < HALF)[None, :]
    return mask


@triton.jit
def _pointers(ptr, first, stride_t, stride_h, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr):
    """To the first half of each head of a tile; the second lies HALF further."""
    rows, dims = tl.arange(0, BLOCK_T * BLOCK_H), tl.arange(0, BLOCK_HALF)
    # One 64-bit base for the tile, 32-bit offsets in it.
    offsets = rows // BLOCK_H * stride_t + rows % BLOCK_H * stride_h
    return ptr + first.to(tl.int64) * stride_t + (offsets[:, None] + dims[None, :])


@triton.jit
def _load(ptrs, mask, HALF: tl.constexpr):
    """Both halves in fp32."""
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptrs + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptrs, mask, first, second, HALF: tl.constexpr):
    tl.store(ptrs, first.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + HALF, second.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _weights(weight_ptr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The two halves of a norm's weights, fp32 [1, BLOCK_HALF]."""
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    return _load(weight_ptr + dims, dims < HALF, HALF)


@triton.jit
def _normed(first, second, HALF: tl.constexpr, EPS: tl.constexpr):
    """(n of both halves, r [rows, 1])."""
    squares = tl.sum(first * first + second * second, 1)
    r = tl.rsqrt(squares / (2 * HALF) + EPS)[:, None]
    return first * r, second * r, r


@triton.jit
def _angles(cos_ptr, sin_ptr, first, mask, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
            BLOCK_T: tl.constexpr):  # fmt: skip
    """(cos, sin) of every pair of a tile: the heads of a token turn alike."""
    cos = tl.load(_pointers(cos_ptr, first, HALF, 0, BLOCK_H, BLOCK_HALF, BLOCK_T), mask=mask, other=0.0)
    return cos, tl.load(_pointers(sin_ptr, first, HALF, 0, BLOCK_H, BLOCK_HALF, BLOCK_T), mask=mask, other=0.0)


@triton.jit
def _turn_heads(
    x_ptr, weight_ptr, y_ptr, cos_ptr, sin_ptr, first, T, stride_t, stride_h,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    EPS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """y [T, HEADS, D], contiguous, of a tile of x."""
    mask = _mask(first, T, HEADS, BLOCK_H, HALF, BLOCK_HALF, BLOCK_T)
    x_1, x_2 = _load(_pointers(x_ptr, first, stride_t, stride_h, BLOCK_H, BLOCK_HALF, BLOCK_T), mask, HALF)
    if weight_ptr is not None:
        x_1, x_2, _ = _normed(x_1, x_2, HALF, EPS)
        w_1, w_2 = _weights(weight_ptr, HALF, BLOCK_HALF)
        x_1 *= w_1
        x_2 *= w_2
    cos, sin = _angles(cos_ptr, sin_ptr, first, mask, HALF, BLOCK_H, BLOCK_HALF, BLOCK_T)
    sin = -sin if INVERSE else sin
    ptrs = _pointers(y_ptr, first, HEADS * 2 * HALF, 2 * HALF, BLOCK_H, BLOCK_HALF, BLOCK_T)
    _store(ptrs, mask, x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin, HALF)


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, T,
    stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, BLOCK_H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr, EPS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """q and k of BLOCK_T tokens, turned; INVERSE: turned back, which is the gradient."""
    first = tl.program_id(0) * BLOCK_T
    _turn_heads(
        q_ptr, q_weight_ptr, q_out_ptr, cos_ptr, sin_ptr, first, T, stride_qt, stride_qh,
        H, BLOCK_H, HALF, BLOCK_HALF, BLOCK_T, EPS, INVERSE,
    )  # fmt: skip
    _turn_heads(
        k_ptr, k_weight_ptr, k_out_ptr, cos_ptr, sin_ptr, first, T, stride_kt, stride_kh,
        G, BLOCK_G, HALF, BLOCK_HALF, BLOCK_T, EPS, INVERSE,
    )  # fmt: skip


@triton.jit
def _norm_gradient(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, cos_ptr, sin_ptr, first, T, stride_dt, stride_dh, stride_t, stride_h,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Writes dx of a tile and returns dw of both halves, summed over its rows: fp32 [BLOCK_HALF]."""
    mask = _mask(first, T, HEADS, BLOCK_H, HALF, BLOCK_HALF, BLOCK_T)
    dy_1, dy_2 = _load(_pointers(dy_ptr, first, stride_dt, stride_dh, BLOCK_H, BLOCK_HALF, BLOCK_T), mask, HALF)
    cos, sin = _angles(cos_ptr, sin_ptr, first, mask, HALF, BLOCK_H, BLOCK_HALF, BLOCK_T)
    g_1, g_2 = dy_1 * cos + dy_2 * sin, dy_2 * cos - dy_1 * sin
    x_1, x_2 = _load(_pointers(x_ptr, first, stride_t, stride_h, BLOCK_H, BLOCK_HALF, BLOCK_T), mask, HALF)
    n_1, n_2, r = _normed(x_1, x_2, HALF, EPS)
    w_1, w_2 = _weights(weight_ptr, HALF, BLOCK_HALF)
    dn_1, dn_2 = g_1 * w_1, g_2 * w_2
    mean = (tl.sum(n_1 * dn_1 + n_2 * dn_2, 1) / (2 * HALF))[:, None]
    ptrs = _pointers(dx_ptr, first, HEADS * 2 * HALF, 2 * HALF, BLOCK_H, BLOCK_HALF, BLOCK_T)
    _store(ptrs, mask, r * (dn_1 - n_1 * mean), r * (dn_2 - n_2 * mean), HALF)
    return tl.sum(n_1 * g_1, 0), tl.sum(n_2 * g_2, 0)


@triton.jit
def _store_sums(ptr, first, second, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    dims = tl.arange(0, BLOCK_HALF)
    _store(ptr + dims, dims < HALF, first, second, HALF)


@triton.jit(do_not_specialize=["T"])
def rope_norm_backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, sums_ptr, T,
    stride_dqt, stride_dqh, stride_dkt, stride_dkh, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, BLOCK_H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr, EPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dq and dk of TILES * BLOCK_T tokens, and their part of the weights' gradients: sums fp32 [programs, 2, D]."""
    dq_weight_1, dq_weight_2 = tl.zeros([BLOCK_HALF], tl.float32), tl.zeros([BLOCK_HALF], tl.float32)
    dk_weight_1, dk_weight_2 = tl.zeros([BLOCK_HALF], tl.float32), tl.zeros([BLOCK_HALF], tl.float32)
    start = tl.program_id(0) * TILES * BLOCK_T
    for first in tl.range(start, tl.minimum(start + TILES * BLOCK_T, T), BLOCK_T):
        dw_1, dw_2 = _norm_gradient(
            dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, cos_ptr, sin_ptr, first, T,
            stride_dqt, stride_dqh, stride_qt, stride_qh, H, BLOCK_H, HALF, BLOCK_HALF, BLOCK_T, EPS,
        )  # fmt: skip
        dq_weight_1 += dw_1
        dq_weight_2 += dw_2
        dw_1, dw_2 = _norm_gradient(
            dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, cos_ptr, sin_ptr, first, T,
            stride_dkt, stride_dkh, stride_kt, stride_kh, G, BLOCK_G, HALF, BLOCK_HALF, BLOCK_T, EPS,
        )  # fmt: skip
        dk_weight_1 += dw_1
        dk_weight_2 += dw_2
    sums_ptr += tl.program_id(0) * 4 * HALF
    _store_sums(sums_ptr, dq_weight_1, dq_weight_2, HALF, BLOCK_HALF)
    _store_sums(sums_ptr + 2 * HALF, dk_weight_1, dk_weight_2, HALF, BLOCK_HALF)


def rope(
    q: Tensor,
    k: Tensor,
    rotary: Rotary,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """q and k turned by `rotary`, after an RMS norm of each head where weights are given; differentiable.

    Args:
        q: [T, H, D], k: [T, G, D], of one dtype, fp16, bf16 or fp32; views of one projection are read as they lie.
        rotary: cos and sin, fp32 [T, D / 2].
        q_weight, k_weight: [D], both or neither.

    Returns:
        Contiguous tensors like q and k.

    Raises:
        ValueError: a device or dtype that the kernels do not run.
    """
    check_device("rope", q)
    check_dtype("q", q)
    if q_weight is None or k_weight is None:
        return _turn(q, k, *rotary, False)
    return _norm_and_turn(q, k, *rotary, q_weight, k_weight, eps)


@torch.library.custom_op("transfusion_fast::rope", mutates_args=())
def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, cos, sin, None, None, 0.0, inverse)


@torch.library.custom_op("transfusion_fast::rope_norm", mutates_args=())
def _norm_and_turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch_forward(q, k, cos, sin, q_weight, k_weight, eps, False)


@torch.library.custom_op("transfusion_fast::rope_norm_backward", mutates_args=())
def _norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dq_weight, dk_weight), contiguous."""
    T, H, D = q.shape
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    sizes, options = constants(H, k.shape[1], D)
    programs = triton.cdiv(T, NORM_TILES * sizes["BLOCK_T"])
    sums = torch.empty((programs, 2, D), dtype=torch.float32, device=q.device)
    dq_out, dk_out, q, k = (_heads_in_rows(x) for x in (dq_out, dk_out, q, k))
    if programs:
        strides = [stride for x in (dq_out, dk_out, q, k) for stride in x.stride()[:2]]
        with on_device(q):
            rope_norm_backward_kernel[(programs,)](
                dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, dq, dk, sums, T, *strides,
                **sizes, EPS=eps, TILES=NORM_TILES, **options,
            )  # fmt: skip
    dq_weight, dk_weight = sums.sum(dim=0)
    return dq, dk, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype, copy=True)


@_turn.register_fake
@_norm_and_turn.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_norm_backward.register_fake
def _(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, q_weight, k_weight))  # type: ignore[return-value]


def _save_table(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *_turn(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_norm(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dq_weight, dk_weight = _norm_backward(dq, dk, *ctx.saved_tensors, ctx.eps)
    return dq, dk, None, None, dq_weight, dk_weight, None


_turn.register_autograd(_turn_back, setup_context=_save_table)
_norm_and_turn.register_autograd(_differentiate_norm, setup_context=_save_inputs)


def constants(H: int, G: int, D: int) -> tuple[dict[str, int], dict[str, Any]]:
    """What the kernels are compiled for, besides the number types: sizes, and options of the compiler."""
    half = D // 2
    block_half, block_h, block_g = (triton.next_power_of_2(n) for n in (half, H, G))
    block_t = max(1, PAIRS // (block_h * block_half))
    sizes = {
        "H": H, "BLOCK_H": block_h, "G": G, "BLOCK_G": block_g, "HALF": half, "BLOCK_HALF": block_half,
        "BLOCK_T": block_t,
    }  # fmt: skip
    warps = min(MOST_WARPS, max(1, block_t * block_h * block_half // PAIRS_OF_WARP))
    return sizes, {"num_warps": warps, "enable_fp_fusion": True}


def _launch_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, H, D = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    sizes, options = constants(H, k.shape[1], D)
    q, k = _heads_in_rows(q), _heads_in_rows(k)
    if T:
        with on_device(q):
            rope_kernel[(triton.cdiv(T, sizes["BLOCK_T"]),)](
                q, k, cos, sin, q_weight, k_weight, q_out, k_out, T, *q.stride()[:2], *k.stride()[:2],
                **sizes, EPS=eps, INVERSE=inverse, **options,
            )  # fmt: skip
    return q_out, k_out


def _heads_in_rows(x: Tensor) -> Tensor:
    """x, or a copy where the numbers of a head are not side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
