"""Attention in the kernel report: compiled configurations, visited areas, and estimated times."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import mixes
import offline
import sass
from tables import Row

from transfusion_fast.kernels import attention_kernels, hybrid_attention
from transfusion_fast.kernels.attention_configs import KERNELS, Config, config, padded_head_dim
from transfusion_fast.kernels.work import tile_work

ALL_HEAD_DIMS = (32, 64, 128, 256, 96)  # 96 runs with the configurations of 128
HEAD_DIMS = (64, 128)  # of areas and estimates
# Matrix products of a step, each of 2 * rows * columns * D FLOPs.
PRODUCTS = {"forward": 2, "backward_dq": 3, "backward_dkdv": 4}
# Per full block, max(issue, MUFU) / matrix cycles on sm_90 in 16 bits: above 1 the matrix units wait.
MOST_CYCLES = {128: 0.53, 64: 1.06}
# Columns of a loop.
PARTIAL = ("instructions", "compares", "matrix_cycles", "issue_cycles", "mufu_cycles")
FULL = (*PARTIAL, "ratio", "serial_bound", "overlapped_bound", "exponentials", "exponentials_in_flight", "order")
# Compares of the loop itself: its end, and the state of its ring buffers and barriers. A mask has at least one compare
# per value, so 32 for the narrowest step.
MOST_COMPARES = 12


# Published figures: architecture, multiprocessors, boost clock of the published dense peak in GHz, memory GB/s.
GPUS = {
    "A100 80GB": (80, 108, 1.41, 2039),
    "H100 SXM": (90, 132, 1.83, 3350),
    "H200": (90, 132, 1.83, 4800),
    "B200": (100, 148, 1.85, 8000),
}


@dataclass(frozen=True)
class Variant:
    """One compilation of an attention kernel, for tiles of `height` 128 or 64."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    height: int
    heads: int = 16
    kv_heads: int = 4

    @property
    def config(self) -> Config:
        """The shipped configuration."""
        return config(self.kernel, self.arch, self.head_dim, offline.ITEMSIZE[self.dtype], self.height)

    def __str__(self) -> str:
        heads = f"H={self.heads} G={self.kv_heads}"
        return f"{self.kernel} sm_{self.arch} {self.dtype} D={self.head_dim} tiles of {self.height} {heads}"


def variants(architectures: Sequence[int], head_dims: Sequence[int], distinct: bool) -> Iterator[Variant]:
    """Yield every shipped configuration, with grouped heads; dK and dV, which differ there, also without.

    With `distinct`, targets other than sm_90 get each configuration once, on the short tiles if both heights share it.
    """
    for arch, kernel, head_dim in product(architectures, KERNELS, head_dims):
        everything = arch == 90 or not distinct
        for height in (128, 64):
            found = Variant(kernel, arch, "bf16", head_dim, height)
            repeated = height == 128 and replace(found, height=64).config == found.config
            if everything or not (repeated or head_dim == 96):
                yield found
            if kernel == "backward_dkdv" and head_dim != 96 and everything:
                yield replace(found, kv_heads=16)
        if head_dim != 96:
            # Tiles of both heights run the same configuration in fp32; short ones compare more.
            yield Variant(kernel, arch, "fp32", head_dim, 64)


def compile_variant(variant: Variant) -> offline.Compiled:
    """Compile with the options of a launch: aligned pointers and strides, everything else unknown."""
    c = variant.config
    function = getattr(attention_kernels, f"hybrid_attention_{variant.kernel}_kernel")
    sizes = variant.heads, variant.kv_heads, variant.head_dim, variant.height
    values = hybrid_attention.constants(variant.kernel, c, *sizes)
    types = {n: _type_of(n, variant, values["BLOCK_D"]) for n in function.arg_names if n not in values}
    values |= {name: None for name, kind in types.items() if kind is None}
    aligned = {name for name in types if name.endswith("_ptr") or name.startswith("stride")}
    return offline.compile_kernel(function, types, values, aligned, hybrid_attention.compiler_options(c), variant.arch)


def _type_of(name: str, variant: Variant, width: int) -> str | None:
    """Return Triton's name of an argument's type, or None for a descriptor that the configuration does not use."""
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


