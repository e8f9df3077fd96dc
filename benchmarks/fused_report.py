"""Rows, table and picture of the benchmarks of the fused memory-bound ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from fused_compare import PLAIN, Outcome, Problem
from matplotlib import pyplot as plt
from measure import NOT_MEASURED, Machine, Timing, write_csv

Cell = float | str


@dataclass(frozen=True)
class Row:
    """One backend on one problem: milliseconds, MiB, GB/s of the bytes that a pass needs at least."""

    op: str
    shape: str
    dtype: str
    backend: str
    hardware: str
    torch: str
    triton: str
    git: str
    forward_least_bytes: int
    backward_least_bytes: int
    forward_p20: Cell
    forward_p50: Cell
    forward_p80: Cell
    backward_p20: Cell
    backward_p50: Cell
    backward_p80: Cell
    peak_mib: Cell
    forward_gbs: Cell
    backward_gbs: Cell
    forward_copy_gbs: float
    backward_copy_gbs: float
    forward_of_copy: Cell
    backward_of_copy: Cell
    times_plain: Cell
    status: str

    @property
    def measured(self) -> bool:
        """Whether there are times."""
        return self.status == "ok"


def rows_of(problem: Problem, outcomes: Sequence[Outcome], copies: Timing, machine: Machine) -> list[Row]:
    """`times_plain`: how many times as fast as plain PyTorch, forward and backward together."""
    bound = [_gbs(count, ms) for count, ms in zip(problem.least, _medians(copies), strict=True)]
    plain = next((o.timing for o in outcomes if o.backend == PLAIN), None)
    return [
        Row(
            op=problem.op,
            shape=problem.shape,
            dtype=str(problem.inputs[0].dtype).removeprefix("torch."),
            backend=outcome.backend,
            hardware=machine.hardware,
            torch=machine.torch,
            triton=machine.triton,
            git=machine.git,
            forward_least_bytes=problem.least[0],
            backward_least_bytes=problem.least[1],
            forward_copy_gbs=bound[0],
            backward_copy_gbs=bound[1],
            status=outcome.status,
            **_figures(outcome, problem.least, bound, plain),
        )
        for outcome in outcomes
    ]


def _figures(outcome: Outcome, least: tuple[int, int], bound: Sequence[float], plain: Timing | None) -> dict[str, Cell]:
    timing, figures = outcome.timing, dict[str, Cell]()
    for number, name in enumerate(("forward", "backward")):
        quantiles = None if timing is None else asdict(getattr(timing, name))
        for quantile in ("p20", "p50", "p80"):
            figures[f"{name}_{quantile}"] = NOT_MEASURED if quantiles is None else quantiles[quantile]
        rate = None if timing is None else _gbs(least[number], _medians(timing)[number])
        figures[f"{name}_gbs"] = NOT_MEASURED if rate is None else rate
        figures[f"{name}_of_copy"] = NOT_MEASURED if rate is None else rate / bound[number]
    figures["peak_mib"] = NOT_MEASURED if outcome.peak_bytes is None else outcome.peak_bytes / 2**20
    figures["times_plain"] = NOT_MEASURED if timing is None or plain is None else plain.total / timing.total
    return figures


def _gbs(count: int, milliseconds: float) -> float:
    return count / milliseconds / 1e6


def _medians(timing: Timing) -> tuple[float, float]:
    return timing.forward.p50, timing.backward.p50


def write(rows: Sequence[Row], name: str, title: str, out: Path) -> None:
    """NAME.csv, NAME.md, NAME.png."""
    write_csv(rows, out / f"{name}.csv")
    text = markdown(rows, title, f"{name}.png")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    _draw([row for row in rows if row.measured], title, out / f"{name}.png")
    print(text)


def markdown(rows: Sequence[Row], title: str, picture: str) -> str:
    """The table, what its columns mean, and what failed or was left out."""
    first = rows[0]
    lines = [
        f"# {title}",
        "",
        f"{first.hardware}; torch {first.torch}, triton {first.triton}; revision {first.git}.",
        "",
        f"![Share of a copy's rate]({picture})",
        "",
        "| op | shape | dtype | backend | forward ms | backward ms | GB/s | of a copy's rate | MiB | x plain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(row) for row in rows if row.measured),
        "",
        "Medians (20th to 80th percentile). GB/s count each input and each output once; a copy of as many bytes, timed "
        "in the same run, is their yardstick, not a limit: a pass that reads more than it writes may be "
        "faster. `x plain`: how many times as fast as plain PyTorch, forward and "
        "backward together. Peak memory is of one forward and backward beyond the inputs. Everything was checked "
        "against the specification in fp64 before it was timed. Times of a CPU that others use too are worth nothing "
        "where their spread is wide, and otherwise no more than their ratios.",
        "",
    ]
    left = list(dict.fromkeys(f"- {row.op}, {row.backend}: {row.status}" for row in rows if not row.measured))
    return "\n".join([*lines, *left, ""] if left else lines)


def _line(row: Row) -> str:
    passes = [
        f"{getattr(row, f'{name}_p50'):.3g} ({getattr(row, f'{name}_p20'):.3g}-{getattr(row, f'{name}_p80'):.3g})"
        for name in ("forward", "backward")
    ]
    cells = [
        row.op,
        row.shape,
        row.dtype,
        row.backend,
        *passes,
        f"{row.forward_gbs:.3g} / {row.backward_gbs:.3g}",
        f"{row.forward_of_copy:.2f} / {row.backward_of_copy:.2f}",
        f"{row.peak_mib:.3g}",
        "-" if row.times_plain == NOT_MEASURED else f"{row.times_plain:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """A panel a pass; a group of bars a problem, a color a backend."""
    problems = list(dict.fromkeys((row.op, row.shape, row.dtype) for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    height = 0.8 / max(1, len(backends))
    figure, panels = plt.subplots(1, 2, figsize=(12, 0.28 * len(rows) + 1.8), sharey=True)
    for panel, name in zip(panels, ("forward", "backward"), strict=True):
        for number, backend in enumerate(backends):
            own = [row for row in rows if row.backend == backend]
            places = [problems.index((row.op, row.shape, row.dtype)) + number * height for row in own]
            shares = [getattr(row, f"{name}_of_copy") for row in own]
            panel.barh(places, shares, height, color=f"C{number}", label=backend)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlabel(f"{name}: share of a copy's rate")
        panel.grid(axis="x", alpha=0.3)
    if rows:
        middle = height * (len(backends) - 1) / 2
        panels[0].set_yticks([i + middle for i in range(len(problems))], [f"{o}, {s}, {d}" for o, s, d in problems])
        panels[0].set_ylim(len(problems) - 1 + 0.8, -0.2)
        panels[1].legend(loc="best")
        figure.suptitle(f"{title}, {rows[0].hardware}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
