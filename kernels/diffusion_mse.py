"""Mean squared error of each image over packed patches, without storing the target in memory.

    L_n = sum over the patches p of image n, and their C values, of (prediction - target)^2 / (C |n|)
    dprediction_p = dL_n 2 (prediction - target) / (C |n|)

The target is a tensor, such as the noise eps (DDPM, arXiv 2006.11239, equation 14). Or it is computed in registers from
eps and the clean latents x_0: as eps - x_0 for flow matching (arXiv 2210.02747), or as a_n x_0 + b_n eps, with two
coefficients of each image that depend on its timestep. Arithmetic is in fp32. Only the inputs are saved for backward.

Loads and stores are 16 bytes wide if a patch is a multiple of 16 bytes, and narrower otherwise, since an image may then
start at any address.

An image is cut into pieces of BLOCK_P patches, one for each program. The first piece of image n has the number
`offset[n] // BLOCK_P + n`. So two pieces never have the same number, because an image has at most one piece more than
blocks of the flat patches start in it, and a launch depends only on P and N. A program finds its image by bisection.
The forward kernel stores the sum of each piece, and a second kernel adds the sums of each image in order: there are no
atomics, and equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_fast.kernels.launch import check_inputs, dense_rows, on_device

VALUES = 2048  # values of a tile: in 16 bits, each thread of 4 warps loads 16 bytes twice
MOST_COLUMNS = 1024  # columns of a tile; a program loops over wider patches
WARPS = 4
PIECES = 1024  # sums that are added at a time


@triton.jit
def _find_image(offsets_ptr, N, piece, BLOCK_P: tl.constexpr):
    """Return the last image n with offset[n] // BLOCK_P + n <= piece, which owns the piece if it has so many."""
    low, high = 0, N
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets_ptr + middle) // BLOCK_P + middle <= piece:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _bounds(offsets_ptr, N, P, BLOCK_P: tl.constexpr):
    """Return (image, first patch, end of the patches) of this program and the number of patches of the image."""
    piece = tl.program_id(0)
    image = _find_image(offsets_ptr, N, piece, BLOCK_P)
    start = tl.load(offsets_ptr + image)
    end = tl.minimum(tl.load(offsets_ptr + image + 1), P)
    first = start + (piece - (start // BLOCK_P + image)) * BLOCK_P
    return image, first, tl.minimum(first + BLOCK_P, end), end - start


@triton.jit
def _pointers(ptr, first, stride, start, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return pointers [BLOCK_P, BLOCK_C] to the patches from `first` and the columns from `start`.

    A stride of None means contiguous rows: the compiler knows C, and therefore how wide the loads may be.
    """
    stride = C if stride is None else stride
    ptr += first.to(tl.int64) * stride + start
    return ptr + (tl.arange(0, BLOCK_P).to(tl.int64) * stride)[:, None] + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def _mask(first, last, start, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return which values of a tile exist, [BLOCK_P, BLOCK_C]."""
    mask = (first + tl.arange(0, BLOCK_P) < last)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (start + tl.arange(0, BLOCK_C) < C)[None, :]
    return mask


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _difference(
    prediction_ptr, target_ptr, x_0_ptr, coefficients_ptr, image, first, last,
    stride_prediction, stride_target, stride_x_0, start,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return prediction - target of a tile, zero outside its mask, and the mask."""
    mask = _mask(first, last, start, C, BLOCK_P, BLOCK_C)
    prediction = _load(_pointers(prediction_ptr, first, stride_prediction, start, C, BLOCK_P, BLOCK_C), mask)
    target = _load(_pointers(target_ptr, first, stride_target, start, C, BLOCK_P, BLOCK_C), mask)
    if x_0_ptr is not None:
        x_0 = _load(_pointers(x_0_ptr, first, stride_x_0, start, C, BLOCK_P, BLOCK_C), mask)
        if coefficients_ptr is None:
            target -= x_0
        else:
            coefficients_ptr += 2 * image
            target = tl.load(coefficients_ptr) * x_0 + tl.load(coefficients_ptr + 1) * target
    return prediction - target, mask


@triton.jit(do_not_specialize=["N", "P"])
def diffusion_mse_forward_kernel(
    prediction_ptr, target_ptr, x_0_ptr, coefficients_ptr, offsets_ptr, sums_ptr, N, P,
    stride_prediction, stride_target, stride_x_0,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the sum of the squared errors of one piece."""
    image, first, last, _patches = _bounds(offsets_ptr, N, P, BLOCK_P)
    if first >= last:
        return
    total = 0.0
    for start in tl.range(0, C, BLOCK_C):
        difference, _mask_of_tile = _difference(
            prediction_ptr, target_ptr, x_0_ptr, coefficients_ptr, image, first, last,
            stride_prediction, stride_target, stride_x_0, start, C, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        total += tl.sum(tl.sum(difference * difference, 1), 0)
    tl.store(sums_ptr + tl.program_id(0), total)


@triton.jit
def diffusion_mse_mean_kernel(
    sums_ptr, offsets_ptr, loss_ptr, C: tl.constexpr, BLOCK_P: tl.constexpr, PIECES: tl.constexpr
):
    """Store the mean of one image from the sums of its pieces; NaN for an image without patches."""
    image = tl.program_id(0)
    start, end = tl.load(offsets_ptr + image), tl.load(offsets_ptr + image + 1)
    sums_ptr += start // BLOCK_P + image
    count = tl.cdiv(end - start, BLOCK_P)
    total = tl.zeros([PIECES], tl.float32)
    for at in tl.range(0, count, PIECES):
        pieces = at + tl.arange(0, PIECES)
        total += tl.load(sums_ptr + pieces, mask=pieces < count, other=0.0)
    values = (end - start).to(tl.float32) * C
    tl.store(loss_ptr + image, tl.sum(total, 0) / values)


@triton.jit(do_not_specialize=["N", "P"])
def diffusion_mse_backward_kernel(
    dloss_ptr, prediction_ptr, target_ptr, x_0_ptr, coefficients_ptr, offsets_ptr, dprediction_ptr, N, P,
    stride_prediction, stride_target, stride_x_0,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write one piece of dprediction, contiguous [P, C]."""
    image, first, last, patches = _bounds(offsets_ptr, N, P, BLOCK_P)
    if first >= last:
        return
    scale = tl.load(dloss_ptr + image) * (2.0 / (patches.to(tl.float32) * C))
    for start in tl.range(0, C, BLOCK_C):
        difference, mask = _difference(
            prediction_ptr, target_ptr, x_0_ptr, coefficients_ptr, image, first, last,
            stride_prediction, stride_target, stride_x_0, start, C, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        ptrs = _pointers(dprediction_ptr, first, None, start, C, BLOCK_P, BLOCK_C)
        tl.store(ptrs, (difference * scale).to(dprediction_ptr.dtype.element_ty), mask=mask)


def diffusion_mse(
    prediction: Tensor,
    target: Tensor,
    image_offsets: Tensor,
    x_0: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """Compute the mean squared error of each image, differentiable in `prediction`, `target` and `x_0`.

    Args:
        prediction, target: [P, C], fp16, bf16 or fp32, with rows of any stride.
        image_offsets: int32 [N + 1], ascending from 0 to P; image n is the patches [offsets[n], offsets[n + 1]).
        x_0: [P, C]; if given, the target is `target - x_0`, or with coefficients (a_n, b_n) of image n
            `a_n x_0 + b_n target`.
        coefficients: fp32 [N, 2], contiguous.

    Returns:
        fp32 [N].

    Raises:
        ValueError: The kernels do not support the device or a dtype.
    """
    check_inputs("diffusion_mse", prediction=prediction, target=target, x_0=x_0)
    return _forward(prediction, target, image_offsets, x_0, coefficients)


@torch.library.custom_op("transfusion_fast::diffusion_mse", mutates_args=())
def _forward(
    prediction: Tensor, target: Tensor, image_offsets: Tensor, x_0: Tensor | None, coefficients: Tensor | None
) -> Tensor:
    P, C = prediction.shape
    N = len(image_offsets) - 1
    loss, sums = (torch.empty(n, dtype=torch.float32, device=prediction.device) for n in (N, _pieces(N, P, C)))
    if N:
        rows, strides = _rows(prediction, target, x_0)
        inputs = (*rows, coefficients, image_offsets)
        sizes, options = constants("forward", C)
        with on_device(prediction):
            diffusion_mse_forward_kernel[sums.shape](*inputs, sums, N, P, *strides, **sizes, **options)
            sizes, options = constants("mean", C)
            diffusion_mse_mean_kernel[(N,)](sums, image_offsets, loss, **sizes, **options)
    return loss


@torch.library.custom_op("transfusion_fast::diffusion_mse_backward", mutates_args=())
def _backward(
    dloss: Tensor,
    prediction: Tensor,
    target: Tensor,
    image_offsets: Tensor,
    x_0: Tensor | None,
    coefficients: Tensor | None,
) -> Tensor:
    """Return dprediction, contiguous."""
    P, C = prediction.shape
    N = len(image_offsets) - 1
    dprediction = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    if N:
        rows, strides = _rows(prediction, target, x_0)
        inputs = (*rows, coefficients, image_offsets)
        sizes, options = constants("backward", C)
        with on_device(prediction):
            diffusion_mse_backward_kernel[(_pieces(N, P, C),)](
                dloss.contiguous(), *inputs, dprediction, N, P, *strides, **sizes, **options
            )
    return dprediction


_forward.register_fake(lambda x, _, offsets, *__: x.new_empty(offsets.shape[0] - 1, dtype=torch.float32))
_backward.register_fake(lambda _, prediction, *__: prediction.new_empty(prediction.shape))


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    prediction, target, image_offsets, x_0, coefficients = ctx.saved_tensors
    _, needs_target, _, needs_x_0, _ = ctx.needs_input_grad
    # Training differentiates only the prediction. The other gradients are multiples of its own, before rounding.
    exact = prediction.float() if needs_target or needs_x_0 else prediction
    gradient = _backward(dloss, exact, target, image_offsets, x_0, coefficients)
    of_x_0: Tensor | int = -1
    of_target: Tensor | int = 1
    if coefficients is not None and (needs_target or needs_x_0):
        lengths = image_offsets.diff()
        of_x_0, of_target = coefficients.repeat_interleave(lengths, dim=0, output_size=len(gradient)).split(1, dim=1)
    return (
        gradient.to(prediction.dtype),
        (-of_target * gradient).to(target.dtype) if needs_target else None,
        None,
        (-of_x_0 * gradient).to(x_0.dtype) if needs_x_0 else None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def constants(kernel: str, C: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants and options to compile the kernel "forward", "mean" or "backward" with."""
    block_c = min(triton.next_power_of_2(C), MOST_COLUMNS)
    last = {"PIECES": PIECES} if kernel == "mean" else {"BLOCK_C": block_c}
    return {"C": C, "BLOCK_P": VALUES // block_c} | last, {"num_warps": WARPS, "enable_fp_fusion": True}


def _pieces(N: int, P: int, C: int) -> int:
    """Return an upper bound of the number of pieces."""
    return N + P // constants("forward", C)[0]["BLOCK_P"]


def _rows(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int | None]]:
    """Return the tensors with contiguous rows, and the stride of each that is not contiguous as a whole."""
    rows = [x if x is None else dense_rows(x) for x in tensors]
    return rows, [None if x is None or x.is_contiguous() else x.stride(0) for x in rows]
