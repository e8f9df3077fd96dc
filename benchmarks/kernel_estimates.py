"""Estimated times on GPUs that nobody measured here: a roofline from the machine code and the tables of tiles.

An estimate, not a measurement. A step costs its cycles as read off the machine code: at worst matrix + max(issue, MUFU)
(nothing overlaps), at best the largest of the three. Multiprocessors are taken to share the work evenly, at the clock
of the published peak. Left out: what a program does before its first step, latencies, bank conflicts, and the L2 cache,
whose traffic is given instead. Measured kernels of this kind reach about two thirds of the worst case's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import kernel_rows
import mixes

from transfusion_fast.kernels.work import tile_work


@dataclass(frozen=True)
class Gpu:
    arch: int
    multiprocessors: int
    clock_ghz: float
    bandwidth_gbs: float


# Published figures: multiprocessors, boost clock that goes with the published dense peak, memory bandwidth.
GPUS = {
    "A100 80GB": Gpu(80, 108, 1.41, 2039),
    "H100 SXM": Gpu(90, 132, 1.83, 3350),
    "H200": Gpu(90, 132, 1.83, 4800),
    "B200": Gpu(100, 148, 1.85, 8000),
}
HEAD_DIMS = (64, 128)
FLOPS_OF_PAIR = {"forward": 4, "backward_dq": 6, "backward_dkdv": 8}  # per dimension: two a matrix product


@dataclass(frozen=True)
class Row:
    """`visible` FLOPs count each visible pair once; the L2 traffic is what all programs load together."""

    gpu: str
    kernel: str
    mix: str
    T: int
    heads: str
    head_dim: int
    dtype: str
    estimated_us_best: float
    estimated_us_worst: float
    estimated_visible_tflops_best: float
    estimated_visible_tflops_worst: float
    memory_us: float
    least_mib: float
    loaded_mib: float
    loaded_by_least: float


def rows(compiled: Sequence[kernel_rows.Row]) -> list[Row]:
    """For every GPU whose kernels were compiled, 16 query heads and 4 key/value heads in bf16."""
    chosen = [row for row in compiled if (row.dtype, row.heads) == ("bf16", "16/4") and row.whole_order]
    by_variant = {(row.kernel, row.arch, row.head_dim, row.height): row for row in chosen}
    found = []
    for name, gpu in GPUS.items():
        for kernel in FLOPS_OF_PAIR:
            for head_dim in HEAD_DIMS:
                variants = [by_variant.get((kernel, gpu.arch, head_dim, height)) for height in (128, 64)]
                if None not in variants:
                    found += [_row(name, gpu, kernel, head_dim, mix, variants) for mix in mixes.NAMES]
    return found


def _row(name: str, gpu: Gpu, kernel: str, head_dim: int, mix: str, variants: Sequence[kernel_rows.Row]) -> Row:
    layout = mixes.sample(mix, mixes.FIXED_LENGTH)
    T, H, G = layout.total_length, 16, 4
    work = tile_work(layout, kernel, head_dim=head_dim, arch=gpu.arch)
    # dK and dV walk their queries once for every query head of the group, but load their own tile once.
    by_keys = kernel == "backward_dkdv"
    best = worst = loaded = 0.0
    for tiles, v in zip(work, variants, strict=True):
        for columns, step, loop in ((tiles.full, v.step, "whole"), (tiles.partial, v.edge_step, "edge")):
            matrix, issue, mufu = (getattr(v, f"{loop}_{unit}_cycles") for unit in ("matrix", "issue", "mufu"))
            best += H * columns / step * max(matrix, issue, mufu)
            worst += H * columns / step * (matrix + max(issue, mufu))
            loaded += H * columns * 2 * head_dim * 2
        loaded += tiles.programs * v.block * (G if by_keys else H) * 2 * head_dim * 2
    flops = FLOPS_OF_PAIR[kernel] * H * head_dim * layout.area
    least = _least_bytes(kernel, T, H, G, head_dim)
    memory_us = least / gpu.bandwidth_gbs / 1e3
    best_us, worst_us = (max(cycles / gpu.multiprocessors / gpu.clock_ghz / 1e3, memory_us) for cycles in (best, worst))
    return Row(
        gpu=name,
        kernel=kernel,
        mix=mix,
        T=T,
        heads=f"{H}/{G}",
        head_dim=head_dim,
        dtype="bf16",
        estimated_us_best=round(best_us, 1),
        estimated_us_worst=round(worst_us, 1),
        estimated_visible_tflops_best=round(flops / best_us / 1e6, 1),
        estimated_visible_tflops_worst=round(flops / worst_us / 1e6, 1),
        memory_us=round(memory_us, 1),
        least_mib=round(least / 2**20, 1),
        loaded_mib=round(loaded / 2**20, 1),
        loaded_by_least=round(loaded / least, 1),
    )


def _least_bytes(kernel: str, T: int, H: int, G: int, D: int) -> int:
    """Every tensor moved once, bf16: q, o, do, dq are [T, H, D]; k, v, dk, dv [T, G, D]; lse, delta fp32 [T, H]."""
    queries, keys, scalars = 2 * T * H * D, 2 * T * G * D, 4 * T * H
    return {
        "forward": 2 * queries + 2 * keys + scalars,
        "backward_dq": 4 * queries + 2 * keys + 2 * scalars,
        "backward_dkdv": 2 * queries + 4 * keys + 2 * scalars,
    }[kernel]
