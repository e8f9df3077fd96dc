"""Compiles the Triton kernels for a real GPU target on any machine: no GPU, no launch.

Run in a process without TRITON_INTERPRET, in which the kernels are compiled functions and not interpreted ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource

from transfusion_fast.kernels import attention_kernels, hybrid_attention
from transfusion_fast.kernels.attention_configs import Config, config

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# Bytes of shared memory that a block may take (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": the maximum less the 1 KiB that the system keeps).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Variant:
    """One compilation of an attention kernel."""

    kernel: str  # "forward", "backward_dq" or "backward_dkdv"
    arch: int  # 80, 90, 100 or 120
    dtype: str  # "bf16", "fp16" or "fp32"
    head_dim: int
    height: int  # of the tiles: 128 or 64
    heads: int = 16
    kv_heads: int = 4

    @property
    def config(self) -> Config:
        return config(self.kernel, self.arch, self.head_dim, ITEMSIZE[self.dtype], self.height)

    def __str__(self) -> str:
        heads = f"H={self.heads} G={self.kv_heads}"
        return f"{self.kernel} sm_{self.arch} {self.dtype} D={self.head_dim} tiles of {self.height} {heads}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel."""

    cubin: bytes
    shared_bytes: int
    ttir: str
    ttgir: str
    ptx: str


def compile_variant(variant: Variant) -> Compiled:
    """Compiles with the options that a launch has: aligned pointers and strides, everything else unknown."""
    c = variant.config
    function = getattr(attention_kernels, f"hybrid_attention_{variant.kernel}_kernel")
    sizes = variant.heads, variant.kv_heads, variant.head_dim, variant.height
    values = hybrid_attention.constants(variant.kernel, c, *sizes)
    types = {n: _type_of(n, variant, values["BLOCK_D"]) for n in function.arg_names if n not in values}
    values |= {name: None for name, kind in types.items() if kind is None}
    aligned = {name for name in types if name.endswith("_ptr") or name.startswith("stride")}
    return compile_kernel(function, types, values, aligned, hybrid_attention.compiler_options(c), variant.arch)


def compile_kernel(
    function: triton.JITFunction,
    types: Mapping[str, str | None],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    options: Mapping[str, Any],
    arch: int,
) -> Compiled:
    """Compiles a kernel for sm_`arch`.

    Args:
        types: Triton's name of the type of every argument that is not among `constants`.
        constants: arguments whose values the compiler knows; None for a tensor or stride that there is not.
        aligned: arguments that the compiler knows to be multiples of 16, as a launch tells it.
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    values, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            values[(index,)] = constants[name]
        elif name in aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=values, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    texts = (kernel.asm[stage] for stage in ("ttir", "ttgir", "ptx"))
    return Compiled(kernel.asm["cubin"], kernel.metadata.shared, *texts)


def ptxas_version(arch: int) -> tuple[int, int]:
    """Of the assembler for `arch`: the one that TRITON_PTXAS_PATH names, or the one in Triton's wheel."""
    major, minor = re.findall(r"release (\d+)\.(\d+)", get_ptxas_version(arch))[0]
    return int(major), int(minor)


def _type_of(name: str, variant: Variant, width: int) -> str | None:
    """Triton's name of an argument's type; None for a descriptor that this configuration does without."""
    c = variant.config
    if name.endswith("descriptor"):
        rows = c.value_rows if (variant.kernel, name) == ("forward", "v_descriptor") else c.step
        return f"tensordesc<{variant.dtype}[{rows}, 1, {width}]>" if c.descriptors else None
    if name in ("lse_ptr", "delta_ptr"):
        return "*fp32"
    if name.endswith(("start_ptr", "end_ptr", "tiles_ptr")):
        return "*i32"
    if name.endswith("_ptr"):
        return f"*{variant.dtype}"
    return "fp32" if name.startswith("scale") else "i32"


def products_without_matrix_unit(ttgir: str) -> list[str]:
    """Matrix products left to ordinary arithmetic: their result is not laid out as a matrix unit's."""
    dots = [line.strip() for line in ttgir.splitlines() if re.search(r"= (tt\.dot|ttng\.warp_group_dot)\b", line)]
    return [line for line in dots if "#mma" not in line]


def transposed_products(ttir: str) -> list[str]:
    """Transposed operands that do not come straight from memory, in Triton's first form of a kernel.

    The transposed result of a matrix product gives wrong results on sm_90 in Triton 3.4 to 3.7.0. Swapping the last two
    of three axes is no such transposition: it only names the halves of the columns.
    """
    sources: dict[str, tuple[str, str]] = {}  # of a value: the operation, and its first operand
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%\w+)(?::\d+)? = (\S+) (?:(%\w+)(?:#\d+)?)?", line)
        if not match:
            continue
        result, kind, operand = match.groups()
        sources[result] = kind, operand
        if kind == "tt.trans" and "array<i32: 1, 0>" in line and not _from_memory(operand, sources):
            found.append(line.strip())
    return found


def _from_memory(value: str, sources: dict[str, tuple[str, str]]) -> bool:
    kind, operand = sources.get(value, ("", ""))
    if kind == "tt.reshape":
        return _from_memory(operand, sources)
    return kind in ("tt.load", "tt.descriptor_load")
