"""Time the memory-bound ops (rotary embedding, RMS norm, SwiGLU, image errors) against plain PyTorch and a copy.

    python benchmarks/pointwise_bench.py --out DIR [--reports rope_swiglu rms_norm diffusion_mse] [--device cuda|cpu]

Writes DIR/rope_swiglu.csv, .md and .png, and the same of rms_norm and diffusion_mse. The yardstick is a copy of as many
bytes as an op must read and write at least, timed in the same run. Exit status 1 where a backend computed something
wrong, or one of ours broke.

q and k of the rotary embedding are views of one projection, as in the model. A patch has 32 numbers, 2 x 2 of 8 latent
channels. As in training, the model's prediction has the dtype of the row, and the rest of the error is in fp32.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported, so that kernels are compiled

import tables
import timing
import torch
import torch.nn.functional as F
from gate import Backend, Forward, Gate, compare, make_gate, run
from pointwise_report import Moved, mse_bytes, norm_bytes, rope_bytes, swiglu_bytes
from tables import Row
from timing import DTYPES, NEEDS_CUDA, NOT_MEASURED, PASSES, Times
from torch import Tensor

from transfusion_fast.model import ops

PLAIN = "plain"
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


class Problem(NamedTuple):
    """One op at one shape and dtype, on one device.

    `ours` takes the inputs and `backend`; `plain` takes the inputs and is the op as one would write it in PyTorch.
    `least` are the bytes that forward and backward must move: each input and each output once.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Forward
    least: tuple[int, ...]


