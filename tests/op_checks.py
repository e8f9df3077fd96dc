"""Checks of the kernels as ops of PyTorch, shared by the tests of attention and of the memory-bound kernels."""

import mmap

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Calls(TorchDispatchMode):
    """A mode that keeps the calls of this library's ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "transfusion_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def assert_registered(op, leaves):
    """Check the ops that `op` and its gradient call: schema, autograd, fake tensors, and tracing with dynamic shapes.

    Fake tensors must have the shapes, dtypes and strides of real ones. Returns the names of the ops. The formula of
    autograd of some ops is in a Function around them; those get inputs without gradients.
    """
    leaves = [x.detach().requires_grad_() for x in leaves]
    with _Calls() as recorded:
        outputs = op(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    addresses = {x.data_ptr() for x in leaves}
    for function, args in recorded.calls:
        own_formula = function.name().removeprefix("transfusion_fast::") in ("rope", "swiglu", "diffusion_mse")
        inputs = [
            x.detach().requires_grad_(own_formula and x.data_ptr() in addresses) if isinstance(x, torch.Tensor) else x
            for x in args
        ]
        torch.library.opcheck(function, tuple(inputs))
    return [function.name().removeprefix("transfusion_fast::") for function, _ in recorded.calls]


def far_apart(x, step=None):
    """Store the rows of x so far apart that the second half lies beyond 2^31 numbers; `step` numbers, if given.

    The system provides only the pages that are touched, wherever they lie. An offset that overflows 32 bits reads the
    zeros before x.
    """
    rows = x.numel() // x.shape[-1]
    step = step or -(-(2**31) // (rows // 2) // 16) * 16
    no_reserve = 0x4000  # MAP_NORESERVE of Linux
    memory = mmap.mmap(-1, (2**31 + rows * step) * x.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    strides = [step * stride // x.shape[-1] for stride in x.contiguous().stride()[:-1]]
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (*strides, 1), 2**31).copy_(x)
