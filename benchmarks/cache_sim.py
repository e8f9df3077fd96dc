"""Simulate what the attention kernels read again from memory because the L2 cache has lost it; needs no GPU.

    python benchmarks/cache_sim.py --out DIR [--gpu "H100 SXM"] [--mixes text ...] [--tokens 16384 ...]

The bound of a kernel is the larger of its time to compute and its time to move bytes. Rows give it for the launch order
of the layout's tiles, and for that of longest tiles first, whatever their documents. Writes DIR/cache_sim.csv and
cache_sim.md, which says what is assumed.
"""

import argparse
import csv
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heapreplace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import mixes
import numpy as np
import tables
import torch
from tables import Row

from transfusion_fast.kernels.attention_configs import KERNELS
from transfusion_fast.kernels.layout import AttentionLayout, Programs
from transfusion_fast.kernels.tiles import TILE_HEIGHTS

PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "kernels" / "kernels.csv"
KERNEL_NAMES = {"forward": "forward", "backward_dq": "dQ", "backward_dkdv": "dK and dV", "backward": "backward"}
HEADS = ((16, 16), (16, 4))  # query and key/value heads
# Tensors that each reads or writes: q, o, do and dq [T, H, D]; k, v, dk and dv [T, G, D]; lse and delta fp32 [T, H].
TENSORS = {"forward": (2, 2, 1), "backward_dq": (4, 2, 2), "backward_dkdv": (2, 4, 2)}
USABLE_MEMORY, USABLE_CACHE = 0.9, 0.8  # of the published figures
# Columns that the cache holds or loses together; more in documents that would have more than _MOST_PARTS such parts.
_PART, _MOST_PARTS = 64, 128
Compiled = Mapping[str, Any]  # a row of kernels.csv


class Gpu(NamedTuple):
    """Published figures of a GPU. The clock is that of the published dense peak."""

    arch: int
    multiprocessors: int
    clock_ghz: float
    memory_gbs: float
    cache_mib: float


GPUS = {
    "A100 80GB": Gpu(80, 108, 1.41, 2039, 40),
    "H100 SXM": Gpu(90, 132, 1.83, 3350, 50),
    "H200": Gpu(90, 132, 1.83, 4800, 50),
    "B200": Gpu(100, 148, 1.85, 8000, 126),
}


class Costs(NamedTuple):
    """The simulated time and memory traffic of one kernel over a layout."""

    compute_us: float
    memory_us: float
    moved_mib: float

    @property
    def bound_us(self) -> float:
        """The larger of the two times."""
        return max(self.compute_us, self.memory_us)


def simulate(layout: AttentionLayout, compiled: Sequence[Compiled], gpu: Gpu, heads: int, kv_heads: int) -> Costs:
    """Run the launches of one bf16 kernel; `compiled` are its rows for tall and for short tiles."""
    kernel, head_dim = compiled[0]["kernel"], int(compiled[0]["head_dim"])
    position = 2 * head_dim * 2  # bytes of a column: a position of K and V, or of Q and dO
    cache = _Cache(int(gpu.cache_mib * USABLE_CACHE * 2**20 / position))
    cuts, cycles = _cuts(layout), 0.0
    for programs, row in zip(layout.programs(kernel, head_dim=head_dim, arch=gpu.arch), compiled, strict=True):
        resident = int(row["blocks_per_multiprocessor"])
        started = _started(programs, row, resident, cache, cuts, heads, kv_heads)
        # A launch begins when the one before has ended.
        cycles = _run(started, cache, np.diff(cuts).tolist(), resident * gpu.multiprocessors, cycles)
    moved = cache.moved * position + 4 * layout.total_length * heads * TENSORS[kernel][2]
    return Costs(cycles / gpu.clock_ghz / 1e3, moved / (USABLE_MEMORY * gpu.memory_gbs) / 1e3, moved / 2**20)


