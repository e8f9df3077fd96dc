"""What the compiler makes of every kernel, and what follows from it; needs no GPU.

    python benchmarks/kernel_report.py --out reports/kernels

Compiles each shipped configuration of attention for its real targets, checks it against the rules below, reads its
inner loops off the machine code, counts the area that the tiles visit on six mixes of documents, and estimates times
from these. Of the memory-bound kernels it reads how wide they load and store, and counts the bytes that they move.
Writes kernels.csv, areas.csv, estimates.csv, pointwise.csv, kernel_report.md and kernel_report.png, and exits with 1
if a rule is broken. Of attention:

    no spilled register; shared memory within the target's limit; a matrix instruction for every matrix product; no
    transposed result of a matrix product; on sm_90 in 16 bits, per step that all rows see, max(issue, MUFU) / matrix
    cycles at most 0.53 at D = 128 and 1.06 at D = 64, and no more integer compares than the loop itself needs.

Of the memory-bound kernels:

    no spilled register; no stack; 16 bytes a thread in every load and store of a large tensor.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# Before triton is imported: kernels are compiled here, whatever the shell says.
os.environ["TRITON_INTERPRET"] = "0"

import kernel_areas
import kernel_estimates
import kernel_rows
import kernel_summary
import measure
import pointwise_rows
import pointwise_summary
from offline import Variant

from transfusion_fast.kernels.attention_configs import ARCHITECTURES, KERNELS

WIDTHS = (32, 64, 128, 256)  # each has configurations of its own; 96 runs as 128


def variants(architectures: Sequence[int]) -> Iterator[Variant]:
    """Every shipped configuration, with grouped heads; dK and dV, which differ there, also without."""
    for arch in architectures:
        for kernel in KERNELS:
            for head_dim in (*WIDTHS, 96):
                for height in (128, 64):
                    yield Variant(kernel, arch, "bf16", head_dim, height)
                    if kernel == "backward_dkdv" and head_dim != 96:
                        yield Variant(kernel, arch, "bf16", head_dim, height, kv_heads=16)
                if head_dim != 96:
                    # Tiles of both heights run the same configuration in fp32; short ones compare more.
                    yield Variant(kernel, arch, "fp32", head_dim, 64)


def distinct(found: Iterable[Variant]) -> Iterator[Variant]:
    """Everything on sm_90; elsewhere each configuration once, on the short tiles if both heights have it."""
    for variant in found:
        repeated = variant.height == 128 and replace(variant, height=64).config == variant.config
        if variant.arch == 90 or not (repeated or variant.head_dim == 96 or variant.kv_heads == variant.heads):
            yield variant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--rules-only", action="store_true", help="compile and read no more than the rules need")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    chosen = variants(arguments.archs)
    with get_context("fork").Pool(arguments.jobs) as pool:
        row_of = partial(kernel_rows.row_of, rules_only=arguments.rules_only)
        rows = list(pool.imap(row_of, distinct(chosen) if arguments.rules_only else chosen))
        memory_bound = pointwise_rows.variants(arguments.archs, arguments.rules_only)
        pointwise = list(pool.imap(pointwise_rows.row_of, memory_bound))
    measure.write_csv(rows, arguments.out / "kernels.csv")
    areas = kernel_areas.rows(arguments.archs)
    measure.write_csv(areas, arguments.out / "areas.csv")
    estimates = kernel_estimates.rows(rows)
    measure.write_csv(estimates, arguments.out / "estimates.csv")
    if pointwise:
        measure.write_csv(pointwise, arguments.out / "pointwise.csv")
    summary = kernel_summary.text(rows, areas, estimates) + "\n" + pointwise_summary.text(pointwise)
    (arguments.out / "kernel_report.md").write_text(summary, encoding="utf-8")
    kernel_summary.plot(rows, areas, arguments.out / "kernel_report.png")
    print(summary)
    broken = [row for row in (*rows, *pointwise) if row.broken_rules]
    for row in broken:
        print(f"BROKEN: {row.name}: {row.broken_rules}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
