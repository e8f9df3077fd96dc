"""The memory-bound kernels as they are launched in training: arguments, options, and bytes of the tensors.

As at a launch, the compiler knows which pointers, strides and row lengths are multiples of 16, and no more of them.
q and k of rope are views of one projection; tensors of their own run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import pointwise_bytes
import torch
import triton
from pointwise_bytes import Tensor

from transfusion_fast.kernels import diffusion_mse, rope, swiglu

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32 = ("cos_ptr", "sin_ptr", "sums_ptr", "loss_ptr", "dloss_ptr")  # whatever the dtype of the rest
T, F = 16384, 4096
HEADS = ((16, 16, 64), (16, 4, 128))  # H, G, D
OFFSETS, C = range(0, 64 * 256 + 1, 256), 32  # 64 images of 256 patches: 2 x 2 pixels of 8 latent channels


@dataclass(frozen=True)
class Case:
    """One kernel and one shape.

    `rest` is what other kernels of the pass touch; `fp32` are the tensors of that dtype, whatever that of the others;
    `numbers` are strides and row lengths. `ragged`: a row ends in a tile that is not whole, on a branch of its own.
    """

    shape: str
    function: triton.JITFunction
    constants: dict[str, Any]
    options: dict[str, Any]
    tensors: Sequence[Tensor]
    rest: Sequence[Tensor] = ()
    fp32: Sequence[str] = FP32
    numbers: Mapping[str, int] = field(default_factory=dict)
    ragged: bool = False

    @property
    def arguments(self) -> list[str]:
        """Those of a launch, in order: not known to the compiler."""
        parameters = zip(self.function.arg_names, self.function.params, strict=True)
        return [name for name, p in parameters if not p.is_constexpr and name not in self.constants]

    @property
    def aligned(self) -> set[str]:
        """Arguments that the compiler knows to be multiples of 16."""
        return {n for n in self.arguments if n.endswith("_ptr")} | {n for n, v in self.numbers.items() if v % 16 == 0}

    @property
    def least(self) -> int:
        """Bytes of the pass."""
        return sum(tensor.least for tensor in (*self.tensors, *self.rest))

    def types(self, dtype: str) -> dict[str, str]:
        """Triton's names of the types of `arguments`."""
        return {name: _type_of(name, "fp32" if name in self.fp32 else dtype) for name in self.arguments}


def case(name: str, dtype: str) -> Case:
    """The case of that name, of `CASES`, for tensors of one dtype."""
    return CASES[name](ITEMSIZE[dtype])


def _type_of(name: str, dtype: str) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    return "*i32" if name == "offsets_ptr" else f"*{dtype}"


def _rope(itemsize: int, H: int, G: int, D: int, inverse: bool, norm: bool) -> Case:
    sizes, options = rope.constants("forward", H, G, D)
    absent = {} if norm else {"q_weight_ptr": None, "k_weight_ptr": None}
    return Case(
        f"T={T}",
        rope.rope_forward_kernel,
        sizes | absent | {"INVERSE": inverse},
        options,
        pointwise_bytes.rope_forward(T, H, G, D, itemsize, norm),
        numbers=_strides("q k", H, G, D),
    )


def _rope_norm_backward(itemsize: int, H: int, G: int, D: int) -> Case:
    *tensors, by_pytorch = pointwise_bytes.rope_backward(T, H, G, D, itemsize)
    return Case(
        f"T={T}",
        rope.rope_backward_kernel,
        *rope.constants("backward", H, G, D),
        tensors,
        [by_pytorch],
        numbers=_strides("q k dq dk", H, G, D),
    )


def _strides(names: str, H: int, G: int, D: int) -> dict[str, int]:
    """Of tokens and heads, in a projection to queries, keys and values."""
    return {f"stride_{name}{axis}": size for name in names.split() for axis, size in (("t", (H + 2 * G) * D), ("h", D))}


