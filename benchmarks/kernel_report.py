"""Report what the compiler makes of every kernel, and what follows from it; needs no GPU.

    python benchmarks/kernel_report.py --out reports/kernels

Compiles each shipped configuration of attention for its real targets, checks it against the rules below, reads its
inner loops off the machine code, counts the area that the tiles visit on six mixes of documents, and estimates times
from these. For the memory-bound kernels it reads how wide they load and store, and counts the bytes that they move.
Writes kernels.csv, areas.csv, estimates.csv, pointwise.csv, kernel_report.md and kernel_report.png. Exit status 1 where
a rule is broken. The rules of attention:

    no spilled register; shared memory within the target's limit; a matrix instruction for every matrix product; no
    transposed result of a matrix product; on sm_90 no write to a register that an unfinished matrix instruction reads,
    and in 16 bits, per step that all rows see, max(issue, MUFU) / matrix
    cycles at most 0.53 at D = 128 and 1.06 at D = 64, and no more integer compares than the loop itself needs.

The rules of the memory-bound kernels:

    no spilled register; 16 bytes a thread in every load and store of a large tensor.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported, so that kernels are compiled

import cache_sim
import mixes
import offline
import pandas as pd
import pointwise_report
import races
import tables
import triton
from cache_sim import GPUS, KERNEL_NAMES
from matplotlib import pyplot as plt
from tables import Row
from triton.backends.nvidia.compiler import get_ptxas_version

from transfusion_fast.cpus import usable_cpus
from transfusion_fast.kernels import attention_kernels, hybrid_attention
from transfusion_fast.kernels.attention_configs import ARCHITECTURES, KERNELS, Config, config, padded_head_dim

PTXAS_WITHOUT_RACE = (13, 3)
UNITS = ("matrix", "issue", "mufu")
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


def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=ALL_HEAD_DIMS, choices=ALL_HEAD_DIMS)
    parser.add_argument("--rules-only", action="store_true", help="compile and read a sample that shows broken rules")
    parser.add_argument("--jobs", type=int, default=usable_cpus(), help="compilers at once")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with get_context("fork").Pool(options.jobs) as pool:
        chosen = variants(options.archs, options.head_dims, distinct=options.rules_only)
        kernels = pool.map(partial(row_of, rules_only=options.rules_only), chosen, chunksize=1)
        chosen = pointwise_report.variants(options.archs, options.rules_only)
        pointwise = pool.map(pointwise_report.row_of, chosen, chunksize=1)
    areas, estimates = area_rows(options.archs), estimate_rows(kernels)
    files = {"kernels": kernels, "areas": areas, "estimates": estimates, "pointwise": pointwise}
    for name, rows in files.items():
        tables.write_csv(rows, options.out / f"{name}.csv")
    parts = [*markdown(kernels, areas, estimates), *pointwise_report.markdown(pointwise)]
    tables.write_markdown(options.out / "kernel_report.md", *parts)
    draw(kernels, areas, options.out / "kernel_report.png")
    broken = [row for row in (*kernels, *pointwise) if row["broken_rules"]]
    for row in broken:
        print(f"BROKEN: {row['name']}: {row['broken_rules']}", file=sys.stderr)
    return 1 if broken else 0


class Variant(NamedTuple):
    """One compilation of an attention kernel, for tiles of `height` 128 or 64."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    height: int
    heads: int = 16
    kv_heads: int = 4
    copies: bool = False  # for layouts with noised copies

    @property
    def config(self) -> Config:
        """The shipped configuration."""
        return config(self.kernel, self.arch, self.head_dim, offline.ITEMSIZE[self.dtype], self.height)

    def __str__(self) -> str:
        heads = f"H={self.heads} G={self.kv_heads}{self.suffix}"
        return f"{self.kernel} sm_{self.arch} {self.dtype} D={self.head_dim} tiles of {self.height} {heads}"

    @property
    def suffix(self) -> str:
        """The end of the name of a variant for layouts with noised copies."""
        return ", copies" if self.copies else ""


