"""Rotary embedding of queries and keys in one launch, after an optional RMS norm of each head.

    x' = x r w,   r = (mean(x^2) + eps)^(-1/2)                             RMS norm (arXiv 1910.07467)
    y_i = x'_i cos_i - x'_{i+D/2} sin_i,   y_{i+D/2} = x'_{i+D/2} cos_i + x'_i sin_i     (arXiv 2104.09864, equation 34)

The gradient dx' of a rotation is dy rotated by minus the angle. Through the norm, with n = x r,

    dx = r (w dx' - n mean(n w dx')),   dw = sum over tokens and heads of n dx'

cos and sin are a table that all layers share. The rotation alone saves only the table for backward; with the norm, q, k
and the weights are saved too, and r is recomputed. Arithmetic is in fp32.

The heads of q and of k are cut into chunks of one size, and a program computes a tile of one chunk, so that few heads
of k fill the threads as well as many heads of q. Programs of the same tokens are neighbours and find cos and sin in the
L2 cache. A tile holds the two halves of its heads separately. In backward through the norm a program sums dw over
several tiles of its chunk, and the programs' sums are added in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_fast.kernels.launch import check_inputs, dense_rows, on_device
from transfusion_fast.kernels.reference import Rotary

EPS = 1e-6  # added to the mean square
PAIRS = 1024  # pairs of a tile: in 16 bits, each thread of 4 warps loads 16 bytes of each half
PAIRS_OF_WARP = 256
LEAST_HEADS, MOST_HEADS = 4, 16  # heads of a chunk
TILES = 8  # tiles of a program in backward through the norm; few, so that 8,192 tokens fill a GPU


@triton.jit
def _mask(first, head, T, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr,
          BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """Return which pairs of a tile exist, [BLOCK_T * BLOCK_HEADS, BLOCK_HALF]; rows are the heads of each token."""
    rows, dims = tl.arange(0, BLOCK_T * BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
    mask = (first + rows // BLOCK_HEADS < T)[:, None]
    if HEADS % BLOCK_HEADS != 0:
        mask = mask & (head + rows % BLOCK_HEADS < HEADS)[:, None]
    if HALF != BLOCK_HALF:
        mask = mask & (dims < HALF)[None, :]
    return mask


@triton.jit
def _pointers(ptr, first, head, stride_t, stride_h, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
              BLOCK_T: tl.constexpr):  # fmt: skip
    """Return pointers to the first half of each head of a tile; the second half is at an offset of HALF."""
    rows, dims = tl.arange(0, BLOCK_T * BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
    tokens, heads = (first + rows // BLOCK_HEADS).to(tl.int64), (head + rows % BLOCK_HEADS).to(tl.int64)
    return ptr + (tokens * stride_t + heads * stride_h)[:, None] + dims[None, :]


@triton.jit
def _load(ptrs, mask, HALF: tl.constexpr):
    """Load both halves in fp32, zero outside the mask."""
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptrs + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptrs, mask, first, second, HALF: tl.constexpr):
    tl.store(ptrs, first.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + HALF, second.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _weights(weight_ptr, mask, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
             BLOCK_T: tl.constexpr):  # fmt: skip
    """Load the two halves of the norm's weights for every pair of a tile.

    In the shape of the tile each thread loads the weights of its own pairs. A single row would be exchanged through
    shared memory.
    """
    return _load(_pointers(weight_ptr, 0, 0, 0, 0, BLOCK_HEADS, BLOCK_HALF, BLOCK_T), mask, HALF)


@triton.jit
def _normalize(first, second, HALF: tl.constexpr, EPS: tl.constexpr):
    """Return n of both halves and r [rows, 1]."""
    squares = tl.sum(first * first + second * second, 1)
    r = tl.rsqrt(squares / (2 * HALF) + EPS)[:, None]
    return first * r, second * r, r


@triton.jit
def _angles(cos_ptr, sin_ptr, first, mask, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
            BLOCK_T: tl.constexpr):  # fmt: skip
    """Load cos and sin for every pair of a tile; the heads of a token share them."""
    cos = tl.load(_pointers(cos_ptr, first, 0, HALF, 0, BLOCK_HEADS, BLOCK_HALF, BLOCK_T), mask=mask, other=0.0)
    return cos, tl.load(_pointers(sin_ptr, first, 0, HALF, 0, BLOCK_HEADS, BLOCK_HALF, BLOCK_T), mask=mask, other=0.0)


@triton.jit
def _rotate_tile(
    x_ptr, weight_ptr, y_ptr, cos_ptr, sin_ptr, first, head, T, stride_t, stride_h,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, EPS: tl.constexpr, INVERSE: tl.constexpr, OUT_HEADS: tl.constexpr,
):  # fmt: skip
    """Write one tile of y, HEADS heads of a tensor [T, OUT_HEADS, D]."""
    mask = _mask(first, head, T, HEADS, BLOCK_HEADS, HALF, BLOCK_HALF, BLOCK_T)
    x_1, x_2 = _load(_pointers(x_ptr, first, head, stride_t, stride_h, BLOCK_HEADS, BLOCK_HALF, BLOCK_T), mask, HALF)
    if weight_ptr is not None:
        x_1, x_2, _ = _normalize(x_1, x_2, HALF, EPS)
        w_1, w_2 = _weights(weight_ptr, mask, HALF, BLOCK_HEADS, BLOCK_HALF, BLOCK_T)
        x_1 *= w_1
        x_2 *= w_2
    cos, sin = _angles(cos_ptr, sin_ptr, first, mask, HALF, BLOCK_HEADS, BLOCK_HALF, BLOCK_T)
    sin = -sin if INVERSE else sin
    ptrs = _pointers(y_ptr, first, head, OUT_HEADS * 2 * HALF, 2 * HALF, BLOCK_HEADS, BLOCK_HALF, BLOCK_T)
    _store(ptrs, mask, x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin, HALF)


@triton.jit(do_not_specialize=["T"])
def rope_forward_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, T,
    stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, G: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, EPS: tl.constexpr, PACKED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_T tokens of a chunk of q or k; with INVERSE, by minus the angle, which is the gradient."""
    q_chunks = (H + BLOCK_HEADS - 1) // BLOCK_HEADS
    chunks = q_chunks + (G + BLOCK_HEADS - 1) // BLOCK_HEADS
    first, chunk = tl.program_id(0) // chunks * BLOCK_T, tl.program_id(0) % chunks
    if chunk < q_chunks:
        _rotate_tile(
            q_ptr, q_weight_ptr, q_out_ptr, cos_ptr, sin_ptr, first, chunk * BLOCK_HEADS, T, stride_qt, stride_qh,
            H, BLOCK_HEADS, HALF, BLOCK_HALF, BLOCK_T, EPS, INVERSE, H + 2 * G if PACKED else H,
        )  # fmt: skip
    else:
        head = (chunk - q_chunks) * BLOCK_HEADS
        _rotate_tile(
            k_ptr, k_weight_ptr, k_out_ptr, cos_ptr, sin_ptr, first, head, T, stride_kt, stride_kh,
            G, BLOCK_HEADS, HALF, BLOCK_HALF, BLOCK_T, EPS, INVERSE, H + 2 * G if PACKED else G,
        )  # fmt: skip


