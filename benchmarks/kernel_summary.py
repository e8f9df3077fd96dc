"""The kernel report as text for people and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import kernel_areas
import kernel_estimates
import kernel_rows
import matplotlib
import mixes
import offline
import triton

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PTXAS_WITHOUT_RACE = (13, 3)
KERNEL_NAMES = {"forward": "forward", "backward_dq": "dQ", "backward_dkdv": "dK and dV", "backward": "backward"}


def text(
    rows: Sequence[kernel_rows.Row],
    areas: Sequence[kernel_areas.Row],
    estimates: Sequence[kernel_estimates.Row],
) -> str:
    """Markdown. Everything in it is computed: nothing ran on a GPU."""
    broken = [f"- {row.name}: {row.broken_rules}" for row in rows if row.broken_rules]
    parts = [
        "# Kernel report",
        f"Compiled offline with triton {triton.__version__}; nothing here ran on a GPU.",
        *_assemblers(sorted({row.arch for row in rows})),
        f"## Rules\n\n{len(rows)} configurations compiled, {len(broken)} break a rule.\n" + "\n".join(broken),
        "## Resources\n\n" + _resources(rows),
        "What was tried, and what it changed: docs/kernels.md.",
        "## Inner loops on sm_90, bf16\n\n" + _LOOPS_LEGEND + "\n\n" + _loops(rows),
        "## Visited area\n\n" + _AREAS_LEGEND + "\n\n" + _areas(areas),
        "## Estimated times\n\n" + (kernel_estimates.__doc__ or "").strip() + "\n\n" + _estimates(estimates),
    ]
    return "\n\n".join(parts) + "\n"


_LOOPS_LEGEND = """Cycles are per step of one block on one multiprocessor. Serial bound: share of the matrix units' peak
that one block reaches if nothing overlaps. In flight: exponentials issued while a matrix instruction runs. Order: H
matrix instruction, E exponential, W wait for matrix instructions, B barrier."""
_AREAS_LEGEND = """Pairs that the kernels visit by pairs that FlexAttention's 128 x 128 blocks visit, on six mixes of
16,384 positions, in bf16. The first line is the least possible."""


def _assemblers(architectures: Iterable[int]) -> list[str]:
    lines = []
    for arch in architectures:
        version = offline.ptxas_version(arch)
        line = f"sm_{arch}: ptxas {version[0]}.{version[1]}."
        if arch == 90 and version < PTXAS_WITHOUT_RACE:
            line += (
                " WARNING: before 13.3 it may misorder matrix instructions whose left operand is in registers;"
                " name a newer one in TRITON_PTXAS_PATH and run `make test-gpu`."
            )
        lines.append(line)
    return lines


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    body = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |", *body])


def _shape(row: kernel_rows.Row) -> str:
    return f"{row.block} x {row.step} / {row.edge_step}"


def _resources(rows: Sequence[kernel_rows.Row]) -> str:
    head = ("target", "kernel", "type", "D", "tiles", "H/G", "rows x step / edge", "warps", "stages", "registers",
            "spills", "shared KiB", "blocks")  # fmt: skip
    return table(
        head,
        (
            (f"sm_{r.arch}", KERNEL_NAMES[r.kernel], r.dtype, r.head_dim, r.height, r.heads, _shape(r), r.warps,
             r.stages, r.registers, r.spills, r.shared_kib, r.blocks_per_multiprocessor)
            for r in rows
        ),
    )  # fmt: skip


def _loops(rows: Sequence[kernel_rows.Row]) -> str:
    head = ("kernel", "D", "tiles", "H/G", "instructions", "compares", "matrix / issue / MUFU cycles", "ratio",
            "serial bound", "in flight", "order")  # fmt: skip
    return table(
        head,
        (
            (KERNEL_NAMES[r.kernel], r.head_dim, r.height, r.heads, r.whole_instructions, r.whole_compares,
             f"{r.whole_matrix_cycles:.0f} / {r.whole_issue_cycles:.0f} / {r.whole_mufu_cycles:.0f}", r.whole_ratio,
             f"{r.whole_serial_bound:.1%}", f"{r.whole_exponentials_in_flight} of {r.whole_exponentials}",
             f"`{r.whole_order}`")
            for r in rows
            if r.arch == 90 and r.dtype == "bf16"
        ),
    )  # fmt: skip


def _areas(areas: Sequence[kernel_areas.Row]) -> str:
    groups = dict.fromkeys((a.arch, a.head_dim, a.direction) for a in areas)
    ratio = {(a.arch, a.head_dim, a.direction, a.mix): a.visited_by_flex for a in areas}
    least = {a.mix: a.visible / a.flex_visited for a in areas}
    lines: list[Sequence[object]] = [("visible", "", "", *(f"{least[mix]:.3f}" for mix in mixes.NAMES))]
    lines += [
        (
            KERNEL_NAMES[direction],
            f"sm_{arch}",
            head_dim,
            *(ratio[arch, head_dim, direction, mix] for mix in mixes.NAMES),
        )
        for arch, head_dim, direction in groups
    ]
    return table(("", "target", "D", *mixes.NAMES), lines)


def _estimates(estimates: Sequence[kernel_estimates.Row]) -> str:
    head = ("estimate for", "kernel", "mix", "D", "us, best to worst", "visible TFLOP/s", "memory alone us",
            "loaded / least bytes")  # fmt: skip
    return table(
        head,
        (
            (e.gpu, KERNEL_NAMES[e.kernel], e.mix, e.head_dim, f"{e.estimated_us_best} to {e.estimated_us_worst}",
             f"{e.estimated_visible_tflops_best} to {e.estimated_visible_tflops_worst}", e.memory_us, e.loaded_by_least)
            for e in estimates
        ),
    )  # fmt: skip


def plot(rows: Sequence[kernel_rows.Row], areas: Sequence[kernel_areas.Row], path: Path) -> None:
    """Left: cycles of a whole step by unit. Right: visited area against FlexAttention's."""
    arch = 90 if any(row.arch == 90 for row in rows) else rows[0].arch
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
    chosen = [r for r in rows if r.arch == arch and r.dtype == "bf16" and r.head_dim in (64, 128) and r.heads == "16/4"]
    labels = [f"{KERNEL_NAMES[r.kernel]}\nD {r.head_dim}\ntiles {r.height}" for r in chosen]
    for offset, unit in enumerate(("matrix", "issue", "mufu")):
        shares = [getattr(r, f"whole_{unit}_cycles") / r.whole_matrix_cycles for r in chosen]
        left.bar([i + (offset - 1) * 0.27 for i in range(len(chosen))], shares, 0.27, label=unit)
    left.set_xticks(range(len(chosen)), [label.replace(" and ", "\n") for label in labels], fontsize=7)
    left.set_ylabel("cycles of a whole step by cycles of its matrix products")
    left.set_title(f"Inner loops on sm_{arch}, bf16, read off the machine code")
    left.legend(loc="upper center", ncols=3)
    left.set_ylim(top=1.25)

    bars = ("visible", "forward", "backward")
    mine = [a for a in areas if a.arch == arch and a.head_dim == 128]
    for offset, name in enumerate(bars):
        by_mix = {a.mix: a for a in mine if a.direction == ("forward" if name == "visible" else name)}
        values = [
            by_mix[mix].visible / by_mix[mix].flex_visited if name == "visible" else by_mix[mix].visited_by_flex
            for mix in mixes.NAMES
        ]
        right.bar([i + (offset - 1) * 0.27 for i in range(len(mixes.NAMES))], values, 0.27, label=name)
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set_xticks(range(len(mixes.NAMES)), mixes.NAMES)
    right.set_ylabel("pairs by pairs of FlexAttention's 128 x 128 blocks")
    right.set_title(f"Visited area on sm_{arch}, D 128, 16,384 positions")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