def rope(setting: Setting, H: int, G: int, D: int, norm: bool) -> Problem:
    """Return rotary embedding of H query heads and G key heads of D numbers."""
    T = setting.pick(64, 4096, 16384)
    projection = setting.normal(0, T, H + 2 * G, D)
    weights = [1 + 0.1 * setting.normal(seed, D) for seed in (1, 2)] if norm else []
    table = ops.rotary(torch.arange(T, device=setting.device), D)

    def ours(q: Tensor, k: Tensor, *weights: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        named = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return ops.rope(q, k, table, **named, backend=backend)

    def plain(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Rotate in the precision of q and k throughout."""
        cos, sin = (angles[:, None].to(q.dtype) for angles in table)
        rotated = []
        for x, weight in zip((q, k), weights or (None, None), strict=True):
            x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, EPS)
            first, second = x.chunk(2, dim=-1)
            rotated.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
        return tuple(rotated)

    op, shape = "rope with norm" if norm else "rope", f"T={T} H={H} G={G} D={D}"
    moved = (rope_bytes(T, H, G, D, setting.dtype.itemsize, norm, backward) for backward in (False, True))
    return Problem(op, shape, (projection[:, :H], projection[:, H : H + G], *weights), ours, plain, _least(*moved))


def rms_norm(setting: Setting, E: int) -> Problem:
    """Return RMS norm of T rows, whose backward adds the gradient of the residual."""
    T = setting.pick(64, 4096, 16384)
    inputs = (setting.normal(0, T, E), 1 + 0.1 * setting.normal(1, E))

    def ours(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, weight, EPS, backend=backend)

    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x, weight.shape, weight, EPS), x

    moved = (norm_bytes(kernel, T, E, setting.dtype.itemsize) for kernel in PASSES)
    return Problem("rms_norm", f"T={T} E={E}", inputs, ours, plain, _least(*moved))


def swiglu(setting: Setting, fused: bool) -> Problem:
    """Return SwiGLU of two tensors [T, F], or of one [T, 2F] that holds both."""
    T, width = setting.pick(64, 4096, 16384), setting.pick(256, 1408, 4096)
    both = setting.normal(0, T, 2 * width)
    inputs = (both,) if fused else tuple(x.contiguous() for x in both.chunk(2, dim=-1))

    def plain(*x: Tensor) -> Tensor:
        gate, up = x[0].chunk(2, dim=-1) if fused else x
        return F.silu(gate) * up

    moved = (swiglu_bytes(kernel, T * width, setting.dtype.itemsize) for kernel in PASSES)
    op = "swiglu of one tensor" if fused else "swiglu"
    return Problem(op, f"T={T} F={width}", inputs, ops.swiglu, plain, _least(*moved))


def diffusion_mse(setting: Setting, ragged: bool, flow: bool) -> Problem:
    """Return the error of each image; with `flow`, the target is noise less latents, else a tensor."""
    count = setting.pick(4, 64, 512)
    lengths, longest = torch.full((count,), 256), setting.pick(256, 1024, 1024)
    if ragged:
        lengths = torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(0))
    bounds = [0, *lengths.cumsum(0).tolist()]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=setting.device)
    P, lengths = bounds[-1], lengths.to(setting.device)
    eps, x_0 = setting.normal(1, 2, P, C, dtype=torch.float32)
    images = torch.repeat_interleave(torch.arange(count, device=setting.device), lengths)

    def ours(p: Tensor, backend: str) -> Tensor:
        if not flow:
            return ops.diffusion_mse(p, eps, offsets, backend=backend)
        precise = [x.to(torch.promote_types(p.dtype, x.dtype)) for x in (x_0, eps)]
        return ops.diffusion_mse_from_noise(p, *precise, offsets, backend=backend)

    def plain(p: Tensor) -> Tensor:
        squared = (p.float() - (eps - x_0 if flow else eps)).square().mean(dim=-1)
        return squared.new_zeros(count).index_add(0, images, squared) / lengths

    targets = {"target_ptr": 4, "x_0_ptr": 4} if flow else {"target_ptr": 4}
    kernels = ("forward", "mean", "backward")
    forward, mean, backward = (mse_bytes(kernel, bounds, C, setting.dtype.itemsize, targets) for kernel in kernels)
    op = "diffusion_mse from noise" if flow else "diffusion_mse"
    shape = f"{count} images of {f'1 to {longest}' if ragged else 256} patches, P={P}"
    return Problem(op, shape, (setting.normal(0, P, C),), ours, plain, _least([*forward, *mean], backward))


def _least(*passes: Iterable[Moved]) -> tuple[int, ...]:
    return tuple(sum(tensor.least for tensor in tensors) for tensors in passes)


BOTH = (False, True)
ROPE = [partial(rope, H=16, G=G, D=D, norm=norm) for (G, D), norm in product(((16, 64), (4, 128)), BOTH)]
NORM = [partial(rms_norm, E=E) for E in (1024, 4096)]
SWIGLU = [partial(swiglu, fused=fused) for fused in BOTH]
MSE = [partial(diffusion_mse, ragged=ragged, flow=flow) for ragged, flow in product(BOTH, BOTH)]
REPORTS = {
    "rope_swiglu": ("Rotary embedding and SwiGLU", ROPE + SWIGLU),
    "rms_norm": ("RMS norm and the residual's gradient", NORM),
    "diffusion_mse": ("Squared error of each image", MSE),
}


def _compile(problem: Problem) -> Forward:
    torch.compiler.reset()  # so that every problem is compiled for its own shape
    return torch.compile(problem.plain, dynamic=False)


def _without_gpu(problem: Problem) -> str | None:
    return NEEDS_CUDA if problem.inputs[0].device.type == "cpu" else None


BACKENDS = {
    "triton": Backend(lambda problem: partial(problem.ours, backend="triton"), _without_gpu, is_ours=True),
    "torch": Backend(lambda problem: partial(problem.ours, backend="torch"), is_ours=True),
    PLAIN: Backend(lambda problem: problem.plain),
    "plain, compiled": Backend(_compile),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the command line asks for; return the exit code."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--reports", nargs="+", choices=REPORTS, default=list(REPORTS), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=1, help="to time each backend for (default: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, in seconds")
    options = parser.parse_args(arguments)
    return timing.run_benchmark("pointwise_bench", options, partial(_measure, options))


def _measure(options: argparse.Namespace, device: torch.device) -> bool:
    """Measure the reports; return whether nothing failed."""
    machine = timing.describe_machine(device)

    def groups(problems: Sequence[Callable[[Setting], Problem]]) -> Iterator[list[Row]]:
        for dtype, make in product(options.dtypes, problems):
            problem = make(Setting(device, DTYPES[dtype], options.quick))
            yield make_rows(problem, *measure_problem(problem, options.backends, options.seconds), machine)

    right = True
    for name in options.reports:
        title, problems = REPORTS[name]
        names = "{op}, {shape}, {dtype}", PANELS
        right &= tables.write_comparison(options.out / name, title, groups(problems), *names, COLUMNS, NOTES)
    return right


def measure_problem(problem: Problem, backends: Sequence[str], seconds: float) -> tuple[dict[str, Row], Times]:
    """Return the columns of every backend, and the times of copies of as many bytes as each pass moves at least."""
    inputs = [x.detach().requires_grad_() for x in problem.inputs]
    device = inputs[0].device
    with torch.no_grad():
        outputs = problem.plain(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator(device).manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) for x in outputs]

    def gate() -> Gate:
        exact = [x.detach().double().requires_grad_() for x in inputs]
        references = run(partial(problem.ours, backend="reference"), exact, [x.double() for x in upstream])
        names = [f"output {number}" for number in range(len(upstream))]
        names += [f"the gradient of input {number}" for number in range(len(inputs))]
        return make_gate(names, references, run(problem.plain, inputs, upstream))

    # Half of the bytes are read, half are written.
    forward, backward = (torch.zeros(2, count // 2, dtype=torch.uint8, device=device) for count in problem.least)

    def copy() -> Callable[[], object]:
        forward[0].copy_(forward[1])
        return lambda: backward[0].copy_(backward[1])

    chosen = {name: BACKENDS[name] for name in backends}
    outcomes, timings = compare(problem, chosen, inputs, upstream, gate, seconds, others={"copy": copy})
    return outcomes, timings["copy"]


def make_rows(problem: Problem, outcomes: Mapping[str, Row], copies: Times, machine: Mapping[str, str]) -> list[Row]:
    """Return the rows of one problem: milliseconds, MiB, GB/s of the bytes that a pass needs at least."""
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


PANELS = {f"{which}: share of a copy's rate": f"{which}_of_copy" for which in PASSES}
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


if __name__ == "__main__":
    sys.exit(main())
