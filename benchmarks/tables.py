"""Tables and plots of results: CSV files, Markdown tables, and pictures."""

import string
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Row = dict[str, Any]
Columns = Mapping[str, str]
_CPU_NOTE = "Times of a CPU that others use too mean nothing where their spread is wide; else only their ratios do."


class _Cells(string.Formatter):
    """Format strings that show a dash for a missing number, and that never fall back to exponents for large ones."""

    def format_field(self, value: Any, spec: str) -> str:
        if spec and isinstance(value, str | None):
            return "-"
        return super().format_field(value, ".0f" if spec == ".3g" and abs(value) >= 100 else spec)


def markdown_table(rows: Iterable[Row], columns: Columns) -> str:
    """Return a table in Markdown; `columns` maps each heading to a format string of a row's values."""
    lines = [columns, ["---"] * len(columns)]
    lines += ([_Cells().vformat(form, (), row) for form in columns.values()] for row in rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(name: str, spec: str = ".3g", suffix: str = "") -> str:
    """Return the format string of a pass's median and, in brackets, its 20th and 80th percentile."""
    p20, p50, p80 = (f"{{{name}_{quantile}{suffix}:{spec}}}" for quantile in ("p20", "p50", "p80"))
    return f"{p50} ({p20}-{p80})"


def list_unmeasured(rows: Sequence[Row], problem: str) -> str:
    """Return a list of each backend's statuses other than "ok"; `problem` is the format of a problem's name."""
    frame = pd.DataFrame([row | {"problem": problem.format_map(row)} for row in rows])
    count, lines = frame.problem.nunique(), []
    for (backend, status), names in frame.groupby(["backend", "status"], sort=False).problem:
        if not status.startswith("ok"):
            lines.append(f"- {backend}, {'all problems' if len(names) == count else '; '.join(names)}: {status}")
    return "\n".join(lines)


def list_broken(rows: Sequence[Row]) -> str:
    """Return how many compiled configurations break a rule, and which."""
    broken = [f"- {row['name']}: {row['broken_rules']}" for row in rows if row["broken_rules"]]
    return "\n".join([f"{len(rows)} configurations compiled, {len(broken)} break a rule.", *broken])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line per row, with floats to six digits and an empty cell for None."""
    cells = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    pd.DataFrame(cells, dtype=object).to_csv(path, index=False)  # objects: an integer beside None stays an integer


def write_report(path: Path, title: str, rows: Sequence[Row], columns: Columns, *notes: str) -> None:
    """Write PATH.csv, and PATH.md with a table of the measured rows below PATH.png, if there is one."""
    write_csv(rows, path.with_suffix(".csv"))
    machine = "{hardware}; torch {torch}, triton {triton}, flash-attn {flash_attn}; revision {git}.".format_map(rows[0])
    measured = [row for row in rows if row.get("status", "ok").startswith("ok")]
    table = markdown_table(measured, columns) if measured else "Nothing was measured."
    picture = f"![{title}]({path.name}.png)" if path.with_suffix(".png").exists() else ""
    write_markdown(path.with_suffix(".md"), f"# {title}", machine, picture, table, *notes, _CPU_NOTE)


def write_comparison(
    path: Path, title: str, groups: Iterable[list[Row]], problem: str, panels: Columns, columns: Columns, notes: str,
    earlier: Sequence[Row] = (), section: Callable[[Sequence[Row]], str] = lambda rows: "",
) -> bool:  # fmt: skip
    """Write a report of backends on problems, one group of rows after the other; return whether no row failed.

    The CSV file is up to date after each group. `problem` is the format of a problem's name, `panels` are as in `draw`.
    Rows of an `earlier` run stand before the groups, and only those of the groups decide what is returned. `section`
    makes a part of the report from all rows.
    """
    rows = list(earlier)
    for group in groups:
        rows += group
        write_csv(rows, path.with_suffix(".csv"))
        print(f"{problem.format_map(rows[-1])}: done", file=sys.stderr)
    draw(rows, path.with_suffix(".png"), problem, "{backend}", panels)
    write_report(path, title, rows, columns, notes, list_unmeasured(rows, problem), section(rows))
    return not any(row["status"].startswith("FAILED") for row in rows[len(earlier) :])


def write_markdown(path: Path, *parts: str) -> None:
    """Write paragraphs, leaving out empty ones, and print them."""
    text = "\n\n".join(part for part in parts if part) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)


def draw(rows: Sequence[Row], path: Path, group: str, bar: str, panels: Columns) -> None:
    """Draw the measured rows as horizontal bars; `panels` maps the heading of each panel to its column.

    `group` and `bar` are formats: bars of one name have one color, and those of one group stand together.
    """
    measured = [row for row in rows if row.get("status", "ok").startswith("ok")]
    frame = pd.DataFrame([row | {"group": group.format_map(row), "bar": bar.format_map(row)} for row in measured])
    size = (6.5 * len(panels), 0.25 * len(measured) + 1.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for panel, (heading, column) in zip(axes[0], panels.items(), strict=True):
        if measured:
            shown = frame.pivot_table(column, "group", "bar", sort=False).rename_axis(columns=None)
            shown.plot(ax=panel, kind="barh", width=0.8, ylabel="", legend=panel is axes[0][-1])
        panel.set_xlabel(heading if measured else "nothing was measured")
        panel.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    save_figure(figure, path, rows[0]["hardware"])


def save_figure(figure: Figure, path: Path, title: str = "") -> None:
    """Write a figure as PNG."""
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