def row_of(variant: Variant, rules_only: bool = False) -> Row:
    """Compile a variant and return its row: resources, broken rules, and the costs of a step of one block.

    `full` steps have no mask, `partial` steps have one. Their columns are None where a product over the head dimension
    is a loop of its own, wide heads in fp32. With `rules_only`, loops are read on sm_90 alone; elsewhere `spills` is
    then not counted, but spilled registers still take `stack_bytes`.
    """
    c, compiled, limit = variant.config, compile_variant(variant), offline.SHARED_LIMIT[variant.arch]
    instructions = [] if rules_only and variant.arch != 90 else compiled.instructions
    row = {
        "name": str(variant), "kernel": variant.kernel, "arch": variant.arch, "dtype": variant.dtype,
        "head_dim": variant.head_dim, "height": variant.height, "heads": f"{variant.heads}/{variant.kv_heads}",
        "block": c.block, "step": c.step, "partial_step": c.partial_step, "warps": c.warps, "stages": c.stages,
        "descriptors": c.descriptors, **compiled.columns(instructions),
    }  # fmt: skip
    # A multiprocessor has 65,536 registers, given out to warps by 256; each block takes 1 KiB of shared memory more.
    by_registers = 65536 // (-(-row["registers"] * 32 // 256) * 256 * c.warps)
    by_memory = (limit + 1024) // (compiled.shared_bytes + 1024)
    row["blocks_per_multiprocessor"] = min(by_registers, by_memory, 2048 // (32 * c.warps))
    row["broken_rules"] = ""
    row |= _loop_columns(variant, instructions if c.chunk is None else [])
    broken = offline.spill_rule(row)
    if compiled.shared_bytes > limit:
        broken.append(f"{compiled.shared_bytes} bytes of shared memory, of {limit}")
    if products := offline.products_without_matrix_unit(compiled.ttgir):
        broken.append(f"{len(products)} products without matrix instructions")
    if transposed := offline.transposed_products(compiled.ttir):
        broken.append(f"transposed: {transposed}")
    if row["full_order"] and variant.arch == 90 and variant.dtype != "fp32":
        if row["full_compares"] > MOST_COMPARES:
            broken.append(f"{row['full_compares']} integer compares in full steps")
        most = MOST_CYCLES.get(variant.head_dim)
        if variant.kernel == "forward" and most and row["full_ratio"] > most:
            broken.append(f"max(issue, MUFU) / matrix = {row['full_ratio']:.3f}, above {most}")
    return row | {"broken_rules": "; ".join(broken)}


def _loop_columns(variant: Variant, instructions: Sequence[sass.Instruction]) -> Row:
    """Return the columns of the loops of full and of partial steps, None for no instructions."""
    if not instructions:
        return dict.fromkeys([f"full_{name}" for name in FULL] + [f"partial_{name}" for name in PARTIAL])
    c, found = variant.config, sass.matrix_loops(instructions)
    assert len(found) == 2, f"{variant} must have a loop of full and one of partial steps, got {len(found)}"
    # The mask's compares tell them apart, in either order.
    full, partial = sorted(found, key=lambda loop: sum(i.root == "ISETP" for i in loop) / len(loop))
    flops = PRODUCTS[variant.kernel] * 2 * c.block * padded_head_dim(variant.head_dim)
    if variant.dtype == "fp32":
        # Three products of TF32 for one of fp32; on sm_100 at half the 16-bit rate, which tcgen05 opcodes do not tell.
        flops *= 6 if variant.arch == 100 else 3
    cost = sass.cost(full, flops * c.step, c.warps, variant.arch)
    cost |= {name: round(cost[name], 3) for name in ("ratio", "serial_bound", "overlapped_bound")}
    cost |= {"exponentials_in_flight": sass.exponentials_in_flight(full), "order": sass.order(full)}
    partial_cost = sass.cost(partial, flops * c.partial_step, c.warps, variant.arch)
    return {f"full_{name}": cost[name] for name in FULL} | {f"partial_{n}": partial_cost[n] for n in PARTIAL}


def area_rows(architectures: Sequence[int]) -> list[Row]:
    """Return the pairs that the tiles of each kernel visit for one head in bf16, on every mix.

    FlexAttention visits the 128 x 128 blocks of a grid that hold a visible pair.
    """
    found = []
    for mix in mixes.NAMES:
        layout = mixes.sample(mix, mixes.FIXED_LENGTH)
        flex = mixes.flex_visited_area(layout)
        for arch, head_dim, direction in product(architectures, HEAD_DIMS, (*KERNELS, "backward")):
            visited = layout.visited_area(direction, head_dim=head_dim, arch=arch)
            found.append({
                "mix": mix, "T": layout.total_length, "arch": arch, "head_dim": head_dim, "direction": direction,
                "visible": layout.area, "flex_visited": flex, "visited": visited,
                "visited_by_visible": round(visited / layout.area, 3), "visited_by_flex": round(visited / flex, 3),
            })  # fmt: skip
    return found


ESTIMATES_LEGEND = """\
An estimate, not a measurement: a roofline from the machine code and the tables of tiles. A step costs its cycles as
read off the machine code: at worst matrix + max(issue, MUFU) (nothing overlaps), at best the largest of the three.
Multiprocessors are taken to share the work evenly, at the clock of the published peak. Left out: what a program does
before its first step, latencies, bank conflicts, and the L2 cache, whose traffic is given instead. Measured kernels of
this kind reach about two thirds of the worst case's rate."""


def estimate_rows(compiled: Sequence[Row]) -> list[Row]:
    """Return estimated times for every GPU whose kernels were compiled: 16 query and 4 key/value heads in bf16.

    Visible TFLOP/s count each visible pair once; the loaded bytes are what all programs load together, from the L2
    cache.
    """
    chosen = [row for row in compiled if (row["dtype"], row["heads"]) == ("bf16", "16/4") and row["full_order"]]
    known = {(row["kernel"], row["arch"], row["head_dim"], row["height"]): row for row in chosen}
    found = []
    for gpu, kernel, head_dim in product(GPUS, KERNELS, HEAD_DIMS):
        heights = [known.get((kernel, GPUS[gpu][0], head_dim, height)) for height in (128, 64)]
        if None not in heights:
            found += [_estimate(gpu, kernel, head_dim, mix, heights) for mix in mixes.NAMES]
    return found


def _estimate(gpu: str, kernel: str, head_dim: int, mix: str, heights: Sequence[Row]) -> Row:
    layout = mixes.sample(mix, mixes.FIXED_LENGTH)
    arch, multiprocessors, clock_ghz, bandwidth_gbs = GPUS[gpu]
    T, H, G = layout.total_length, 16, 4
    best = worst = loaded = 0.0
    for (_, programs, *columns), row in zip(
        tile_work(layout, kernel, head_dim=head_dim, arch=arch), heights, strict=True
    ):
        for loop, count, step in zip(("full", "partial"), columns, (row["step"], row["partial_step"]), strict=True):
            matrix, issue, mufu = (row[f"{loop}_{unit}_cycles"] for unit in ("matrix", "issue", "mufu"))
            best += H * count / step * max(matrix, issue, mufu)
            worst += H * count / step * (matrix + max(issue, mufu))
            loaded += H * count * 2 * head_dim * 2
        # dK and dV visit their queries once for every query head of a group, but load their own tile once.
        loaded += programs * row["block"] * (G if kernel == "backward_dkdv" else H) * 2 * head_dim * 2
    flops = 2 * PRODUCTS[kernel] * H * head_dim * layout.area
    least = _least_bytes(kernel, T, H, G, head_dim)
    memory_us = least / bandwidth_gbs / 1e3
    best_us, worst_us = (max(cycles / multiprocessors / clock_ghz / 1e3, memory_us) for cycles in (best, worst))
    figures = {
        "estimated_us_best": best_us, "estimated_us_worst": worst_us,
        "estimated_visible_tflops_best": flops / best_us / 1e6,
        "estimated_visible_tflops_worst": flops / worst_us / 1e6,
        "memory_us": memory_us, "least_mib": least / 2**20, "loaded_mib": loaded / 2**20,
        "loaded_by_least": loaded / least,
    }  # fmt: skip
    row = {"gpu": gpu, "kernel": kernel, "mix": mix, "T": T, "heads": f"{H}/{G}", "head_dim": head_dim}
    return row | {"dtype": "bf16"} | {column: round(value, 1) for column, value in figures.items()}


def _least_bytes(kernel: str, T: int, H: int, G: int, D: int) -> int:
    """Return the bytes of every tensor once, in bf16.

    q, o, do and dq are [T, H, D]; k, v, dk and dv are [T, G, D]; lse and delta are fp32 [T, H].
    """
    queries, keys, scalars = 2 * T * H * D, 2 * T * G * D, 4 * T * H
    return {
        "forward": 2 * queries + 2 * keys + scalars,
        "backward_dq": 4 * queries + 2 * keys + 2 * scalars,
        "backward_dkdv": 2 * queries + 4 * keys + 2 * scalars,
    }[kernel]
