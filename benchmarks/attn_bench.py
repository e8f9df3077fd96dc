"""Time hybrid attention against other ways to compute it, on packs of documents like those in training.

    python benchmarks/attn_bench.py --out DIR [--device cuda|cpu] [--mixes ...] [--lengths ...] [--backends ...]

Writes DIR/attention.csv, attention.png and attention.md. A backend is timed at a shape only after its output and
gradients were found right there. On a GPU: six mixes at 16,384 positions; documents of 32 to 4,096 positions on average
in packs of 16k and 64k; two of the mixes from 1k to 128k. On a CPU: a few small shapes, in one or two minutes.

Rows that DIR/attention.csv has from the same machine and revision are kept and not measured again. Exit status 1 where
a backend computed something wrong, or one of ours broke; 3 where time ran out, so that the same command can go on.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported, so that kernels are compiled

import mixes
import tables
import timing
import torch
from attention_backends import BACKENDS, Problem, attention_gate
from attention_goals import SHAPE, judge
from gate import OVER_BUDGET, Backend, compare, failure_reason
from tables import Row
from timing import DTYPES, NOT_MEASURED

from transfusion_fast.errors import InputError

LENGTHS = (1024, 4096, 16384, 65536, 131072)
BASELINES = ("sdpa_dense", "sdpa_documents")
PER_PAIR = {"forward": 4, "backward": 10}  # operations per head dimension and visible pair
FIGURES = (
    "prepare_ms", *timing.COLUMNS, "peak_mib", "forward_tflops", "backward_tflops", "forward_percent_of_peak",
    "backward_percent_of_peak", "forward_gbs", "forward_percent_of_bandwidth", "times_sdpa_dense",
    "times_sdpa_documents",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the command line asks for; return the exit code."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--mixes", nargs="+", choices=mixes.ALL_NAMES, metavar="MIX", help="|".join(mixes.ALL_NAMES))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="positions of a pack")
    parser.add_argument("--heads", type=int, help="query heads (default: 16 on cuda, 8 on a CPU)")
    parser.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
    parser.add_argument("--head-dim", nargs="+", type=int, metavar="D", help="default: 128 and 64 on cuda, 64 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on cuda, fp32 on a CPU")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--minutes", type=float, default=8, help="start nothing after this long (default: 8)")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, in seconds")
    options = parser.parse_args(arguments)
    return timing.run_benchmark("attn_bench", options, lambda device: _measure(options, device))


def _measure(options: argparse.Namespace, device: torch.device) -> bool:
    """Measure shape after shape; return whether nothing failed.

    Raises:
        Unfinished: time ran out.
    """
    gpu, quick = device.type == "cuda", options.quick
    heads = (2 if quick else 16 if gpu else 8) if options.heads is None else options.heads
    kv_heads = heads if options.kv_heads is None else options.kv_heads
    head_dims = options.head_dim or ([32] if quick else [128, 64] if gpu else [64])
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise InputError(f"--heads must be a multiple of --kv-heads, both at least 1, got {heads} and {kv_heads}")
    if min([*head_dims, *(options.lengths or [])]) < 1:
        raise InputError(f"--head-dim and --lengths must be at least 1, got {head_dims} and {options.lengths}")
    backends = {name: BACKENDS[name] for name in options.backends}
    dtype = DTYPES[options.dtype or ("bf16" if gpu else "fp32")]
    seconds = 0.1 if quick else 0.25 if gpu else 2
    deadline = time.monotonic() + 60 * options.minutes
    machine, path = timing.describe_machine(device), options.out / "attention"
    earlier = _earlier_groups(path.with_suffix(".csv"), machine)
    shapes = [
        (mix, T, heads, kv_heads, D, str(dtype).removeprefix("torch."))
        for D, (mix, T) in product(head_dims, _packs(options, gpu))
    ]
    left = [shape for shape in shapes if not _is_complete(earlier.get(shape, []), backends)]
    kept = [row for shape, rows in earlier.items() if shape not in left for row in rows]
    late = set()

    def groups() -> Iterator[list[Row]]:
        for shape in left:
            mix, T, _, _, D, _ = shape
            problem = Problem(mixes.sample(mix, T), heads, kv_heads, D, dtype)
            outcomes = compare_backends(problem, backends, device, seconds, deadline)
            if any(OVER_BUDGET in outcome["status"] for outcome in outcomes.values()):
                late.add(shape)
            yield make_rows(mix, problem, outcomes, backends, machine)

    name, problem = "Hybrid attention", "{mix} T={T} D={D}"
    if not tables.write_comparison(path, name, groups(), problem, PANELS, COLUMNS, NOTES, kept, judge):
        return False
    if late:
        raise timing.Unfinished(f"time ran out with {len(late)} of {len(shapes)} shapes left; run it again to go on")
    return True


def _earlier_groups(path: Path, machine: Mapping[str, str]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows of a CSV file by shape, numbers as numbers; none of another machine or of changed code."""
    if not path.exists() or machine["git"] == "unknown" or machine["git"].endswith("+"):
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
    same = [row for row in rows if machine.items() <= row.items()]
    return {shape: list(group) for shape, group in groupby(same, lambda row: tuple(row[name] for name in SHAPE))}


def _value(name: str, text: str) -> Any:
    if name in ("T", "H", "G", "D", "documents", "visible_area"):
        return int(text)
    if name in ("mean_length", *FIGURES) and text != NOT_MEASURED:
        return float(text) if text else None
    return text


def _is_complete(rows: Sequence[Row], backends: Iterable[str]) -> bool:
    """Return whether measuring a shape again would tell nothing new."""
    is_open = any(OVER_BUDGET in row["status"] or row["status"].startswith("FAILED") for row in rows)
    return not is_open and {row["backend"] for row in rows}.issuperset(backends)


