"""Helpers of the kernels: the interpreter switch, the architecture of a device, and the addressing of tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_fast.kernels.attention_configs import ARCHITECTURES

# Read once, as Triton itself does when it defines a kernel: later changes of TRITON_INTERPRET have no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret
INTERPRETED_ARCHITECTURE = 90  # the architecture whose configurations the interpreter runs
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def architecture(device: torch.device) -> int:
    """Return the architecture whose configurations `device` runs: 80, 90, 100 or 120, as in sm_80.

    Raises:
        ValueError: No configuration was ever compiled for this GPU.
    """
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    # Not the nearest one: the configurations of sm_120 spilled on sm_86, which has less shared memory than sm_80.
    if 10 * major + minor not in ARCHITECTURES:
        known = " or ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise ValueError(f'the GPU must be {known} for backend="triton", got sm_{major}{minor}; use backend="torch"')
    return 10 * major + minor


def check_inputs(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if the kernels of `op` do not support the device or dtype of a tensor, given by its name."""
    for name, x in tensors.items():
        if x is not None and x.device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f'{op}: backend="triton" needs CUDA tensors, got {x.device}; '
                'use backend="torch", or set TRITON_INTERPRET=1 before Python starts'
            )
        if x is not None and x.dtype not in DTYPES:
            raise ValueError(f'{name} must be fp16, bf16 or fp32 for backend="triton", got {x.dtype}; cast it')


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """Return acc + a @ b in fp32 on the matrix units: fp16 and bf16 directly, fp32 as three products of TF32."""
    if INTERPRET:
        # The interpreter would multiply the raw bits of bf16.
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Make the device of x current, because Triton launches kernels on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def addressable(x: Tensor) -> Tensor:
    """Return x, or a copy if descriptors and wide loads cannot address it: they need multiples of 16 bytes."""
    lengths = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(length and length % 16 == 0 for length in lengths)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def dense_rows(x: Tensor) -> Tensor:
    """Return x, or a copy if the numbers of its last dimension are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one shape as [rows, F] with contiguous rows, as views if their strides allow it.

    If all tensors are contiguous, they become one row.
    """
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [dense_rows(x.reshape(-1, x.shape[-1])) for x in tensors]
