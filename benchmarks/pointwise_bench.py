"""Time the memory-bound ops (rotary embedding, SwiGLU, error of each image) against plain PyTorch and a copy.

    python benchmarks/pointwise_bench.py --out DIR [--reports rope_swiglu diffusion_mse] [--device cuda|cpu]

Writes DIR/rope_swiglu.csv, .md and .png, and DIR/diffusion_mse.csv, .md and .png. The yardstick is a copy of as many
bytes as an op must read and write at least, timed in the same run. Exit status 1 where a backend computed something
wrong, or one of ours broke.

Rotary embedding and SwiGLU take 16,384 tokens on a GPU and 4,096 on a CPU; q and k are views of one projection to
queries, keys and values, as in the model. Images are of 256 patches, or of 1 to 1,024, and a patch has 32 numbers (2 x
2 of 8 latent channels). As in training, the model's prediction has the dtype of the row, and the rest is fp32.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported, so that kernels are compiled

import pandas as pd
import tables
import timing
import torch
import torch.nn.functional as F
from gate import Candidate, Forward, Gate, compare, make_gate, run
from matplotlib import pyplot as plt
from tables import Row
from timing import DTYPES, NEEDS_CUDA, NOT_MEASURED, PASSES, Times
from torch import Tensor

from transfusion_fast.kernels import reference
from transfusion_fast.model import ops

OURS = ("triton", "torch")
PLAIN, COMPILED = "plain", "plain, compiled"
BACKENDS = (*OURS, PLAIN, COMPILED)
EPS = 1e-6  # of the norm, as in the op
C = 32


class Setting(NamedTuple):
    """The device and dtype that problems are made for; `tiny` problems take almost no time."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool

    def pick(self, tiny: int, cpu: int, gpu: int) -> int:
        """Return the size for this device."""
        return tiny if self.tiny else gpu if self.device.type == "cuda" else cpu

    def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal noise, different for each seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or self.dtype)