@triton.jit
def _norm_gradient(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, cos_ptr, sin_ptr, first, head, T, stride_dt, stride_dh, stride_t, stride_h,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, EPS: tl.constexpr, OUT_HEADS: tl.constexpr,
):  # fmt: skip
    """Write dx of a tile and return the contribution of each pair to dw, for both halves."""
    mask = _mask(first, head, T, HEADS, BLOCK_HEADS, HALF, BLOCK_HALF, BLOCK_T)
    ptrs = _pointers(dy_ptr, first, head, stride_dt, stride_dh, BLOCK_HEADS, BLOCK_HALF, BLOCK_T)
    dy_1, dy_2 = _load(ptrs, mask, HALF)
    cos, sin = _angles(cos_ptr, sin_ptr, first, mask, HALF, BLOCK_HEADS, BLOCK_HALF, BLOCK_T)
    g_1, g_2 = dy_1 * cos + dy_2 * sin, dy_2 * cos - dy_1 * sin
    x_1, x_2 = _load(_pointers(x_ptr, first, head, stride_t, stride_h, BLOCK_HEADS, BLOCK_HALF, BLOCK_T), mask, HALF)
    n_1, n_2, r = _normalize(x_1, x_2, HALF, EPS)
    # Reloaded from the L1 cache for each tile: keeping them in registers would lower occupancy.
    w_1, w_2 = _weights(weight_ptr, mask, HALF, BLOCK_HEADS, BLOCK_HALF, BLOCK_T)
    dn_1, dn_2 = g_1 * w_1, g_2 * w_2
    mean = (tl.sum(n_1 * dn_1 + n_2 * dn_2, 1) / (2 * HALF))[:, None]
    ptrs = _pointers(dx_ptr, first, head, OUT_HEADS * 2 * HALF, 2 * HALF, BLOCK_HEADS, BLOCK_HALF, BLOCK_T)
    _store(ptrs, mask, r * (dn_1 - n_1 * mean), r * (dn_2 - n_2 * mean), HALF)
    return n_1 * g_1, n_2 * g_2


