"""Tables and plots of results: CSV files, Markdown tables, and pictures."""

import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
_CPU_NOTE = "Times of a CPU that others use too mean nothing where their spread is wide; else only their ratios do."


class _Cells(string.Formatter):
    """Format strings that show a dash for a missing number, and that never fall back to exponents for large ones."""

    def format_field(self, value: Any, spec: str) -> str:
        if spec and isinstance(value, str | None):
            return "-"
        return super().format_field(value, ".0f" if spec == ".3g" and abs(value) >= 100 else spec)


def markdown_table(rows: Iterable[Row], columns: Mapping[str, str]) -> str:
    """Return a table in Markdown; `columns` maps each heading to a format string of a row's values."""
    lines = [columns, ["---"] * len(columns)]
    lines += ([_Cells().vformat(form, (), row) for form in columns.values()] for row in rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(name: str, spec: str = ".3g", suffix: str = "") -> str:
    """Return the format string of a pass's median and, in brackets, its 20th and 80th percentile."""
    p20, p50, p80 = (f"{{{name}_{quantile}{suffix}:{spec}}}" for quantile in ("p20", "p50", "p80"))
    return f"{p50} ({p20}-{p80})"


def list_unmeasured(rows: Sequence[Row], name: str, shape: str) -> str:
    """Return a list of each status other than "ok", with the shapes it holds for; `name` and `shape` are formats."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in rows if not row["status"].startswith("ok")):
        found.setdefault((name.format_map(row), row["status"]), []).append(shape.format_map(row))
    count = len({shape.format_map(row) for row in rows})
    where = {key: "all shapes" if len(shapes) == count else ", ".join(shapes) for key, shapes in found.items()}
    return "\n".join(f"- {label}, {where[label, status]}: {status}" for label, status in found)


def list_broken(rows: Sequence[Row]) -> str:
    """Return how many compiled configurations break a rule, and which."""
    broken = [f"- {row['name']}: {row['broken_rules']}" for row in rows if row["broken_rules"]]
    return "\n".join([f"{len(rows)} configurations compiled, {len(broken)} break a rule.", *broken])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line per row, with floats to six digits and an empty cell for None."""
    cells = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    pd.DataFrame(cells, dtype=object).to_csv(path, index=False)  # objects: an integer beside None stays an integer


def write_report(path: Path, title: str, rows: Sequence[Row], columns: Mapping[str, str], *notes: str) -> None:
    """Write PATH.csv, and PATH.md with a table of the measured rows below PATH.png, if there is one."""
    write_csv(rows, path.with_suffix(".csv"))
    machine = "{hardware}; torch {torch}, triton {triton}, flash-attn {flash_attn}; revision {git}.".format_map(rows[0])
    measured = [row for row in rows if row.get("status", "ok").startswith("ok")]
    table = markdown_table(measured, columns) if measured else "Nothing was measured."
    picture = f"![{title}]({path.name}.png)" if path.with_suffix(".png").exists() else ""
    write_markdown(path.with_suffix(".md"), f"# {title}", machine, picture, table, *notes, _CPU_NOTE)


def write_markdown(path: Path, *parts: str) -> None:
    """Write paragraphs, leaving out empty ones, and print them."""
    text = "\n\n".join(part for part in parts if part) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)


def draw_bars(panel: Axes, frame: pd.DataFrame, *, horizontal: bool = False, **options: Any) -> None:
    """Draw a group of bars for each row of a table, with a bar for each column."""
    if frame.empty:
        panel.set_title("nothing was measured")
        return
    kind = {"kind": "barh", "width": 0.8} if horizontal else {"kind": "bar", "width": 0.85, "rot": 0}
    frame.plot(ax=panel, xlabel="", ylabel="", **{"legend": False, **kind, **options})
    panel.grid(axis="x" if horizontal else "y", alpha=0.3)


def save_figure(figure: Figure, path: Path, bottom: float = 0.0) -> None:
    """Write a figure as PNG, with a share of its height left free at the bottom."""
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
