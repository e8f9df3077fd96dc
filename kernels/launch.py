"""What the kernels share: the interpreter switch, the architecture of a device, and how tensors are addressed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion_fast.kernels.attention_configs import ARCHITECTURES

# Read once, as Triton itself does when a kernel is defined: later changes of TRITON_INTERPRET have no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret
INTERPRETED_ARCHITECTURE = 90  # whose configurations the interpreter runs
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def architecture(device: torch.device) -> int:
    """The architecture whose configurations `device` runs: 80, 90, 100 or 120, as sm_80 and so on.

    Raises ValueError for a GPU of which no configuration was ever compiled.
    """
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    # Not those near them: on sm_86 the configurations of sm_120 spilled, and it has less shared memory than sm_80.
    if 10 * major + minor not in ARCHITECTURES:
        known = " or ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise ValueError(f'the GPU must be {known} for backend="triton", got sm_{major}{minor}; use backend="torch"')
    return 10 * major + minor


def check_device(op: str, x: Tensor) -> None:
    """Raises ValueError where the kernels of `op` cannot run on the device of x."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f'{op}: backend="triton" needs CUDA tensors, got {x.device}; '
            'use backend="torch", or set TRITON_INTERPRET=1 before Python starts'
        )


def check_dtype(name: str, x: Tensor) -> None:
    """Raises ValueError where no kernel takes the numbers of x."""
    if x.dtype not in DTYPES:
        raise ValueError(f'{name} must be fp16, bf16 or fp32 for backend="triton", got {x.dtype}; cast it')


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b in fp32 on the matrix units: fp16 and bf16 as they are, fp32 as three products of TF32."""
    if INTERPRET:
        # The interpreter multiplies the raw bits of bf16.
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Where kernels are launched: on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def addressable(x: Tensor) -> Tensor:
    """x, or a copy of it where descriptors and wide loads cannot address it: they take 16 bytes at a time."""
    lengths = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(length and length % 16 == 0 for length in lengths)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as [rows, F] with numbers side by side in a row: views, where their strides allow it.

    Where all are contiguous, everything is one row.
    """
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in flat]
