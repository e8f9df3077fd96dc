"""Time and memory of forward and backward passes, and the machine that they were measured on.

A pass to measure is a `Step`: calling it runs the forward pass and returns a function that runs the backward pass. On a
GPU, `triton.testing.do_bench` repeats each step and flushes the L2 cache. On a CPU, the steps take turns, so that other
programs slow all of them equally; only ratios of such times are worth quoting.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's messages about its own start and end

import numpy as np
import torch
import triton
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

from transfusion_fast.errors import InputError

NOT_MEASURED = "not measured"
NEEDS_CUDA = "needs a CUDA device"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("forward", "backward")

Step = Callable[[], Callable[[], object]]
Times = dict[str, float]
"""Milliseconds of both passes by column: forward_p20, forward_p50, forward_p80 and the same of backward."""
COLUMNS = tuple(f"{name}_{quantile}" for name in PASSES for quantile in ("p20", "p50", "p80"))

_MIN_REPEATS = 3
_HEAD_START_CYCLES = 5_000_000  # about 3 ms of a GPU's time
# Dense 16-bit TFLOP/s and memory GB/s from the data sheets, by the first name that is part of the GPU's own name.
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


class Unfinished(Exception):
    """Time ran out before everything was measured."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: --out and --device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    return parser


def run_benchmark(program: str, options: argparse.Namespace, measure: Callable[[torch.device], bool]) -> int:
    """Make --out, run `measure` on the chosen device, and return the exit code: 1 where `measure` returns False.

    Errors in the user's input are printed in one line, with exit code 2, and `Unfinished` likewise, with exit code 3.
    """
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda needs a GPU that torch can use, and there is none; use --device cpu")
        options.out.mkdir(parents=True, exist_ok=True)
        return 0 if measure(device) else 1
    except (InputError, OSError, Unfinished) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 3 if isinstance(error, Unfinished) else 2


def time_steps(
    steps: Mapping[str, Step], device: torch.device, seconds: float, rehearse: bool = False
) -> dict[str, Times]:
    """Time each step for about `seconds`, and at least three times.

    With `rehearse`, a step on a CPU also runs untimed right before each timed run, because in training a step follows
    another step of the same kind.
    """
    if device.type == "cuda":
        samples = {name: _time_on_gpu(step, seconds) for name, step in steps.items()}
    else:
        samples = _time_in_turns(steps, seconds, rehearse)
    quantiles = {name: np.quantile(pairs, (0.2, 0.5, 0.8), axis=0) for name, pairs in samples.items()}
    return {name: dict(zip(COLUMNS, found.T.flatten().tolist(), strict=True)) for name, found in quantiles.items()}


def both_ms(times: Times) -> float:
    """Return the sum of both medians, in milliseconds."""
    return times["forward_p50"] + times["backward_p50"]


def _time_on_gpu(step: Step, seconds: float) -> list[tuple[float, float]]:
    """Return the milliseconds of both passes for each repeat.

    `do_bench` flushes the L2 cache before the forward pass; between the passes it is flushed here. Events split the
    passes, because a second backward pass over one graph would forbid compiled code to reuse its buffers. The GPU
    sleeps before each pass while the host queues it, so that launches are not what is timed.
    """
    driver = triton.runtime.driver.active
    device, cache = driver.get_device_interface(), driver.get_empty_cache_for_benchmark()
    marks: list[Any] = []

    def both_passes() -> None:
        events = [device.Event(enable_timing=True) for _ in range(4)]
        torch.cuda._sleep(_HEAD_START_CYCLES)
        events[0].record()
        backward = step()
        events[1].record()
        driver.clear_cache(cache)
        torch.cuda._sleep(_HEAD_START_CYCLES)
        events[2].record()
        backward()
        events[3].record()
        marks.append(events)

    repeats = len(triton.testing.do_bench(both_passes, rep=int(1e3 * seconds), return_mode="all"))
    # do_bench repeats a slow step only once; its untimed calls before that are as good.
    chosen = marks[-max(repeats, _MIN_REPEATS) :]
    return [(a.elapsed_time(b), c.elapsed_time(d)) for a, b, c, d in chosen]


def _time_in_turns(steps: Mapping[str, Step], seconds: float, rehearse: bool) -> dict[str, list[tuple[float, float]]]:
    """Return the milliseconds of both passes for each repeat of each step.

    Every other turn runs in reverse order, because a step finds the caches as the step before it left them.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()()
    begin, repeat = benchmark.timer(), 0
    while repeat < _MIN_REPEATS or benchmark.timer() - begin < seconds * len(steps):
        for name, step in steps.items() if repeat % 2 else reversed(steps.items()):
            if rehearse:
                step()()
            start = benchmark.timer()
            backward = step()
            middle = benchmark.timer()
            backward()
            samples[name].append((1e3 * (middle - start), 1e3 * (benchmark.timer() - middle)))
        repeat += 1
    return samples


def allocated_bytes(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Return the bytes that a call allocates and that live as long as its result, and the most at any time.

    They count whoever holds them: autograd, or selective checkpointing, which saved-tensor hooks do not see. What only
    cycles of references keep alive counts too, unless `call` collects it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        kept, peak = torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
        del result
        return kept, peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in events if event.device_type() == torch.autograd.DeviceType.CPU]
    return sum(changes), int(max(np.cumsum([0, *changes])))


def peaks_of(hardware: str) -> tuple[float | None, float | None]:
    """Return the peak dense 16-bit TFLOP/s and memory GB/s of a GPU by its name, or None for an unknown GPU."""
    return next((peaks for name, peaks in _PEAKS.items() if name in hardware), (None, None))


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the columns that every row of results has: hardware, versions and git revision."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8") if info.exists() else "")
        hardware = f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"
    # The hash ends in a + where tracked files differ from it.
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    installed = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
    flash_attn = installed.get("flash-attn-3", installed.get("flash-attn", "not installed"))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "flash_attn": flash_attn}
    return {"hardware": hardware, **versions, "git": revision}
