"""One compiled configuration of a kernel as a row: resources, inner loops, broken rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import offline
import sass

from transfusion_fast.kernels.attention_configs import padded_head_dim

# Matrix products of a step, each of 2 * rows * columns * D FLOPs.
PRODUCTS = {"forward": 2, "backward_dq": 3, "backward_dkdv": 4}

# Per step that all rows see, max(issue, MUFU) / matrix cycles on sm_90 in 16 bits: above 1 the matrix units wait.
MOST_CYCLES = {128: 0.53, 64: 1.06}

# Compares of the loop itself: its end, and the turns of its ring buffers and barriers. A mask has one a value at least,
# so 32 of them for the narrowest step.
MOST_COMPARES = 12


@dataclass(frozen=True)
class Row:
    """Numbers of the loops are per step of one block; `whole` steps have no mask, `edge` steps have one.

    They are None where a product over the head dimension is a loop of its own, wide heads in fp32, and where they were
    not read; then `spills` is not counted either, but spilled registers take `stack_bytes`.
    """

    name: str
    kernel: str
    arch: int
    dtype: str
    head_dim: int
    height: int
    heads: str
    block: int
    step: int
    edge_step: int
    warps: int
    stages: int
    descriptors: bool
    registers: int
    spills: int
    stack_bytes: int
    shared_kib: float
    blocks_per_multiprocessor: int
    broken_rules: str
    whole_instructions: int | None = None
    whole_compares: int | None = None
    whole_matrix_cycles: float | None = None
    whole_issue_cycles: float | None = None
    whole_mufu_cycles: float | None = None
    whole_ratio: float | None = None
    whole_serial_bound: float | None = None
    whole_overlapped_bound: float | None = None
    whole_exponentials: int | None = None
    whole_exponentials_in_flight: int | None = None
    whole_order: str | None = None
    edge_instructions: int | None = None
    edge_compares: int | None = None
    edge_matrix_cycles: float | None = None
    edge_issue_cycles: float | None = None
    edge_mufu_cycles: float | None = None


def row_of(variant: offline.Variant, rules_only: bool = False) -> Row:
    """Compiles a variant and reads it; with `rules_only`, its loops only where a rule is about them."""
    c = variant.config
    compiled = offline.compile_variant(variant)
    instructions = [] if rules_only and variant.arch != 90 else sass.disassemble(compiled.cubin)
    resources = sass.resources(compiled.cubin, instructions)
    loops = _loops(variant, sass.matrix_loops(instructions)) if instructions else None
    limit = offline.SHARED_LIMIT[variant.arch]
    return Row(
        name=str(variant),
        kernel=variant.kernel,
        arch=variant.arch,
        dtype=variant.dtype,
        head_dim=variant.head_dim,
        height=variant.height,
        heads=f"{variant.heads}/{variant.kv_heads}",
        block=c.block,
        step=c.step,
        edge_step=c.partial_step,
        warps=c.warps,
        stages=c.stages,
        descriptors=c.descriptors,
        registers=resources.registers,
        spills=resources.spills,
        stack_bytes=resources.stack_bytes,
        shared_kib=round(compiled.shared_bytes / 1024, 1),
        blocks_per_multiprocessor=_resident_blocks(resources.registers, compiled.shared_bytes, c.warps, limit),
        broken_rules="; ".join(_broken_rules(variant, compiled, resources, loops)),
        **({} if loops is None else _loop_fields(loops)),
    )


@dataclass(frozen=True)
class _Loops:
    """The loop of whole steps and the loop of the edge."""

    whole: sass.Loop
    whole_mix: sass.Mix
    whole_cycles: sass.Cycles
    edge_mix: sass.Mix
    edge_cycles: sass.Cycles


def _loops(variant: offline.Variant, found: list[sass.Loop]) -> _Loops | None:
    """None where products over the head dimension are loops of their own."""
    c = variant.config
    if c.chunk is not None:
        return None
    assert len(found) == 2, f"{variant} must have a loop of whole steps and one of the edge, got {len(found)}"
    # The mask's compares tell them apart, in whichever order they lie.
    whole, edge = sorted(found, key=lambda loop: sass.count(loop).integer_compare / len(loop.instructions))
    whole_mix, edge_mix = sass.count(whole), sass.count(edge)
    cycles = (_cycles(variant, mix, columns) for mix, columns in ((whole_mix, c.step), (edge_mix, c.partial_step)))
    whole_cycles, edge_cycles = cycles
    return _Loops(whole, whole_mix, whole_cycles, edge_mix, edge_cycles)


def _loop_fields(loops: _Loops) -> dict[str, Any]:
    whole, edge = loops.whole_cycles, loops.edge_cycles
    return {
        "whole_instructions": loops.whole_mix.total,
        "whole_compares": loops.whole_mix.integer_compare,
        "whole_matrix_cycles": whole.matrix,
        "whole_issue_cycles": whole.issue,
        "whole_mufu_cycles": whole.mufu,
        "whole_ratio": round(whole.ratio, 3),
        "whole_serial_bound": round(whole.serial_bound, 3),
        "whole_overlapped_bound": round(whole.overlapped_bound, 3),
        "whole_exponentials": loops.whole_mix.mufu,
        "whole_exponentials_in_flight": sass.exponentials_in_flight(loops.whole.instructions),
        "whole_order": sass.order(loops.whole.instructions),
        "edge_instructions": loops.edge_mix.total,
        "edge_compares": loops.edge_mix.integer_compare,
        "edge_matrix_cycles": edge.matrix,
        "edge_issue_cycles": edge.issue,
        "edge_mufu_cycles": edge.mufu,
    }


def _cycles(variant: offline.Variant, mix: sass.Mix, columns: int) -> sass.Cycles:
    c = variant.config
    width = padded_head_dim(variant.head_dim)
    flops = PRODUCTS[variant.kernel] * 2 * c.block * columns * width
    if variant.dtype == "fp32":
        flops *= 3  # products of TF32 for one of fp32
        if variant.arch == 100:
            flops *= 2  # whose rate is half the 16-bit one, which tcgen05 opcodes do not tell
    return sass.cycles(mix, flops, c.warps, variant.arch)


def _resident_blocks(registers: int, shared_bytes: int, warps: int, limit: int) -> int:
    """Blocks that fit on a multiprocessor: 65,536 registers, given out to warps by 256; each takes 1 KiB more."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, (limit + 1024) // (shared_bytes + 1024), 2048 // (32 * warps))


def _broken_rules(
    variant: offline.Variant,
    compiled: offline.Compiled,
    resources: sass.Resources,
    loops: _Loops | None,
) -> list[str]:
    limit = offline.SHARED_LIMIT[variant.arch]
    broken = []
    if resources.spills or resources.stack_bytes:
        broken.append(f"{resources.spills} spills, {resources.stack_bytes} bytes of stack")
    if compiled.shared_bytes > limit:
        broken.append(f"{compiled.shared_bytes} bytes of shared memory, of {limit}")
    if products := offline.products_without_matrix_unit(compiled.ttgir):
        broken.append(f"{len(products)} products without matrix instructions")
    if transposed := offline.transposed_products(compiled.ttir):
        broken.append(f"transposed: {transposed}")
    if loops is not None and variant.arch == 90 and variant.dtype != "fp32":
        if loops.whole_mix.integer_compare > MOST_COMPARES:
            broken.append(f"{loops.whole_mix.integer_compare} integer compares in whole steps")
        most = MOST_CYCLES.get(variant.head_dim)
        if variant.kernel == "forward" and most and loops.whole_cycles.ratio > most:
            broken.append(f"max(issue, MUFU) / matrix = {loops.whole_cycles.ratio:.3f}, above {most}")
    return broken
