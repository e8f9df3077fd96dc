"""Rows of the attention benchmark, and what is written of them: a CSV file, a summary in Markdown, a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from attn_problem import Problem
from measure import NOT_MEASURED, Machine, Timing, peaks_of

# Blank: not defined for this row, such as a share of a peak that is not known.
Cell = float | str

BASELINES = ("sdpa_dense", "sdpa_documents")


@dataclass(frozen=True)
class Measured:
    """What one backend took on one problem."""

    prepare_ms: float
    timing: Timing
    peak_mib: float


@dataclass(frozen=True)
class Outcome:
    """A backend on a problem: measured, or only a status that says why not."""

    status: str
    measured: Measured | None = None


@dataclass(frozen=True)
class Row:
    """One line of attention.csv: milliseconds, MiB, TFLOP/s by exact area, percent of the GPU's peaks."""

    op: str
    mix: str
    T: int
    H: int
    G: int
    D: int
    dtype: str
    backend: str
    hardware: str
    torch: str
    triton: str
    flash_attn: str
    git: str
    visible_area: int
    prepare_ms: Cell
    forward_p20: Cell
    forward_p50: Cell
    forward_p80: Cell
    backward_p20: Cell
    backward_p50: Cell
    backward_p80: Cell
    peak_mib: Cell
    forward_tflops: Cell
    backward_tflops: Cell
    forward_percent_of_peak: Cell
    backward_percent_of_peak: Cell
    forward_gbs: Cell
    forward_percent_of_bandwidth: Cell
    times_sdpa_dense: Cell
    times_sdpa_documents: Cell
    status: str

    @property
    def failed(self) -> bool:
        """Whether it computed something wrong, or ours broke."""
        return self.status.startswith("FAILED")

    @property
    def total_ms(self) -> float | None:
        """Both medians; None where not measured."""
        both = (self.forward_p50, self.backward_p50)
        return sum(ms for ms in both if isinstance(ms, float)) if self.status.startswith("ok") else None


_NAMES = [field.name for field in fields(Row)]
_MEASURED = _NAMES[_NAMES.index("prepare_ms") : _NAMES.index("status")]