def variants(architectures: Sequence[int], head_dims: Sequence[int], distinct: bool) -> Iterator[Variant]:
    """Yield every shipped configuration, with grouped heads; dK and dV, which differ there, also without.

    At the head dimensions of `HEAD_DIMS` each is also compiled for layouts with noised copies.

    With `distinct`, targets other than sm_90 get each configuration once: on the short tiles if both heights share it,
    and with noised copies, whose code holds that of layouts without them.
    """
    for arch, kernel, head_dim in product(architectures, KERNELS, head_dims):
        everything = arch == 90 or not distinct
        layouts = ([False, True] if everything else [True]) if head_dim in HEAD_DIMS else [False]
        for height in (128, 64):
            found = Variant(kernel, arch, "bf16", head_dim, height)
            repeated = height == 128 and found._replace(height=64).config == found.config
            groups = [4, 16] if kernel == "backward_dkdv" and head_dim != 96 and everything else [4]
            if everything or not (repeated or head_dim == 96):
                for kv_heads, copies in product(groups, layouts):
                    yield found._replace(kv_heads=kv_heads, copies=copies)
        if head_dim != 96:
            # Tiles of both heights run the same configuration in fp32; short ones compare more.
            yield Variant(kernel, arch, "fp32", head_dim, 64)


def compile_variant(variant: Variant) -> offline.Compiled:
    """Compile with the options of a launch: aligned pointers and strides, everything else unknown."""
    c, dtype = variant.config, variant.dtype
    function = getattr(attention_kernels, f"hybrid_attention_{variant.kernel}_kernel")
    sizes = variant.heads, variant.kv_heads, variant.head_dim, variant.height
    constants = hybrid_attention.constants(variant.kernel, c, *sizes)
    types = dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32") | {"scale": "fp32"}
    for name in function.arg_names:
        if name.endswith("descriptor") and c.descriptors:
            rows = c.value_rows if name == "v_descriptor" else c.step
            types[name] = f"tensordesc<{dtype}[{rows}, 1, {constants['BLOCK_D']}]>"
        elif name.endswith("descriptor") or (name.startswith(("own_", "copies_")) and not variant.copies):
            constants[name] = None
        elif name.endswith(("start_ptr", "end_ptr", "tiles_ptr")):
            types[name] = "*i32"
    multiples, options = offline.known_multiples(function), hybrid_attention.compiler_options(c)
    return offline.compile_kernel(function, dtype, types, constants, multiples, options, variant.arch)