@triton.jit
def _norm_gradients(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, cos_ptr, sin_ptr, sums_ptr, start, head, T,
    stride_dt, stride_dh, stride_t, stride_h,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, EPS: tl.constexpr, TILES: tl.constexpr, OUT_HEADS: tl.constexpr,
):  # fmt: skip
    """Write dx of TILES tiles and the sum of their contributions to dw, fp32 [D]."""
    dw_1 = tl.zeros([BLOCK_T * BLOCK_HEADS, BLOCK_HALF], tl.float32)
    dw_2 = tl.zeros([BLOCK_T * BLOCK_HEADS, BLOCK_HALF], tl.float32)
    for first in tl.range(start, tl.minimum(start + TILES * BLOCK_T, T), BLOCK_T):
        part_1, part_2 = _norm_gradient(
            dy_ptr, x_ptr, weight_ptr, dx_ptr, cos_ptr, sin_ptr, first, head, T,
            stride_dt, stride_dh, stride_t, stride_h, HEADS, BLOCK_HEADS, HALF, BLOCK_HALF, BLOCK_T, EPS, OUT_HEADS,
        )  # fmt: skip
        dw_1 += part_1
        dw_2 += part_2
    dims = tl.arange(0, BLOCK_HALF)
    _store(sums_ptr + dims, dims < HALF, tl.sum(dw_1, 0), tl.sum(dw_2, 0), HALF)


@triton.jit(do_not_specialize=["T"])
def rope_backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, sums_ptr, T,
    stride_dqt, stride_dqh, stride_dkt, stride_dkh, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, G: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, EPS: tl.constexpr, PACKED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Differentiate TILES * BLOCK_T tokens of a chunk of q or k through rotation and norm.

    sums: fp32 [programs, D], the programs' contributions to dw; for each block of tokens first the chunks of q, then
    those of k.
    """
    q_chunks = (H + BLOCK_HEADS - 1) // BLOCK_HEADS
    chunks = q_chunks + (G + BLOCK_HEADS - 1) // BLOCK_HEADS
    start, chunk = tl.program_id(0) // chunks * (TILES * BLOCK_T), tl.program_id(0) % chunks
    sums_ptr += tl.program_id(0).to(tl.int64) * (2 * HALF)
    if chunk < q_chunks:
        _norm_gradients(
            dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, cos_ptr, sin_ptr, sums_ptr, start, chunk * BLOCK_HEADS, T,
            stride_dqt, stride_dqh, stride_qt, stride_qh,
            H, BLOCK_HEADS, HALF, BLOCK_HALF, BLOCK_T, EPS, TILES, H + 2 * G if PACKED else H,
        )  # fmt: skip
    else:
        head = (chunk - q_chunks) * BLOCK_HEADS
        _norm_gradients(
            dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, cos_ptr, sin_ptr, sums_ptr, start, head, T,
            stride_dkt, stride_dkh, stride_kt, stride_kh,
            G, BLOCK_HEADS, HALF, BLOCK_HALF, BLOCK_T, EPS, TILES, H + 2 * G if PACKED else G,
        )  # fmt: skip


def rope(
    q: Tensor, k: Tensor, rotary: Rotary, q_weight: Tensor | None = None, k_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by `rotary`, after an RMS norm of each head if weights are given; differentiable.

    Args:
        q: [T, H, D]. k: [T, G, D]. One dtype, fp16, bf16 or fp32; views of one projection are read without a copy.
        rotary: cos and sin, fp32 [T, D / 2].
        q_weight, k_weight: [D], fp16, bf16 or fp32, both or neither.

    Returns:
        Contiguous tensors with the shapes and dtype of q and k.

    Raises:
        ValueError: The kernels do not support the device or a dtype.
    """
    check_inputs("rope", q=q, q_weight=q_weight, k_weight=k_weight)
    return _forward(q, k, *rotary, q_weight, k_weight, False)


