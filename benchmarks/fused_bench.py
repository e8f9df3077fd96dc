"""The command line that the benchmarks of the fused memory-bound ops share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fused_report
import torch
from fused_compare import COMPILED, OURS, PLAIN, Problem, compare
from measure import Effort, choose_device, describe_machine, write_csv

from transfusion_fast.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKENDS = (*OURS, PLAIN, COMPILED)


@dataclass(frozen=True)
class Where:
    """What problems are made for; `tiny` ones take no time to speak of."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool

    def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal noise, of `dtype` if given; another for each seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or self.dtype)


def main(
    name: str,
    title: str,
    description: str | None,
    problems: list[Callable[[Where], Problem]],
    arguments: list[str] | None,
) -> int:
    """Writes DIR/NAME.csv, .md and .png; returns the exit code."""
    options = _parse(description, arguments)
    program = f"{name}_bench"
    try:
        device = choose_device(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = _measure(program, name, problems, device, options)
        fused_report.write(rows, name, title, options.out)
    except (InputError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return int(any(row.status.startswith("FAILED") for row in rows))


def _parse(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=1, help="to time each backend for (default: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, in seconds")
    return parser.parse_args(arguments)


def _measure(
    program: str,
    name: str,
    problems: list[Callable[[Where], Problem]],
    device: torch.device,
    options: argparse.Namespace,
) -> list[fused_report.Row]:
    """The table is up to date after each problem, should the run be cut off."""
    machine = describe_machine(device)
    rows: list[fused_report.Row] = []
    for dtype in options.dtypes:
        where = Where(device, DTYPES[dtype], options.quick)
        for make in problems:
            problem = make(where)
            outcomes, copies = compare(problem, options.backends, Effort(100, options.seconds))
            rows += fused_report.rows_of(problem, outcomes, copies, machine)
            write_csv(rows, options.out / f"{name}.csv")
            print(f"{program}: {problem.op}, {problem.shape}, {dtype}: done", file=sys.stderr)
    return rows
