"""Times forward and backward passes and describes the machine: what every benchmark of this folder shares.

A pass to measure is a `Step`: calling it runs the forward and returns a function that runs the backward. On a GPU times
are CUDA events with the L2 cache flushed before each pass; on a CPU the steps take turns, so that whatever else runs
on the machine slows all of them alike, and only their ratios are worth quoting.
"""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfusion_fast.errors import InputError

try:
    from triton.errors import TritonError
except ImportError:  # no triton, so nothing raises its errors
    TritonError = RuntimeError

NOT_MEASURED = "not measured"
# What a backend may raise where it cannot do a shape. NotImplementedError and out of memory are RuntimeErrors.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError, TritonError)

Step = Callable[[], Callable[[], object]]

_L2_FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
_HEAD_START_CYCLES = 5_000_000  # about 3 ms of a GPU's time
_MIN_REPEATS = 3
# Dense 16-bit TFLOP/s and GB/s by the data sheets; the first name that is part of the GPU's own is the one.
_PEAKS = {
    "B200": (2250.0, 8000.0),
    "H200": (989.4, 4800.0),
    "H100 PCIe": (756.0, 2000.0),
    "H100 NVL": (835.0, 3900.0),
    "H100": (989.4, 3350.0),
    "A100-SXM4-80GB": (312.0, 2039.0),
    "A100 80GB": (312.0, 1935.0),
    "A100": (312.0, 1555.0),
}


def choose_device(name: str | None) -> torch.device:
    """The device that --device names, by default a GPU where there is one; InputError for a GPU where there is none."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU that torch can use, and there is none; use --device cpu")
    return device


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds of one pass."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Timing:
    """A step's two passes over the same repeats."""

    forward: Quantiles
    backward: Quantiles

    @property
    def total(self) -> float:
        """Milliseconds of both medians."""
        return self.forward.p50 + self.backward.p50


@dataclass(frozen=True)
class Effort:
    """How long to measure: repeats stop at whichever comes first, but not below three unless `repeats` is."""

    repeats: int
    seconds: float
    """For each step."""


@dataclass(frozen=True)
class Machine:
    """What a row of results must say about where it was measured."""

    hardware: str
    torch: str
    triton: str
    flash_attn: str
    git: str


def autograd_step(
    forward: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], gradient: Tensor | Sequence[Tensor]
) -> Step:
    """The step of `forward(*inputs)`, whose backward returns the gradients of all inputs; one `gradient` an output."""

    def step() -> Callable[[], tuple[Tensor, ...]]:
        out = forward(*inputs)
        return lambda: torch.autograd.grad(out, inputs, gradient)

    return step


def time_steps(
    steps: dict[str, Step], device: torch.device, effort: Effort, rehearse: bool = False
) -> dict[str, Timing]:
    """Times the steps in turns, after one untimed turn; every other turn backwards, as a neighbour warms the caches.

    With `rehearse`, each runs once more right before it is timed, as a training step follows another of its kind.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _host_clock
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()()
    start = time.perf_counter()
    for repeat in range(effort.repeats):
        if repeat >= _MIN_REPEATS and time.perf_counter() - start > effort.seconds * len(steps):
            break
        for name, step in steps.items() if repeat % 2 else reversed(steps.items()):
            if rehearse:
                step()()
            backward, forward_ms = clock(step)
            _, backward_ms = clock(backward)
            samples[name].append((forward_ms, backward_ms))
    return {name: Timing(*(_quantiles(ms) for ms in zip(*pairs, strict=True))) for name, pairs in samples.items()}


def time_host(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Median milliseconds of `call` as the host waits for it, the device's work included, after one untimed call."""
    call()
    samples = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3)
    return float(np.median(samples))


def peaks_of(hardware: str) -> tuple[float, float] | None:
    """Peak dense 16-bit TFLOP/s and memory GB/s of a GPU by its name; None where the table lacks it."""
    return next((peaks for name, peaks in _PEAKS.items() if name in hardware), None)


def describe_machine(device: torch.device) -> Machine:
    """Device, versions and git revision."""
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_cpu_model()}, {torch.get_num_threads()} threads"
    )
    return Machine(
        hardware=hardware,
        torch=torch.__version__,
        triton=_version("triton"),
        flash_attn=_version("flash-attn-3", "flash-attn"),
        git=_git_revision(),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory."""
    # The CPU allocator has no exception of its own.
    return isinstance(error, torch.cuda.OutOfMemoryError) or "not enough memory" in str(error)


def failure_reason(error: BaseException) -> str:
    """One line for a table."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, NotImplementedError):
        return str(error)
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first_line[:160]}"


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Dataclasses of one type, one a line, under their fields' names; numbers to six digits."""
    names = [field.name for field in fields(rows[0])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], Any]], tuple[Any, float]]:
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(call: Callable[[], Any]) -> tuple[Any, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(_HEAD_START_CYCLES)  # while the host queues the call, so that launches are not what is timed
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)

    return clock


def _host_clock(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - start) * 1e3


def _quantiles(milliseconds: Sequence[float]) -> Quantiles:
    return Quantiles(*(float(q) for q in np.quantile(milliseconds, (0.2, 0.5, 0.8))))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(*packages: str) -> str:
    """Of the first that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_revision() -> str:
    """Short hash of the repository, with a + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.strip() + ("+" if changes.stdout.strip() else "")
