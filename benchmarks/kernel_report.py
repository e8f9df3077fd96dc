"""Report what the compiler makes of every kernel, and what follows from it; needs no GPU.

    python benchmarks/kernel_report.py --out reports/kernels

Compiles each shipped configuration of attention for its real targets, checks it against the rules below, reads its
inner loops off the machine code, counts the area that the tiles visit on six mixes of documents, and estimates times
from these. For the memory-bound kernels it reads how wide they load and store, and counts the bytes that they move.
Writes kernels.csv, areas.csv, estimates.csv, pointwise.csv, kernel_report.md and kernel_report.png. Exit status 1 where
a rule is broken. The rules of attention:

    no spilled register; shared memory within the target's limit; a matrix instruction for every matrix product; no
    transposed result of a matrix product; on sm_90 in 16 bits, per step that all rows see, max(issue, MUFU) / matrix
    cycles at most 0.53 at D = 128 and 1.06 at D = 64, and no more integer compares than the loop itself needs.

The rules of the memory-bound kernels:

    no spilled register; no stack; 16 bytes a thread in every load and store of a large tensor.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported, so that kernels are compiled

import attention_report
import mixes
import pandas as pd
import pointwise_report
import tables
import triton
from matplotlib import pyplot as plt
from tables import Row
from triton.backends.nvidia.compiler import get_ptxas_version

from transfusion_fast.kernels.attention_configs import ARCHITECTURES

PTXAS_WITHOUT_RACE = (13, 3)
KERNEL_NAMES = {"forward": "forward", "backward_dq": "dQ", "backward_dkdv": "dK and dV", "backward": "backward"}
UNITS = ("matrix", "issue", "mufu")


def main(arguments: list[str] | None = None) -> int:
    """Write the report that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    dims = attention_report.ALL_HEAD_DIMS
    parser.add_argument("--head-dims", type=int, nargs="+", default=dims, choices=dims, help="of attention")
    parser.add_argument("--rules-only", action="store_true", help="compile and read no more than the rules need")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with get_context("fork").Pool(options.jobs) as pool:
        variants = attention_report.variants(options.archs, options.head_dims, distinct=options.rules_only)
        kernels = pool.map(partial(attention_report.row_of, rules_only=options.rules_only), variants, chunksize=1)
        names = pointwise_report.variants(options.archs, options.rules_only)
        pointwise = pool.map(pointwise_report.row_of, names, chunksize=1)
    areas, estimates = attention_report.area_rows(options.archs), attention_report.estimate_rows(kernels)
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


def markdown(kernels: Sequence[Row], areas: Sequence[Row], estimates: Sequence[Row]) -> list[str]:
    """Return the sections on attention. Everything in them is computed: nothing ran on a GPU."""
    kernels, estimates = (
        [row | {"title": KERNEL_NAMES[row["kernel"]]} for row in rows] for rows in (kernels, estimates)
    )
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
        "## Inner loops on sm_90, bf16",
        _LOOPS_LEGEND,
        tables.markdown_table(hopper, _LOOPS),
        "## Visited area",
        _AREAS_LEGEND,
        _area_table(areas),
        "## Estimated times",
        attention_report.ESTIMATES_LEGEND,
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
    "memory alone us": "{memory_us}", "loaded / least bytes": "{loaded_by_least}",
}  # fmt: skip
_LOOPS_LEGEND = """\
Cycles are per step of one block on one multiprocessor. Serial bound: the share of the matrix units' peak that one block
reaches if nothing overlaps. In flight: exponentials issued while a matrix instruction runs. Order: H matrix
instruction, E exponential, W wait for matrix instructions, B barrier."""
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
    lines: dict[tuple[object, ...], Row] = {}
    for area in areas:
        visible = lines.setdefault((), {"kernel": "visible", "target": "", "D": ""})
        visible[area["mix"]] = f"{area['visible'] / area['flex_visited']:.3f}"
        kernel, target = KERNEL_NAMES[area["direction"]], f"sm_{area['arch']}"
        line = lines.setdefault((area["arch"], area["head_dim"], kernel), {"kernel": kernel, "target": target})
        line |= {"D": area["head_dim"], area["mix"]: area["visited_by_flex"]}
    columns = {"": "{kernel}", "target": "{target}", "D": "{D}", **{mix: f"{{{mix}}}" for mix in mixes.NAMES}}
    return tables.markdown_table(lines.values(), columns)


def draw(kernels: Sequence[Row], areas: Sequence[Row], path: Path) -> None:
    """Draw the cycles of a full step by unit, and the visited area against FlexAttention's."""
    arch = 90 if any(row["arch"] == 90 for row in kernels) else kernels[0]["arch"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
    chosen = [r for r in kernels if (r["arch"], r["dtype"], r["heads"]) == (arch, "bf16", "16/4") and r["full_order"]]
    chosen = [r for r in chosen if r["head_dim"] in attention_report.HEAD_DIMS]
    labels = [f"{KERNEL_NAMES[r['kernel']]}\nD {r['head_dim']}\ntiles {r['height']}" for r in chosen]
    shares = [[r[f"full_{unit}_cycles"] / r["full_matrix_cycles"] for unit in UNITS] for r in chosen]
    tables.draw_bars(left, pd.DataFrame(shares, [label.replace(" and ", "\n") for label in labels], UNITS), fontsize=7)
    left.set(ylabel="cycles of a full step by cycles of its matrix products", ylim=(0, 1.25))
    left.set_title(f"Inner loops on sm_{arch}, bf16, read off the machine code")
    left.legend(loc="upper center", ncols=3)
    frame = pd.DataFrame([a for a in areas if (a["arch"], a["head_dim"]) == (arch, 128)])
    frame["visible"] = frame.visible / frame.flex_visited
    shares = frame.pivot_table("visited_by_flex", "mix", "direction", sort=False)[["forward", "backward"]]
    shares.insert(0, "visible", frame.groupby("mix").visible.first())
    tables.draw_bars(right, shares, legend=True)
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set_ylabel("pairs by pairs of FlexAttention's 128 x 128 blocks")
    right.set_title(f"Visited area on sm_{arch}, D 128, 16,384 positions")
    tables.save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