@dataclass(frozen=True, eq=False)
class Problem:
    """One op at one shape and dtype, on one device; all functions take the inputs, which require gradients.

    `specification` is the reference for inputs in fp64, `ours` also takes `backend`, and `plain` is the op as one would
    write it in PyTorch. `least` are the bytes that forward and backward must move: each input and each output once.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    specification: Forward
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Forward
    least: tuple[int, int]


def bytes_of(*tensors: Tensor) -> int:
    """Return the bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def rope(setting: Setting, H: int, G: int, D: int, norm: bool) -> Problem:
    """Return rotary embedding of H query heads and G key heads of D numbers."""
    T = setting.pick(64, 4096, 16384)
    projection = setting.normal(0, T, H + 2 * G, D)
    q, k = projection[:, :H], projection[:, H : H + G]
    weights = [1 + 0.1 * setting.normal(seed, D) for seed in (1, 2)] if norm else []
    table = ops.rotary(torch.arange(T, device=setting.device), D)
    # Backward through the norm also reads what was normed, and the weights, whose gradients it writes.
    once = 2 * bytes_of(q, k) + bytes_of(*table)
    least = (once + bytes_of(*weights), once + (bytes_of(q, k) + 2 * bytes_of(*weights) if norm else 0))

    def named(weights: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(("q_weight", "k_weight"), weights, strict=False))

    def plain(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Rotate in the precision of q and k throughout."""
        cos, sin = (angles[:, None].to(q.dtype) for angles in table)
        rotated = []
        for x, weight in zip((q, k), weights or (None, None), strict=True):
            x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, EPS)
            first, second = x.chunk(2, dim=-1)
            rotated.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
        return tuple(rotated)

    return Problem(
        op="rope with norm" if norm else "rope",
        shape=f"T={T} H={H} G={G} D={D}",
        inputs=tuple(x.detach().requires_grad_() for x in (q, k, *weights)),
        specification=lambda q, k, *w: reference.rope(q, k, table, **named(w)),
        ours=lambda q, k, *w, backend: ops.rope(q, k, table, **named(w), backend=backend),
        plain=plain,
        least=least,
    )


def swiglu(setting: Setting, fused: bool) -> Problem:
    """Return SwiGLU of two tensors [T, F], or of one [T, 2F] that holds both."""
    T, width = setting.pick(64, 4096, 16384), setting.pick(256, 1408, 4096)
    both = setting.normal(0, T, 2 * width)
    tensors = (both,) if fused else tuple(x.contiguous() for x in both.chunk(2, dim=-1))
    half = bytes_of(both) // 2

    def halves(*x: Tensor) -> Sequence[Tensor]:
        return x[0].chunk(2, dim=-1) if fused else x

    def plain(*x: Tensor) -> Tensor:
        gate, up = halves(*x)
        return F.silu(gate) * up

    return Problem(
        op="swiglu of one tensor" if fused else "swiglu",
        shape=f"T={T} F={width}",
        inputs=tuple(x.detach().requires_grad_() for x in tensors),
        specification=lambda *x: reference.swiglu(*halves(*x)),
        ours=ops.swiglu,
        plain=plain,
        least=(3 * half, 5 * half),
    )


def diffusion_mse(setting: Setting, ragged: bool, flow: bool) -> Problem:
    """Return the error of each image; with `flow`, the target is noise less latents, else a tensor."""
    count = setting.pick(4, 64, 512)
    lengths = torch.full((count,), 256)
    if ragged:
        lengths = torch.randint(1, 1025, (count,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(setting.device)
    P, lengths = int(lengths.sum()), lengths.to(setting.device)
    prediction = setting.normal(0, P, C)
    eps, x_0 = setting.normal(1, 2, P, C, dtype=torch.float32)
    read = bytes_of(prediction, *((eps, x_0) if flow else (eps,)), offsets) + 4 * count
    images = torch.repeat_interleave(torch.arange(count, device=setting.device), lengths)

    def target(dtype: torch.dtype) -> Tensor:
        return eps.to(dtype) - x_0.to(dtype) if flow else eps.to(dtype)

    def ours(p: Tensor, backend: str) -> Tensor:
        if flow:
            return ops.diffusion_mse_from_noise(p, x_0, eps, offsets, "flow", backend=backend)
        return ops.diffusion_mse(p, eps, offsets, backend=backend)

    def plain(p: Tensor) -> Tensor:
        squared = (p.float() - target(torch.float32)).square().mean(dim=-1)
        return squared.new_zeros(count).index_add(0, images, squared) / lengths

    return Problem(
        op="diffusion_mse from noise" if flow else "diffusion_mse",
        shape=f"{count} images of {'1 to 1024' if ragged else 256} patches, P={P}",
        inputs=(prediction.requires_grad_(),),
        specification=lambda p: reference.diffusion_mse(p, target(p.dtype), offsets),
        ours=ours,
        plain=plain,
        least=(read, read + bytes_of(prediction)),
    )


REPORTS: dict[str, tuple[str, list[Callable[[Setting], Problem]]]] = {
    "rope_swiglu": (
        "Rotary embedding and SwiGLU",
        [
            *(partial(rope, H=16, G=G, D=D, norm=norm) for G, D in ((16, 64), (4, 128)) for norm in (False, True)),
            *(partial(swiglu, fused=fused) for fused in (False, True)),
        ],
    ),
    "diffusion_mse": (
        "Squared error of each image",
        [partial(diffusion_mse, ragged=ragged, flow=flow) for ragged in (False, True) for flow in (False, True)],
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the command line asks for; return the exit code."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--reports", nargs="+", choices=REPORTS, default=list(REPORTS), help="default: both")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=1, help="to time each backend for (default: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, in seconds")
    options = parser.parse_args(arguments)
    return timing.run_benchmark("pointwise_bench", options, partial(_measure, options))


def _measure(options: argparse.Namespace, device: torch.device) -> bool:
    """Measure the reports; return whether nothing failed. A CSV file is up to date after each problem."""
    machine = timing.describe_machine(device)
    failed = False
    for name in options.reports:
        title, problems = REPORTS[name]
        rows: list[Row] = []
        for dtype, make in ((dtype, make) for dtype in options.dtypes for make in problems):
            problem = make(Setting(device, DTYPES[dtype], options.quick))
            rows += make_rows(problem, *measure_problem(problem, options.backends, options.seconds), machine)
            tables.write_csv(rows, options.out / f"{name}.csv")
            print(f"pointwise_bench: {problem.op}, {problem.shape}, {dtype}: done", file=sys.stderr)
        draw([row for row in rows if row["status"] == "ok"], title, options.out / f"{name}.png")
        unmeasured = tables.list_unmeasured(rows, "{op}, {backend}", "{shape}, {dtype}")
        tables.write_report(options.out / name, title, rows, COLUMNS, NOTES, unmeasured)
        failed |= any(row["status"].startswith("FAILED") for row in rows)
    return not failed


def measure_problem(problem: Problem, backends: Sequence[str], seconds: float) -> tuple[dict[str, Row], Times]:
    """Return the columns of every backend, and the times of copies of as many bytes as each pass moves at least."""
    inputs, device = problem.inputs, problem.inputs[0].device
    with torch.no_grad():
        outputs = problem.plain(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator(device).manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) for x in outputs]

    def prepare(name: str) -> Forward:
        if name in OURS:
            return partial(problem.ours, backend=name)
        if name == PLAIN:
            return problem.plain
        torch.compiler.reset()  # so that every problem is compiled for its own shape
        return torch.compile(problem.plain, dynamic=False)

    def gate() -> Gate:
        exact = [x.detach().double().requires_grad_() for x in inputs]
        references = run(problem.specification, exact, [x.double() for x in upstream])
        names = [f"output {number}" for number in range(len(upstream))]
        names += [f"the gradient of input {number}" for number in range(len(inputs))]
        return make_gate(names, references, run(problem.plain, inputs, upstream))

    # Half of the bytes are read, half are written.
    forward, backward = (torch.zeros(2, count // 2, dtype=torch.uint8, device=device) for count in problem.least)

    def copy() -> Callable[[], object]:
        forward[0].copy_(forward[1])
        return lambda: backward[0].copy_(backward[1])

    missing = {"triton": NEEDS_CUDA} if device.type == "cpu" else {}
    candidates = [Candidate(name, partial(prepare, name), name in OURS, missing.get(name)) for name in backends]
    outcomes, timings = compare(candidates, inputs, upstream, gate, seconds, others={"copy": copy})
    return outcomes, timings["copy"]


def make_rows(problem: Problem, outcomes: Mapping[str, Row], copies: Times, machine: Mapping[str, str]) -> list[Row]:
    """Return the rows of one problem: milliseconds, MiB, GB/s of the bytes that a pass needs at least.

    `times_plain` says how many times as fast as plain PyTorch a backend is, forward and backward together.
    """
    plain, rows = outcomes.get(PLAIN, {}), []
    for name, outcome in outcomes.items():
        timed, dtype = timing.COLUMNS[0] in outcome, str(problem.inputs[0].dtype).removeprefix("torch.")
        row: Row = {"op": problem.op, "shape": problem.shape, "dtype": dtype, "backend": name, **machine}
        row |= {f"{which}_least_bytes": count for which, count in zip(PASSES, problem.least, strict=True)}
        row |= {column: outcome.get(column, NOT_MEASURED) for column in (*timing.COLUMNS, "peak_mib")}
        for which in PASSES:
            least, ms = row[f"{which}_least_bytes"], row[f"{which}_p50"]
            row[f"{which}_gbs"] = least / ms / 1e6 if timed else NOT_MEASURED
            row[f"{which}_copy_gbs"] = least / copies[f"{which}_p50"] / 1e6
            row[f"{which}_of_copy"] = row[f"{which}_gbs"] / row[f"{which}_copy_gbs"] if timed else NOT_MEASURED
        known = timed and timing.COLUMNS[0] in plain
        row["times_plain"] = timing.both_ms(plain) / timing.both_ms(row) if known else NOT_MEASURED
        rows.append(row | {"status": outcome["status"]})
    return rows


COLUMNS = {
    "op": "{op}", "shape": "{shape}", "dtype": "{dtype}", "backend": "{backend}",
    "forward ms": tables.spread("forward"), "backward ms": tables.spread("backward"),
    "GB/s": "{forward_gbs:.3g} / {backward_gbs:.3g}",
    "of a copy's rate": "{forward_of_copy:.2f} / {backward_of_copy:.2f}", "MiB": "{peak_mib:.3g}",
    "x plain": "{times_plain:.2f}",
}  # fmt: skip
NOTES = """\
Medians (20th to 80th percentile). GB/s count each input and each output once. The yardstick is a copy of as many bytes,
timed in the same run; it is not a limit, because a pass that reads more than it writes may be faster. `x plain`: how
many times as fast as plain PyTorch, forward and backward together. Peak memory is that of one forward and backward
beyond the inputs. Everything was checked against the specification in fp64 before it was timed."""


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a panel for each pass, with a group of bars for each problem and a color for each backend."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 0.28 * len(rows) + 1.8), sharey=True)
    frame = pd.DataFrame([row | {"problem": "{op}, {shape}, {dtype}".format_map(row)} for row in rows])
    for panel, name in zip(panels, PASSES, strict=True):
        share = f"{name}_of_copy"
        shares = frame.pivot_table(share, "problem", "backend", sort=False) if rows else frame
        tables.draw_bars(panel, shares, horizontal=True, legend=panel is panels[1])
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlabel(f"{name}: share of a copy's rate")
    panels[0].invert_yaxis()
    figure.suptitle(f"{title}, {rows[0]['hardware']}" if rows else title)
    tables.save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
