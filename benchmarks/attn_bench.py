"""Times hybrid attention against what else computes it, on packs of documents as training sees them.

    python benchmarks/attn_bench.py --out DIR [--device cuda|cpu] [--mixes ...] [--lengths ...] [--backends ...]

Writes DIR/attention.csv, attention.png and attention.md. A backend is timed at a shape only after its output and
gradients were found right there. On a GPU: six mixes at 16,384 positions and two of them from 1k to 128k, for head
dimensions 128 and 64. On a CPU: a few small shapes, in one or two minutes. Exit status 1 where a backend computed
something wrong, or one of ours broke.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Before triton is imported: kernels are compiled here, whatever the shell says.
    os.environ["TRITON_INTERPRET"] = "0"

import mixes
import torch
from attn_compare import compare
from attn_plot import draw
from attn_problem import Backend, Problem
from attn_report import Row, make_rows, markdown, text_summary
from backends import BACKENDS
from measure import Effort, Machine, choose_device, describe_machine, write_csv

from transfusion_fast.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LENGTHS = (1024, 4096, 16384, 65536, 131072)


@dataclass(frozen=True)
class Shape:
    """One problem by name."""

    mix: str
    length: int
    head_dim: int


@dataclass(frozen=True)
class Plan:
    """What to measure, resolved from the command line and the device."""

    device: torch.device
    shapes: list[Shape]
    backends: list[Backend]
    heads: int
    kv_heads: int
    dtype: torch.dtype
    effort: Effort
    deadline: float


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that the command line asks for; returns the exit code."""
    options = _parse(arguments)
    try:
        plan = _resolve(options)
        options.out.mkdir(parents=True, exist_ok=True)
        machine = describe_machine(plan.device)
        rows = _run(plan, machine, options.out / "attention.csv")
        _write(rows, machine, options.out)
    except (InputError, OSError) as error:
        print(f"attn_bench: {error}", file=sys.stderr)
        return 2
    return int(any(row.failed for row in rows))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--mixes", nargs="+", metavar="MIX", help=f"of {', '.join(mixes.NAMES)}")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="positions of a pack")
    parser.add_argument("--heads", type=int, help="query heads (default: 16 on cuda, 8 on a CPU)")
    parser.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
    parser.add_argument("--head-dim", nargs="+", type=int, metavar="D", help="default: 128 and 64 on cuda, 64 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on a CPU")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help=f"of {', '.join(BACKENDS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=8, help="start nothing after this long (default: 8)")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, in seconds")
    return parser.parse_args(arguments)


def _resolve(options: argparse.Namespace) -> Plan:
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    default_heads, default_dims, default_dtype = (16, [128, 64], "bf16") if gpu else (8, [64], "fp32")
    heads = (2 if options.quick else default_heads) if options.heads is None else options.heads
    kv_heads = heads if options.kv_heads is None else options.kv_heads
    head_dims = options.head_dim or ([32] if options.quick else default_dims)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"--heads must be a multiple of --kv-heads, both at least 1, got {heads} and {kv_heads}")
    if min([*head_dims, *(options.lengths or [])], default=1) < 1:
        raise InputError(f"--head-dim and --lengths must be at least 1, got {head_dims} and {options.lengths}")
    packs = _packs(options, gpu)
    return Plan(
        device=device,
        shapes=[Shape(mix, length, head_dim) for head_dim in head_dims for mix, length in packs],
        backends=[BACKENDS[name] for name in _known("--backends", options.backends or BACKENDS, BACKENDS)],
        heads=heads,
        kv_heads=kv_heads,
        dtype=DTYPES[options.dtype or default_dtype],
        effort=Effort(2, 1) if options.quick else Effort(30, 0.25) if gpu else Effort(9, 4),
        deadline=time.monotonic() + 60 * options.minutes,
    )


def _packs(options: argparse.Namespace, gpu: bool) -> list[tuple[str, int]]:
    """The mixes and lengths asked for, or the device's own."""
    names = _known("--mixes", options.mixes or mixes.NAMES, mixes.NAMES)
    if options.mixes or options.lengths:
        lengths = options.lengths or [mixes.FIXED_LENGTH if gpu else 4096]
        return [(mix, length) for mix in names for length in lengths]
    if options.quick:
        return [("mixed", 512)]
    if gpu:
        over_lengths = [(mix, length) for length in LENGTHS for mix in ("mixed", "long")]
        return list(dict.fromkeys([*((mix, mixes.FIXED_LENGTH) for mix in mixes.NAMES), *over_lengths]))
    return [("mixed", 1024), ("mixed", 4096), ("pairs", 4096), ("tiny", 4096)]


def _known(option: str, names: Iterable[str], choices: Collection[str]) -> list[str]:
    for name in names:
        if name not in choices:
            raise InputError(f"{option} must be of {', '.join(choices)}, got {name!r}")
    return list(dict.fromkeys(names))


def _run(plan: Plan, machine: Machine, table: Path) -> list[Row]:
    """Measures shape after shape; `table` is up to date after each, should the run be cut off."""
    causal_only = {backend.name for backend in plan.backends if backend.causal_only}
    rows: list[Row] = []
    for shape in plan.shapes:
        problem = Problem(mixes.sample(shape.mix, shape.length), plan.heads, plan.kv_heads, shape.head_dim, plan.dtype)
        outcomes = compare(problem, plan.backends, plan.device, plan.effort, plan.deadline)
        rows += make_rows(shape.mix, problem, outcomes, causal_only, machine)
        write_csv(rows, table)
        done = sum(outcome.measured is not None for outcome in outcomes.values())
        print(f"{shape.mix} T={shape.length} D={shape.head_dim}: {done} of {len(outcomes)} backends", file=sys.stderr)
    return rows


def _write(rows: list[Row], machine: Machine, out: Path) -> None:
    draw(rows, out / "attention.png")
    (out / "attention.md").write_text(markdown(rows, machine, "attention.png"), encoding="utf-8")
    print(text_summary(rows))
    print(f"\nresults: {', '.join(str(out / f'attention.{kind}') for kind in ('csv', 'png', 'md'))}")


if __name__ == "__main__":
    sys.exit(main())
