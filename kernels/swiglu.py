"""SwiGLU, silu(gate) * up (arXiv 2002.05202), which reads and writes every number once.

    y = gate sigma(gate) up,   dup = dy gate sigma(gate),   dgate = dy up sigma(gate) (1 + gate (1 - sigma(gate)))

The inputs are two tensors or the halves of one projection [.., 2F]. In the second case the gradients are written into
one tensor too; autograd would join them in another pass over memory. Arithmetic is in fp32. Only the inputs are saved
for backward, and the sigmoid sigma is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_fast.kernels.launch import as_rows, check_inputs, on_device
from transfusion_fast.kernels.reference import halves

BLOCK = 1024  # most numbers of a program: in 16 bits, each thread of 4 warps loads 16 bytes
NUMBERS_OF_WARP = 256


@triton.jit
def _inputs(gate_ptr, up_ptr, cols, mask):
    """Load gate and up and return (gate, sigmoid of gate, up) in fp32."""
    gate = tl.load(gate_ptr + cols, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + cols, mask=mask).to(tl.float32)
    return gate, 1.0 / (1.0 + tl.exp(-gate)), up


@triton.jit
def _forward_block(gate_ptr, up_ptr, y_ptr, cols, mask):
    gate, sigmoid, up = _inputs(gate_ptr, up_ptr, cols, mask)
    tl.store(y_ptr + cols, (gate * sigmoid * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_block(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, cols, mask):
    gate, sigmoid, up = _inputs(gate_ptr, up_ptr, cols, mask)
    dy = tl.load(dy_ptr + cols, mask=mask).to(tl.float32)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + cols, (dy * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, F, stride_gate, stride_up, stride_y, BLOCK: tl.constexpr):
    """Write BLOCK columns of one row of y; all rows have F columns."""
    blocks = tl.cdiv(F, BLOCK)
    row, start = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    gate_ptr += row * stride_gate + start
    up_ptr += row * stride_up + start
    y_ptr += row * stride_y + start
    cols = tl.arange(0, BLOCK)
    # Loads without a mask are 16 bytes wide for any F; with a mask, only if the compiler knows F to be a multiple.
    if start + BLOCK <= F:
        _forward_block(gate_ptr, up_ptr, y_ptr, cols, None)
    else:
        _forward_block(gate_ptr, up_ptr, y_ptr, cols, cols < F - start)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, F, stride_dy, stride_gate, stride_up, stride_dgate, stride_dup,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK columns of one row of dgate and dup."""
    blocks = tl.cdiv(F, BLOCK)
    row, start = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    dy_ptr += row * stride_dy + start
    gate_ptr += row * stride_gate + start
    up_ptr += row * stride_up + start
    dgate_ptr += row * stride_dgate + start
    dup_ptr += row * stride_dup + start
    cols = tl.arange(0, BLOCK)
    if start + BLOCK <= F:
        _backward_block(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, cols, None)
    else:
        _backward_block(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, cols, cols < F - start)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up, differentiable.

    Args:
        gate, up: [.., F] of one dtype, fp16, bf16 or fp32, with rows of any stride. Without `up`, gate is [.., 2F] and
            holds both, gate first.

    Returns:
        [.., F] in gate's dtype, contiguous.

    Raises:
        ValueError: The kernels do not support the device or dtype.
    """
    check_inputs("swiglu", gate=gate)
    return _forward(gate, up)


@torch.library.custom_op("transfusion_fast::swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor | None) -> Tensor:
    gate, up = halves(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch("forward", gate, up, y)
    return y


@torch.library.custom_op("transfusion_fast::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    """Return [dgate, dup], or [one tensor of both] if gate holds both."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up) if x is not None]
    _launch("backward", dy, *halves(gate, up), *halves(*gradients))
    return gradients


_forward.register_fake(lambda gate, up: gate.new_empty(halves(gate, up)[0].shape))
_backward.register_fake(lambda _dy, *inputs: [x.new_empty(x.shape) for x in inputs if x is not None])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    gradients = _backward(dy, *ctx.saved_tensors)
    return gradients[0], gradients[1] if len(gradients) > 1 else None


_forward.register_autograd(_differentiate, setup_context=_save)


def constants(kernel: str, F: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants and options to compile the kernel "forward" or "backward" with, for rows of F numbers."""
    block = min(BLOCK, triton.next_power_of_2(F))
    return {"BLOCK": block}, {"num_warps": max(1, block // NUMBERS_OF_WARP), "enable_fp_fusion": True}


def _launch(kernel: str, *tensors: Tensor) -> None:
    """Run a kernel over the rows of tensors of one shape; the outputs, which come last, are never copied."""
    if not tensors[0].numel():
        return
    function = {"forward": swiglu_forward_kernel, "backward": swiglu_backward_kernel}[kernel]
    rows = as_rows(*tensors)
    count, F = rows[0].shape
    sizes, options = constants(kernel, F)
    # A single row needs no stride, and a stride that is not a multiple of 16 would make the loads narrow.
    strides = [x.stride(0) if count > 1 else 0 for x in rows]
    with on_device(tensors[0]):
        function[(count * triton.cdiv(F, sizes["BLOCK"]),)](*rows, F, *strides, **sizes, **options)