def causal_area(problem: Problem) -> int:
    """Visible pairs of the documents without their images."""
    return sum(length * (length + 1) // 2 for length in problem.lengths)


def make_rows(
    mix: str, problem: Problem, outcomes: dict[str, Outcome], causal_only: set[str], machine: Machine
) -> list[Row]:
    """The rows of one problem, with each backend's ratio to the baselines of the same run."""
    totals = {name: o.measured.timing.total for name, o in outcomes.items() if o.measured}
    rows = []
    for name, outcome in outcomes.items():
        area = causal_area(problem) if name in causal_only else problem.layout.area
        cells: dict[str, Any] = dict.fromkeys(_MEASURED, NOT_MEASURED)
        if outcome.measured:
            cells |= _figures(problem, area, outcome.measured, machine.hardware)
            cells |= {f"times_{baseline}": _ratio(totals, baseline, name) for baseline in BASELINES}
        row = Row(
            op="attention",
            mix=mix,
            T=problem.layout.total_length,
            H=problem.heads,
            G=problem.kv_heads,
            D=problem.head_dim,
            dtype=str(problem.dtype).removeprefix("torch."),
            backend=name,
            **asdict(machine),
            visible_area=area,
            **cells,
            status=outcome.status,
        )
        rows.append(row)
    return rows


def _figures(problem: Problem, area: int, measured: Measured, hardware: str) -> dict[str, Cell]:
    T, H, G, D = problem.layout.total_length, problem.heads, problem.kv_heads, problem.head_dim
    forward, backward = measured.timing.forward, measured.timing.backward
    forward_tflops, backward_tflops = 4 * H * D * area / forward.p50 / 1e9, 10 * H * D * area / backward.p50 / 1e9
    least_bytes = problem.dtype.itemsize * T * D * (2 * H + 2 * G) + 4 * T * H
    gbs = least_bytes / forward.p50 / 1e6
    peak_tflops, peak_gbs = peaks_of(hardware) or (None, None)
    if problem.dtype.itemsize != 2:
        peak_tflops = None
    return {
        "prepare_ms": measured.prepare_ms,
        **{f"forward_{name}": ms for name, ms in asdict(forward).items()},
        **{f"backward_{name}": ms for name, ms in asdict(backward).items()},
        "peak_mib": measured.peak_mib,
        "forward_tflops": forward_tflops,
        "backward_tflops": backward_tflops,
        "forward_percent_of_peak": _percent(forward_tflops, peak_tflops),
        "backward_percent_of_peak": _percent(backward_tflops, peak_tflops),
        "forward_gbs": gbs,
        "forward_percent_of_bandwidth": _percent(gbs, peak_gbs),
    }


def _percent(value: float, peak: float | None) -> Cell:
    return "" if peak is None else 100 * value / peak


def _ratio(totals: dict[str, float], baseline: str, name: str) -> Cell:
    """How many times as fast as the baseline, forward and backward together."""
    return totals[baseline] / totals[name] if {baseline, name} <= totals.keys() else NOT_MEASURED


def text_summary(rows: Sequence[Row]) -> str:
    """The measured rows, aligned, then what failed and what was not measured."""
    table = _aligned([_HEADINGS, *(_cells(row) for row in rows if row.total_ms is not None)])
    return "\n\n".join([table, *(f"{title}\n" + "\n".join(lines) for title, lines in _exceptions(rows).items())])


def markdown(rows: Sequence[Row], machine: Machine, picture: str) -> str:
    """The summary that attention.md holds."""
    measured = [row for row in rows if row.total_ms is not None]
    table = [_HEADINGS, ["---"] * len(_HEADINGS), *(_cells(row) for row in measured)]
    parts = [
        "# Hybrid attention",
        f"{machine.hardware}; torch {machine.torch}, triton {machine.triton}, flash-attn {machine.flash_attn}; "
        f"revision {machine.git}.",
        f"![Rates of forward and backward together]({picture})",
        "\n".join("| " + " | ".join(cells) + " |" for cells in table) if measured else "Nothing was measured.",
        _NOTES,
        *(f"## {title}\n\n" + "\n".join(lines) for title, lines in _exceptions(rows).items()),
    ]
    return "\n\n".join(parts) + "\n"


def _exceptions(rows: Sequence[Row]) -> dict[str, list[str]]:
    """A list under each title that has something in it."""
    failed = [f"- {_shape(row)}, {row.backend}: {row.status.removeprefix('FAILED: ')}" for row in rows if row.failed]
    return {title: lines for title, lines in (("Failed", failed), ("Not measured", _not_measured(rows))) if lines}


def _not_measured(rows: Sequence[Row]) -> list[str]:
    """One line for each backend and reason, with the shapes it holds for, and one for the columns left open."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status.startswith(NOT_MEASURED):
            reason = row.status.removeprefix(f"{NOT_MEASURED}: ")
            shapes.setdefault((row.backend, reason), []).append(_shape(row))
    every = len({_shape(row) for row in rows})
    lines = [
        f"- {backend}, {'all shapes' if len(where) == every else ', '.join(where)}: {reason}"
        for (backend, reason), where in shapes.items()
    ]
    if any(row.total_ms is not None and row.forward_percent_of_peak == "" for row in rows):
        lines.append("- percent of peak: no 16-bit peak is on record for this hardware and dtype")
    return lines


_NOTES = """\
Forward and backward are medians in ms (20th to 80th percentile); TFLOP/s and the percent of peak count 4 and 10
operations for each head dimension and visible pair. `x dense` and `x documents` say how many times as fast as dense
and per-document SDPA a backend is in this run, forward and backward together. Prepare is what a micro-batch needs once:
ours builds its layout in it, the others are given theirs. Every backend passed the correctness gate before it was
timed, except flash_varlen_causal, which computes another mask: its rate, by the area of its own mask, is a reference
only. Times of a CPU that others use too are worth no more than their ratios."""

_HEADINGS = [
    "mix", "T", "D", "backend", "prepare", "forward", "backward", "MiB", "TFLOP/s", "% of peak", "x dense",
    "x documents",
]  # fmt: skip


def _cells(row: Row) -> list[str]:
    def spread(p20: Cell, p50: Cell, p80: Cell) -> str:
        return f"{_short(p50)} ({_short(p20)}-{_short(p80)})"

    return [
        row.mix,
        str(row.T),
        str(row.D),
        row.backend,
        _short(row.prepare_ms),
        spread(row.forward_p20, row.forward_p50, row.forward_p80),
        spread(row.backward_p20, row.backward_p50, row.backward_p80),
        _short(row.peak_mib),
        f"{_short(row.forward_tflops)} / {_short(row.backward_tflops)}",
        f"{_short(row.forward_percent_of_peak)} / {_short(row.backward_percent_of_peak)}",
        _short(row.times_sdpa_dense),
        _short(row.times_sdpa_documents),
    ]


def _short(cell: Cell) -> str:
    """Three digits; a dash for what is not known, which the text explains."""
    if isinstance(cell, str):
        return "-"
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def _shape(row: Row) -> str:
    return f"{row.mix} T={row.T} D={row.D}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