def _swiglu(itemsize: int, kernel: str, layout: str) -> Case:
    """`layout`: two contiguous tensors, of "even" or "odd" length, or the "halves" of one projection."""
    function = {"forward": swiglu.swiglu_forward_kernel, "backward": swiglu.swiglu_backward_kernel}[kernel]
    count = {"forward": pointwise_bytes.swiglu_forward, "backward": pointwise_bytes.swiglu_backward}[kernel]
    shape = {"even": (T, F), "odd": (T * F + 1,), "halves": (T, F)}[layout]
    y = torch.empty(shape, device="meta")
    pair = torch.empty(T, 2 * F, device="meta").chunk(2, dim=-1) if layout == "halves" else (y, y)
    tensors = (*pair, y) if kernel == "forward" else (y, *pair, *pair)
    numbers = _launched(swiglu, function, lambda: swiglu._launch(kernel, *tensors))
    sizes, options = swiglu.constants(kernel, numbers["F"])
    words = f"one {[T, 2 * F]}" if layout == "halves" else f"two {list(shape)}"
    return Case(words, function, sizes, options, count(y.numel(), itemsize), numbers=numbers, ragged=layout == "odd")


def _launched(module: ModuleType, function: triton.JITFunction, launch: Callable[[], None]) -> dict[str, int]:
    """The numbers that a launcher passes to a kernel of its module, which is not run."""
    kernel = MagicMock()
    with patch.object(module, function.__name__, kernel):
        launch()
    passed = zip(function.arg_names, kernel.__getitem__.return_value.call_args.args, strict=False)
    return {name: value for name, value in passed if isinstance(value, int)}


def _mse(itemsize: int, kernel: str, target: str = "tensor") -> Case:
    """`target`: a "tensor"; or made from noise and x_0, of the prediction's dtype ("x_0") or "fp32" as in training."""
    function = {
        "forward": diffusion_mse.diffusion_mse_forward_kernel,
        "mean": diffusion_mse.diffusion_mse_mean_kernel,
        "backward": diffusion_mse.diffusion_mse_backward_kernel,
    }[kernel]
    names = ("target_ptr",) if target == "tensor" else ("target_ptr", "x_0_ptr")
    targets = dict.fromkeys(names, 4 if target == "fp32" else itemsize)
    sums, mean = pointwise_bytes.mse_forward(OFFSETS, C, itemsize, targets), pointwise_bytes.mse_mean(OFFSETS, C)
    backward = pointwise_bytes.mse_backward(OFFSETS, C, itemsize, targets)
    tensors, rest = {"forward": (sums, mean), "mean": (mean, sums), "backward": (backward, ())}[kernel]
    sizes, options = diffusion_mse.constants(kernel, C)
    # No stride is that of contiguous rows.
    unused = [name for name in function.arg_names if name.startswith("stride") or name in {"x_0_ptr"} - set(names)]
    shape = f"N={len(OFFSETS) - 1} P={OFFSETS[-1]} C={C}"
    fp32 = (*FP32, *names) if target == "fp32" else FP32
    return Case(shape, function, sizes | dict.fromkeys(unused), options, tensors, rest, fp32)


def _cases() -> dict[str, Callable[[int], Case]]:
    found: dict[str, Callable[[int], Case]] = {}
    for H, G, D in HEADS:
        sizes = {"H": H, "G": G, "D": D}
        words = f"H={H} G={G} D={D}"
        found[f"rope forward, {words}"] = partial(_rope, **sizes, inverse=False, norm=False)
        found[f"rope backward, {words}"] = partial(_rope, **sizes, inverse=True, norm=False)
        found[f"rope with norm forward, {words}"] = partial(_rope, **sizes, inverse=False, norm=True)
        found[f"rope with norm backward, {words}"] = partial(_rope_norm_backward, **sizes)
    for kernel in ("forward", "backward"):
        for layout, words in {"even": "two tensors", "halves": "halves of one", "odd": "odd length"}.items():
            found[f"swiglu {kernel}, {words}"] = partial(_swiglu, kernel=kernel, layout=layout)
    for kernel in ("forward", "backward"):
        for target, words in {"tensor": "", "x_0": " with x_0", "fp32": " with x_0 in fp32"}.items():
            found[f"diffusion_mse {kernel}{words}"] = partial(_mse, kernel=kernel, target=target)
    found["diffusion_mse mean"] = partial(_mse, kernel="mean")
    return found


CASES = _cases()