def least_bytes(kernel: str, T: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Return the bytes of a bf16 kernel's inputs and outputs."""
    queries, keys, scalars = TENSORS[kernel]
    return 2 * T * head_dim * (queries * heads + keys * kv_heads) + 4 * T * heads * scalars


class _Cache:
    """One cache of all multiprocessors, which loses what was used longest ago. Sizes are columns."""

    def __init__(self, size: int) -> None:
        self.free, self.moved = size, 0
        self.held: OrderedDict[int, int] = OrderedDict()

    def load(self, key: int, size: int) -> None:
        if key in self.held:
            self.held.move_to_end(key)
            return
        self.held[key] = size
        self.moved += size
        self.free -= size
        while self.free < 0:
            self.free += self.held.popitem(last=False)[1]


def _cuts(layout: AttentionLayout) -> np.ndarray:
    """Return where each part begins that the cache holds or loses together, and T."""
    documents = list(pairwise(layout.document_offsets.tolist()))
    steps = [_PART * -(-(end - start) // (_PART * _MOST_PARTS)) for start, end in documents]
    parts = [np.arange(start, end, step) for (start, end), step in zip(documents, steps, strict=True)]
    return np.concatenate([*parts, [layout.total_length]])


def _started(
    programs: Programs, row: Compiled, resident: int, cache: _Cache, cuts: np.ndarray, heads: int, kv_heads: int
) -> Iterator[tuple[float, list[int]]]:
    """Yield the cycles of each program in the order of the grid, and the keys of the parts of columns that it visits.

    The head is the fastest axis of the grid. A program passes its own rows through the cache when it starts.
    """
    by_keys, group = row["kernel"] == "backward_dkdv", heads // kv_heads
    own_tensors, launched, visits = (4, kv_heads, group) if by_keys else (TENSORS[row["kernel"]][0], heads, 1)
    columns = zip(("full", "partial"), (programs.full, programs.partial), strict=True)
    cycles = sum(visits * count * _cycles(row, loop, resident) for loop, count in columns).tolist()
    spans = [(np.searchsorted(cuts, low, "right") - 1, np.searchsorted(cuts, high)) for low, high in programs.columns]
    for n, (start, end) in enumerate(zip(programs.starts.tolist(), programs.ends.tolist(), strict=True)):
        parts = [part for first, last in spans for part in range(first[n], last[n])]
        for head in range(launched):
            cache.load(-1 - (start * heads + head), (end - start) * own_tensors // 2)
            loaded = range(head * group, (head + 1) * group) if by_keys else [head // group]
            yield cycles[n], [h * len(cuts) + part for h in loaded for part in parts]


def _cycles(row: Compiled, loop: str, resident: int) -> float:
    """Return the cycles of a column. Nothing overlaps within a block; blocks of a multiprocessor share its units."""
    matrix, issue, mufu = (float(row[f"{loop}_{unit}_cycles"]) for unit in ("matrix", "issue", "mufu"))
    cycles = max(matrix + max(issue, mufu), resident * max(matrix, issue, mufu))
    return cycles / int(row["step" if loop == "full" else "partial_step"])


def _run(
    programs: Iterator[tuple[float, list[int]]], cache: _Cache, sizes: Sequence[int], places: int, now: float
) -> float:
    """Start programs in `places` that are free from `now` on, and return when the last one ends."""
    # By time: (time, place, cycles of a part, parts to come).
    running: list[tuple[float, int, float, Iterator[int]]] = [(now, place, 0.0, iter(())) for place in range(places)]
    while running:
        now, place, step, keys = running[0]
        if (key := next(keys, None)) is not None:
            cache.load(key, sizes[key % (len(sizes) + 1)])
            heapreplace(running, (now + step, place, step, keys))
        elif (program := next(programs, None)) is not None:
            heapreplace(running, (now, place, program[0] / max(len(program[1]), 1), iter(program[1])))
        else:
            heappop(running)
    return now


def published(kernel: str, arch: int, head_dim: int) -> list[Compiled]:
    """Return what docs/kernels/kernels.csv says of a bf16 kernel for tall and for short tiles."""
    described = f"{kernel} sm_{arch} bf16 D={head_dim} tiles of"
    with PUBLISHED.open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    return [rows[f"{described} {height} H=16 G=4"] for height in TILE_HEIGHTS]


def longest_first(layout: AttentionLayout) -> AttentionLayout:
    """Return a layout without copies with its tiles of each height in the order of the columns that they see."""
    ordered, counts = {}, layout.tile_counts.tolist()
    for number, (table, side) in enumerate((("query_tiles", "key"), ("key_tiles", "query"))):
        low, high = (getattr(layout, f"{side}_{end}").numpy() for end in ("start", "end"))
        tiles = getattr(layout, table).numpy().copy()
        tall, short = counts[2 * number : 2 * number + 2]
        for own in (tiles[:tall], tiles[tall : tall + short]):
            own[:] = own[np.argsort(low[own[:, 0]] - high[own[:, 1] - 1], kind="stable")]
        ordered[table] = torch.from_numpy(tiles)
    return replace(layout, **ordered)


def simulate_rows(gpu: str, names: Sequence[str], lengths: Sequence[int], head_dim: int) -> Iterator[Row]:
    """Yield a row for each mix, length, number of heads and kernel."""
    for T, mix in product(lengths, names):
        layout = mixes.sample(mix, T)
        before = longest_first(layout)
        for (H, G), kernel in product(HEADS, KERNELS):
            compiled = published(kernel, GPUS[gpu].arch, head_dim)
            now, then = (simulate(x, compiled, GPUS[gpu], H, G) for x in (layout, before))
            yield {
                "gpu": gpu, "mix": mix, "T": T, "kernel": kernel, "heads": f"{H}/{G}", "head_dim": head_dim,
                "least_mib": round(least_bytes(kernel, T, H, G, head_dim) / 2**20),
                **{f"longest_first_{name}": round(x) for name, x in _columns(then).items()},
                **{name: round(x) for name, x in _columns(now).items()},
                "bound_by_longest_first": round(now.bound_us / then.bound_us, 3),
            }  # fmt: skip


def _columns(costs: Costs) -> dict[str, float]:
    return costs._asdict() | {"bound_us": costs.bound_us}


def main(arguments: list[str] | None = None) -> int:
    """Run the simulation that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--gpu", choices=GPUS, default="H100 SXM")
    parser.add_argument("--mixes", nargs="+", choices=mixes.NAMES, default=mixes.NAMES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536, 131072], metavar="T")
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=128)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = list(simulate_rows(options.gpu, options.mixes, options.tokens, options.head_dim))
    tables.write_csv(rows, options.out / "cache_sim.csv")
    gpu, titled = GPUS[options.gpu], [row | {"title": KERNEL_NAMES[row["kernel"]]} for row in rows]
    tables.write_markdown(
        options.out / "cache_sim.md",
        f"# Simulated L2 cache: {options.gpu}, bf16, D = {options.head_dim}",
        _NOTES.format(
            **gpu._asdict(), usable_mib=gpu.cache_mib * USABLE_CACHE, usable_gbs=gpu.memory_gbs * USABLE_MEMORY,
            part=_PART, parts=_MOST_PARTS,
        ),
        tables.markdown_table(titled, _TABLE),
    )  # fmt: skip
    return 0


_TABLE = {
    "mix": "{mix}", "T": "{T:,}", "H/G": "{heads}", "kernel": "{title}", "least MiB": "{least_mib}",
    "longest first: MiB": "{longest_first_moved_mib}",
    "compute / memory us": "{longest_first_compute_us} / {longest_first_memory_us}",
    "bound us": "{longest_first_bound_us}",
    "layout's order: MiB": "{moved_mib}", "compute / memory us ": "{compute_us} / {memory_us}",
    "bound us ": "{bound_us}", "bound / longest first": "{bound_by_longest_first}",
}  # fmt: skip
_NOTES = """\
**A simulation, not a measurement.** Bound: the larger of the time to compute and the time to move bytes. Longest first
orders the tiles by the columns that they see, whatever their documents. Least: every input and output once,
padding too.

Assumed: {multiprocessors} multiprocessors at {clock_ghz} GHz, the clock of the published peak; {usable_gbs:,.0f} of
{memory_gbs:,} GB/s; one cache of {usable_mib:.0f} of {cache_mib} MiB, empty at first, which loses what was used longest
ago, in parts of {part} positions of two tensors (more in documents of over {parts} such parts). Programs start in the
order of the shipped grid, heads first, wherever one has ended; the launch of short tiles waits for that of tall ones. A
program passes its own rows through the cache once, and comes to its columns in their order at an even pace: that of the
published loops (matrix + max(issue, MUFU) cycles for one block on a multiprocessor), which waits for no load. Left
out: what a program does before its first step, the two halves of the cache, and its other users."""


if __name__ == "__main__":
    sys.exit(main())