def _packs(options: argparse.Namespace, gpu: bool) -> list[tuple[str, int]]:
    """Return the mixes and lengths of the command line, or the device's own."""
    if options.mixes or options.lengths:
        lengths = options.lengths or [mixes.FIXED_LENGTH if gpu else 4096]
        return [(mix, length) for mix in options.mixes or mixes.NAMES for length in lengths]
    if options.quick:
        return [("mixed", 512)]
    if gpu:
        short = product(mixes.BY_MEAN, (mixes.FIXED_LENGTH, 4 * mixes.FIXED_LENGTH))
        over_lengths = [(mix, length) for length in LENGTHS for mix in ("mixed", "long")]
        return list(dict.fromkeys([*((mix, mixes.FIXED_LENGTH) for mix in mixes.NAMES), *short, *over_lengths]))
    return [(mix, 4096) for mix in ("mixed", "pairs", "tiny", "mean32", "mean256", "mean1024")]


def compare_backends(
    problem: Problem, backends: Mapping[str, Backend], device: torch.device, seconds: float, deadline: float
) -> dict[str, Row]:
    """Return the columns of every backend on `device`; none starts after `deadline` of time.monotonic()."""
    try:
        problem = replace(problem, layout=problem.layout.to(device))
        qkv, upstream = problem.inputs()
        gate = partial(attention_gate, problem, qkv, upstream)
        return compare(problem, backends, qkv, (upstream,), gate, seconds, deadline=deadline)[0]
    except RuntimeError as error:
        # The reference does not fit or is wrong, or an earlier error has left the device unusable.
        return {name: {"status": f"{NOT_MEASURED}: no reference: {failure_reason(error)}"} for name in backends}


def make_rows(
    mix: str, problem: Problem, outcomes: Mapping[str, Row], backends: Mapping[str, Backend], machine: Mapping[str, str]
) -> list[Row]:
    """Return the rows of one problem: milliseconds, MiB, TFLOP/s by exact area, percent of the GPU's peaks.

    `times_sdpa_dense` and `times_sdpa_documents` say how many times as fast as this baseline a backend is in the same
    run, forward and backward together. None stands for a percentage of an unknown peak.
    """
    lengths = problem.lengths
    T, H, G, D = problem.layout.total_length, problem.heads, problem.kv_heads, problem.head_dim
    least_bytes = problem.dtype.itemsize * T * D * (2 * H + 2 * G) + 4 * T * H
    peak_tflops, peak_gbs = timing.peaks_of(machine["hardware"])
    if problem.dtype.itemsize != 2:
        peak_tflops = None
    rows = []
    for name, outcome in outcomes.items():
        area = problem.layout.area
        if backends[name].ungated:  # the documents without their images
            area = sum(length * (length + 1) // 2 for length in lengths)
        row = {
            "op": "attention", "mix": mix, "T": T, "H": H, "G": G, "D": D,
            "dtype": str(problem.dtype).removeprefix("torch."), "backend": name, "kernel": "", **machine,
            "documents": len(lengths), "mean_length": sum(lengths) / len(lengths),
            "visible_area": area,
            **dict.fromkeys(FIGURES, NOT_MEASURED), "status": "", **outcome,
        }  # fmt: skip
        if timing.COLUMNS[0] in outcome:
            for which, flops in PER_PAIR.items():
                tflops = flops * H * D * area / row[f"{which}_p50"] / 1e9
                row[f"{which}_tflops"] = tflops
                row[f"{which}_percent_of_peak"] = peak_tflops and 100 * tflops / peak_tflops
            gbs = least_bytes / row["forward_p50"] / 1e6
            row |= {"forward_gbs": gbs, "forward_percent_of_bandwidth": peak_gbs and 100 * gbs / peak_gbs}
            for base in BASELINES:
                if timing.COLUMNS[0] in outcomes.get(base, {}):
                    row[f"times_{base}"] = timing.both_ms(outcomes[base]) / timing.both_ms(row)
        rows.append(row)
    return rows


PANELS = {f"{which}, TFLOP/s by exact area": f"{which}_tflops" for which in PER_PAIR}
COLUMNS = {
    "mix": "{mix}", "T": "{T}", "documents": "{documents}", "D": "{D}", "backend": "{backend}", "kernel": "{kernel}",
    "prepare": "{prepare_ms:.3g}",
    "forward": tables.spread("forward"), "backward": tables.spread("backward"), "MiB": "{peak_mib:.3g}",
    "TFLOP/s": "{forward_tflops:.3g} / {backward_tflops:.3g}",
    "% of peak": "{forward_percent_of_peak:.3g} / {backward_percent_of_peak:.3g}",
    "x dense": "{times_sdpa_dense:.3g}", "x documents": "{times_sdpa_documents:.3g}",
}  # fmt: skip
NOTES = """\
Forward and backward are medians in ms (20th to 80th percentile); TFLOP/s and the percent of peak count 4 and 10
operations for each head dimension and visible pair. The percent of peak is open where no 16-bit peak is on record for
this hardware and dtype. `x dense` and `x documents` say how many times as fast as dense and per-document SDPA a backend
is in this run, forward and backward together. `prepare` is what a micro-batch needs once, in ms and in no other column:
ours builds its layout and tables, FlexAttention its block mask, the others their bounds, offsets or masks, for which
they are given a layout. `kernel` names the library or, for SDPA, the kernels that PyTorch chose and in how many calls;
for single documents it is asked to prefer cuDNN's. Every backend passed the correctness gate before it was timed,
except flash_varlen_causal, which computes another mask: its rate, by the area of its own mask, is only a reference. The
packs are described in benchmarks/mixes.py; mean32 holds documents of 32 positions on average, half of them with
images."""


if __name__ == "__main__":
    sys.exit(main())