def row_of(variant: Variant, rules_only: bool = False) -> Row:
    """Compile a variant and return its row: resources, broken rules, and the costs of a step of one block.

    `full` steps have no mask, `partial` steps have one. Their columns are None where a product over the head dimension
    is a loop of its own, wide heads in fp32. With `rules_only`, loops are read on sm_90 alone, and
    spills are counted elsewhere only where the assembler reserves stack, since there are none without.
    """
    c, compiled, limit = variant.config, compile_variant(variant), offline.SHARED_LIMIT[variant.arch]
    reads_loops = not rules_only or variant.arch == 90
    stack_bytes = offline.parse_resources(compiled.usage, [])["stack_bytes"]
    instructions = compiled.instructions if reads_loops or stack_bytes else []
    row = {
        "name": str(variant), "kernel": variant.kernel, "arch": variant.arch, "dtype": variant.dtype,
        "head_dim": variant.head_dim, "height": variant.height,
        "heads": f"{variant.heads}/{variant.kv_heads}{variant.suffix}",
        "block": c.block, "step": c.step, "partial_step": c.partial_step, "warps": c.warps, "stages": c.stages,
        "descriptors": c.descriptors, **compiled.columns(instructions),
    }  # fmt: skip
    # A multiprocessor has 65,536 registers, given out to warps by 256; each block takes 1 KiB of shared memory more.
    by_registers = 65536 // (-(-row["registers"] * 32 // 256) * 256 * c.warps)
    by_memory = (limit + 1024) // (compiled.shared_bytes + 1024)
    row["blocks_per_multiprocessor"] = min(by_registers, by_memory, 2048 // (32 * c.warps))
    row["broken_rules"] = ""
    row |= _loop_columns(variant, instructions if reads_loops and c.chunk is None else [])
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
    if variant.arch == 90:
        row |= races.columns(instructions)
        if row["races"]:
            broken.append(f"{row['races']} matrix instructions whose registers are written too early")
    return row | {"broken_rules": "; ".join(broken)}


def _loop_columns(variant: Variant, instructions: Sequence[offline.Instruction]) -> Row:
    """Return the columns of the loops of full and of partial steps, None for no instructions."""
    if not instructions:
        return dict.fromkeys([f"full_{name}" for name in FULL] + [f"partial_{name}" for name in PARTIAL])
    c, found = variant.config, offline.matrix_loops(instructions)
    assert len(found) == 2, f"{variant} must have a loop of full and one of partial steps, got {len(found)}"
    # The mask's compares tell them apart, in either order.
    full, partial = sorted(found, key=lambda loop: sum(i.root == "ISETP" for i in loop) / len(loop))
    flops = PRODUCTS[variant.kernel] * 2 * c.block * padded_head_dim(variant.head_dim)
    if variant.dtype == "fp32":
        # Three products of TF32 for one of fp32; on sm_100 at half the 16-bit rate, which tcgen05 opcodes do not tell.
        flops *= 6 if variant.arch == 100 else 3
    cost = offline.cost(full, flops * c.step, c.warps, variant.arch)
    cost |= {name: round(cost[name], 3) for name in ("ratio", "serial_bound", "overlapped_bound")}
    cost |= {"exponentials_in_flight": offline.exponentials_in_flight(full), "order": offline.order(full)}
    partial_cost = offline.cost(partial, flops * c.partial_step, c.warps, variant.arch)
    return {f"full_{name}": cost[name] for name in FULL} | {f"partial_{n}": partial_cost[n] for n in PARTIAL}


def area_rows(architectures: Sequence[int]) -> list[Row]:
    """Return the pairs that the tiles of each kernel visit for one head in bf16, on every mix."""
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


def estimate_rows(compiled: Sequence[Row]) -> list[Row]:
    """Return estimated times for every GPU whose kernels were compiled: 16 query and 4 key/value heads in bf16."""
    chosen = [row for row in compiled if (row["dtype"], row["heads"]) == ("bf16", "16/4") and row["full_order"]]
    known = {(row["kernel"], row["arch"], row["head_dim"], row["height"]): row for row in chosen}
    found = []
    for gpu, kernel, head_dim in product(GPUS, KERNELS, HEAD_DIMS):
        heights = [known.get((kernel, GPUS[gpu].arch, head_dim, height)) for height in (128, 64)]
        if None not in heights:
            found += [_estimate(gpu, kernel, head_dim, mix, heights) for mix in mixes.NAMES]
    return found


def _estimate(gpu: str, kernel: str, head_dim: int, mix: str, heights: Sequence[Row]) -> Row:
    layout = mixes.sample(mix, mixes.FIXED_LENGTH)
    arch, multiprocessors, clock_ghz, bandwidth_gbs, _ = GPUS[gpu]
    T, H, G = layout.total_length, 16, 4
    best = worst = loaded = 0.0
    work = layout.tile_work(kernel, head_dim=head_dim, arch=arch)
    for (_, programs, *columns), row in zip(work, heights, strict=True):
        for loop, count, step in zip(("full", "partial"), columns, (row["step"], row["partial_step"]), strict=True):
            matrix, issue, mufu = (row[f"{loop}_{unit}_cycles"] for unit in ("matrix", "issue", "mufu"))
            best += H * count / step * max(matrix, issue, mufu)
            worst += H * count / step * (matrix + max(issue, mufu))
            loaded += H * count * 2 * head_dim * 2
        # dK and dV visit their queries once for every query head of a group, but load their own tile once.
        loaded += programs * row["block"] * (G if kernel == "backward_dkdv" else H) * 2 * head_dim * 2
    flops = 2 * PRODUCTS[kernel] * H * head_dim * layout.area
    least = cache_sim.least_bytes(kernel, T, H, G, head_dim)
    memory_us = least / bandwidth_gbs / 1e3
    best_us, worst_us = (max(cycles / multiprocessors / clock_ghz / 1e3, memory_us) for cycles in (best, worst))
    cached = cache_sim.simulate(layout, heights, GPUS[gpu], H, G)
    figures = {
        "estimated_us_best": best_us, "estimated_us_worst": worst_us,
        **{f"estimated_visible_tflops_{n}": flops / us / 1e6 for n, us in (("best", best_us), ("worst", worst_us))},
        "memory_us": memory_us, "least_mib": least / 2**20, "loaded_mib": loaded / 2**20,
        "loaded_by_least": loaded / least, "estimated_cached_mib": cached.moved_mib,
        "estimated_cached_us": cached.memory_us, "estimated_bound_us": cached.bound_us,
    }  # fmt: skip
    row = {"gpu": gpu, "kernel": kernel, "mix": mix, "T": T, "heads": f"{H}/{G}", "head_dim": head_dim}
    return row | {"dtype": "bf16"} | {column: round(value, 1) for column, value in figures.items()}


def markdown(kernels: Sequence[Row], areas: Sequence[Row], estimates: Sequence[Row]) -> list[str]:
    """Return the sections on attention. Everything in them is computed: nothing ran on a GPU."""
    titled = [[row | {"title": KERNEL_NAMES[row["kernel"]]} for row in rows] for rows in (kernels, estimates)]
    kernels, estimates = titled
    hopper = [row for row in kernels if row["arch"] == 90 and row["dtype"] == "bf16"]
    return [
        "# Kernel report",
        f"Compiled offline with triton {triton.__version__}; nothing here ran on a GPU.",
        *(_assembler(arch) for arch in sorted({row["arch"] for row in kernels})),
        "## Rules",
        tables.list_broken(kernels),
        "## Resources",
        tables.markdown_table(kernels, _RESOURCES),
        "What was tried, and what it changed: docs/kernels.md.",
        *races.section(hopper),
        "## Inner loops on sm_90, bf16",
        _LOOPS_LEGEND,
        tables.markdown_table(hopper, _LOOPS),
        "## Visited area",
        _AREAS_LEGEND,
        _area_table(areas),
        "## Estimated times",
        _ESTIMATES_LEGEND,
        tables.markdown_table(estimates, _ESTIMATES),
    ]


_RESOURCES = {
    "target": "sm_{arch}", "kernel": "{title}", "type": "{dtype}", "D": "{head_dim}", "tiles": "{height}",
    "H/G": "{heads}", "rows x full / partial step": "{block} x {step} / {partial_step}", "warps": "{warps}",
    "stages": "{stages}", "registers": "{registers}", "spills": "{spills}", "shared KiB": "{shared_kib}",
    "blocks": "{blocks_per_multiprocessor}",
}  # fmt: skip
_LOOPS = {
    "kernel": "{title}", "D": "{head_dim}", "tiles": "{height}", "H/G": "{heads}",
    "instructions": "{full_instructions}", "compares": "{full_compares}",
    "matrix / issue / MUFU cycles": " / ".join(f"{{full_{unit}_cycles:.0f}}" for unit in UNITS),
    "ratio": "{full_ratio}", "serial bound": "{full_serial_bound:.1%}",
    "in flight": "{full_exponentials_in_flight} of {full_exponentials}", "order": "`{full_order}`",
}  # fmt: skip
_ESTIMATES = {
    "estimate for": "{gpu}", "kernel": "{title}", "mix": "{mix}", "D": "{head_dim}",
    "us, best to worst": "{estimated_us_best} to {estimated_us_worst}",
    "visible TFLOP/s": "{estimated_visible_tflops_best} to {estimated_visible_tflops_worst}",
    "memory alone us: each byte once / simulated cache": "{memory_us} / {estimated_cached_us}",
    "bound us with the cache": "{estimated_bound_us}", "loaded / least bytes": "{loaded_by_least}",
}  # fmt: skip
_LOOPS_LEGEND = """\
Cycles are per step of one block on one multiprocessor. Serial bound: the share of the matrix units' peak that one block
reaches if nothing overlaps. In flight: exponentials issued while a matrix instruction runs. Order: H matrix
instruction, E exponential, W wait for matrix instructions, B barrier."""
_ESTIMATES_LEGEND = """\
An estimate, not a measurement: a roofline from the machine code and the tables of tiles. A step costs its cycles as
read off the machine code: at worst matrix + max(issue, MUFU) (nothing overlaps), at best the largest of the three.
Multiprocessors are taken to share the work evenly, at the clock of the published peak, and memory to move each byte
once, that of padding too, at its published rate. The bound with the cache takes neither: it simulates the launch order
against the L2 cache, at 0.9 of that rate (benchmarks/cache_sim.py). There nothing overlaps within a block, but blocks
on one multiprocessor share its units. Left out: what programs do before their first step, latencies and bank conflicts.
Measured kernels of this kind reach about two thirds of the worst case's rate."""
_AREAS_LEGEND = """\
Pairs that the kernels visit, divided by the pairs that FlexAttention's 128 x 128 blocks visit, on six mixes of 16,384
positions, in bf16. The first line is the least possible."""


def _assembler(arch: int) -> str:
    """Return the version of the assembler: TRITON_PTXAS_PATH, or the one in Triton's wheel."""
    major, minor = map(int, re.findall(r"release (\d+)\.(\d+)", get_ptxas_version(arch))[0])
    if arch != 90 or (major, minor) >= PTXAS_WITHOUT_RACE:
        return f"sm_{arch}: ptxas {major}.{minor}."
    return (
        f"sm_{arch}: ptxas {major}.{minor}. WARNING: before 13.3 it may misorder matrix instructions whose left "
        "operand is in registers; name a newer one in TRITON_PTXAS_PATH and run `make test-gpu`."
    )


def _area_table(areas: Sequence[Row]) -> str:
    """Return a line for each kernel, target and head dimension, with a column for each mix."""
    frame = pd.DataFrame(areas)
    visible = (frame.visible / frame.flex_visited).map("{:.3f}".format).groupby(frame.mix).first()
    lines = frame.pivot_table("visited_by_flex", ["arch", "head_dim", "direction"], "mix", sort=False).reset_index()
    lines["direction"], lines["arch"] = lines.direction.map(KERNEL_NAMES), "sm_" + lines.arch.astype(str)
    first = {"direction": "visible", "arch": "", "head_dim": "", **visible}
    columns = {"": "{direction}", "target": "{arch}", "D": "{head_dim}", **{mix: f"{{{mix}}}" for mix in mixes.NAMES}}
    return tables.markdown_table([first, *lines.to_dict("records")], columns)


def draw(kernels: Sequence[Row], areas: Sequence[Row], path: Path) -> None:
    """Draw the cycles of a full step by unit, and the visited area against FlexAttention's."""
    arch = 90 if any(row["arch"] == 90 for row in kernels) else kernels[0]["arch"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
    of_arch = [row for row in kernels if (row["arch"], row["dtype"], row["heads"]) == (arch, "bf16", "16/4")]
    chosen = [row for row in of_arch if row["full_order"] and row["head_dim"] in HEAD_DIMS]
    labels = [f"{KERNEL_NAMES[r['kernel']]}\nD {r['head_dim']}\ntiles {r['height']}" for r in chosen]
    shares = [[row[f"full_{unit}_cycles"] / row["full_matrix_cycles"] for unit in UNITS] for row in chosen]
    bars = {"kind": "bar", "width": 0.85, "rot": 0, "xlabel": ""}
    if chosen:
        frame = pd.DataFrame(shares, [label.replace(" and ", "\n") for label in labels], UNITS)
        frame.plot(ax=left, fontsize=7, ylim=(0, 1.25), **bars)
    left.set_ylabel("cycles of a full step by cycles of its matrix products")
    left.set_title(f"Inner loops on sm_{arch}, bf16, read off the machine code")
    frame = pd.DataFrame([a for a in areas if (a["arch"], a["head_dim"]) == (arch, 128)])
    ratios = frame.pivot_table("visited_by_flex", "mix", "direction", sort=False)[["forward", "backward"]]
    ratios.insert(0, "visible", (frame.visible / frame.flex_visited).groupby(frame.mix).first())
    ratios.plot(ax=right, ylabel="pairs by pairs of FlexAttention's 128 x 128 blocks", **bars)
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set_title(f"Visited area on sm_{arch}, D 128, 16,384 positions")
    tables.save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
