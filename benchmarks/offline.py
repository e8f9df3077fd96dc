"""Compile Triton kernels for a real GPU target on any machine: no GPU, no launch.

Run this in a process without TRITON_INTERPRET, where the kernels are compiled functions and not interpreted ones.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# Bytes of shared memory that a block may take (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": the maximum less the 1 KiB that the system keeps).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Compiled:
    """The output of the compiler for one kernel."""

    cubin: bytes
    shared_bytes: int
    ttir: str
    ttgir: str

    @cached_property
    def instructions(self) -> list[sass.Instruction]:
        """The disassembled kernel."""
        return sass.parse_sass(sass.run_tool("nvdisasm", "-c", self.cubin))

    def columns(self, instructions: list[sass.Instruction]) -> dict[str, Any]:
        """Return the columns of resources; spills are counted among the instructions given."""
        usage = sass.run_tool("cuobjdump", "-res-usage", self.cubin)
        return sass.parse_resources(usage, instructions) | {"shared_kib": round(self.shared_bytes / 1024, 1)}


def spill_rule(row: Mapping[str, Any]) -> list[str]:
    """Return how a row breaks the rule of all kernels: no spilled register and no stack."""
    broken = f"{row['spills']} spills, {row['stack_bytes']} bytes of stack"
    return [broken] if row["spills"] or row["stack_bytes"] else []


def compile_kernel(
    function: triton.JITFunction,
    types: Mapping[str, str | None],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    options: Mapping[str, Any],
    arch: int,
) -> Compiled:
    """Compile a kernel for sm_`arch`.

    Args:
        types: Triton's name of the type of every argument that is not among `constants`.
        constants: arguments whose values the compiler knows; None for an absent tensor or stride.
        aligned: arguments that the compiler knows to be multiples of 16, as at a launch.
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
    return Compiled(kernel.asm["cubin"], kernel.metadata.shared, kernel.asm["ttir"], kernel.asm["ttgir"])


def products_without_matrix_unit(ttgir: str) -> list[str]:
    """Return the matrix products left to ordinary arithmetic: their results are not laid out for a matrix unit."""
    dots = [line.strip() for line in ttgir.splitlines() if re.search(r"= (tt\.dot|ttng\.warp_group_dot)\b", line)]
    return [line for line in dots if "#mma" not in line]


def transposed_products(ttir: str) -> list[str]:
    """Return the transposed operands that do not come straight from memory, in Triton's first form of a kernel.

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


def _from_memory(value: str, sources: Mapping[str, tuple[str, str]]) -> bool:
    kind, operand = sources.get(value, ("", ""))
    return kind in ("tt.load", "tt.descriptor_load") or (kind == "tt.reshape" and _from_memory(operand, sources))