@torch.library.custom_op("transfusion_fast::rope", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rotate(q, k, cos, sin, q_weight, k_weight, inverse, q_out, k_out)
    return q_out, k_out


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, inverse: bool,
    q_out: Tensor, k_out: Tensor, packed: bool = False,
) -> None:  # fmt: skip
    """Write the rotated q and k; `packed` outputs are heads of one tensor [T, H + 2G, D] and may be the inputs."""
    T, H, D = q.shape
    G = k.shape[1]
    if T:
        sizes, options = constants("forward", H, G, D, packed)
        chunks = sum(triton.cdiv(n, sizes["BLOCK_HEADS"]) for n in (H, G))
        q, k = dense_rows(q), dense_rows(k)
        shared = [x if x is None else x.contiguous() for x in (cos, sin, q_weight, k_weight)]
        with on_device(q):
            rope_forward_kernel[(triton.cdiv(T, sizes["BLOCK_T"]) * chunks,)](
                q, k, *shared, q_out, k_out, T, *q.stride()[:2], *k.stride()[:2],
                **sizes, INVERSE=inverse, **options,
            )  # fmt: skip


@torch.library.custom_op("transfusion_fast::rope_norm_backward", mutates_args=())
def _norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return contiguous (dq, dk, dq_weight, dk_weight)."""
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    weights = differentiate_norm(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, dq, dk)
    return dq, dk, *weights


def differentiate_norm(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor,
    dq: Tensor, dk: Tensor, packed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dq and dk, packed as in `rotate`, and return (dq_weight, dk_weight)."""
    T, H, D = q.shape
    sizes, options = constants("backward", H, k.shape[1], D, packed)
    q_chunks, k_chunks = (triton.cdiv(n, sizes["BLOCK_HEADS"]) for n in (H, k.shape[1]))
    steps = triton.cdiv(T, TILES * sizes["BLOCK_T"])
    sums = torch.empty((steps, q_chunks + k_chunks, D), dtype=torch.float32, device=q.device)
    if T:
        dq_out, dk_out, q, k = (dense_rows(x) for x in (dq_out, dk_out, q, k))
        strides = [stride for x in (dq_out, dk_out, q, k) for stride in x.stride()[:2]]
        shared = [x.contiguous() for x in (cos, sin, q_weight, k_weight)]
        with on_device(q):
            rope_backward_kernel[(steps * (q_chunks + k_chunks),)](
                dq_out, dk_out, q, k, *shared, dq, dk, sums, T, *strides, **sizes, **options
            )
    dq_weight, dk_weight = sums[:, :q_chunks].sum(dim=(0, 1)), sums[:, q_chunks:].sum(dim=(0, 1))
    return dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)


_forward.register_fake(lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)))
_norm_backward.register_fake(
    lambda _dq, _dk, q, k, _cos, _sin, *weights: tuple(x.new_empty(x.shape) for x in (q, k, *weights))
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, q_weight, k_weight, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, *(() if q_weight is None else (q, k, q_weight, k_weight)))


def _differentiate(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, *rest = ctx.saved_tensors
    if not rest:
        return *_forward(dq_out, dk_out, cos, sin, None, None, not ctx.inverse), None, None, None, None, None
    q, k, *weights = rest
    dq, dk, dq_weight, dk_weight = _norm_backward(dq_out, dk_out, q, k, cos, sin, *weights)
    return dq, dk, None, None, dq_weight, dk_weight, None


_forward.register_autograd(_differentiate, setup_context=_save)


def constants(kernel: str, H: int, G: int, D: int, packed: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants except INVERSE, and the options, to compile the kernel "forward" or "backward" with."""
    half = D // 2
    block_half = triton.next_power_of_2(half)
    block_heads = _block_heads(H, G, block_half)
    block_t = max(1, PAIRS // (block_heads * block_half))
    sizes = {
        "H": H, "G": G, "BLOCK_HEADS": block_heads, "HALF": half, "BLOCK_HALF": block_half, "BLOCK_T": block_t,
        "EPS": EPS, "PACKED": packed,
    }  # fmt: skip
    tiles = {"TILES": TILES} if kernel == "backward" else {}
    warps = max(1, block_t * block_heads * block_half // PAIRS_OF_WARP)
    return sizes | tiles, {"num_warps": warps, "enable_fp_fusion": True}


def _block_heads(H: int, G: int, block_half: int) -> int:
    """Return the heads of a chunk: the largest power of two that divides both H and G, within bounds."""
    dividing = math.gcd(H, G, MOST_HEADS)
    least = min(LEAST_HEADS, triton.next_power_of_2(max(H, G)))
    return min(max(dividing, least), max(1, PAIRS // block_half))
