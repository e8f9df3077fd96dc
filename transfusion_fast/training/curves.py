"""A picture of the curves of one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.errors import InputError, optional_module
from transfusion_fast.training.metrics import METRICS, VALIDATION, read_rows

SMOOTHING = 0.02  # fraction of all rows on either side of one that its running mean covers
PANELS = {
    # name in a row: (title, row and columns of the grid, logarithmic)
    "text_loss": ("Text loss, nats a token", (0, slice(0, 6)), True),
    "diffusion_loss": ("Diffusion loss", (0, slice(6, 12)), True),
    "diffusion_loss_q1": ("Diffusion loss, t in (0, 250]", (1, slice(0, 3)), True),
    "diffusion_loss_q2": ("t in (250, 500]", (1, slice(3, 6)), True),
    "diffusion_loss_q3": ("t in (500, 750]", (1, slice(6, 9)), True),
    "diffusion_loss_q4": ("t in (750, 1000]", (1, slice(9, 12)), True),
    "lr": ("Learning rate", (2, slice(0, 4)), False),
    "grad_norm": ("Gradient norm", (2, slice(4, 8)), True),
    "tokens_per_second": ("Tokens a second", (2, slice(8, 12)), False),
}
HELD_OUT = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1}


@dataclass(frozen=True)
class Curves:
    """The curves of one run by their names in a row, fp64 with NaN for null, each with `step`."""

    name: str
    training: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]


def read_curves(runs: Sequence[Path]) -> list[Curves]:
    """Return the curves of runs, named by their folders, or by their paths where folders have one name.

    Raises:
        InputError: a folder holds no rows.
    """
    names = [run.resolve().name for run in runs]
    names = [str(run) if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    curves = [Curves(n, *(_read(run / f) for f in (METRICS, VALIDATION))) for n, run in zip(names, runs, strict=True)]
    for one, run in zip(curves, runs, strict=True):
        if not one.training:
            raise InputError(f"{run}: is not a run folder with logged steps (no rows in {METRICS}); train first")
    return curves


def _read(path: Path) -> dict[str, np.ndarray]:
    rows = read_rows(path) if path.is_file() else []
    rows = [row for row in rows if all(x is None or isinstance(x, int | float) for x in row.values())]
    names = {name for row in rows for name in row}
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64) for name in names}


def draw_curves(path: Path, runs: Sequence[Curves]) -> None:
    """Write a PNG: each row faintly, a running mean over them, and dots for held-out data.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = optional_module("matplotlib.figure", "examples").Figure(figsize=(13, 9), dpi=120, layout="constrained")
    ticker, grid = optional_module("matplotlib.ticker", "examples"), figure.add_gridspec(3, 12)
    plain = ticker.FuncFormatter(lambda value, _: f"{value:,.6g}")
    for column, (title, (row, columns), logarithmic) in PANELS.items():
        axes = figure.add_subplot(grid[row, columns])
        for number, run in enumerate(runs):
            if column in run.training:
                _draw(axes, run.training["step"], run.training[column], f"C{number}", smoothed=column != "lr")
            if column in run.held_out:
                axes.plot(run.held_out["step"], run.held_out[column], color=f"C{number}", **HELD_OUT)
        axes.set_title(title, fontsize=10, loc="left")
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(plain)
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(plain)
        axes.xaxis.set_major_formatter(plain)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("training step", fontsize=9)
    _add_legend(figure, runs)
    figure.savefig(path, format="png")


def _draw(axes: Any, steps: np.ndarray, values: np.ndarray, color: str, *, smoothed: bool) -> None:
    if smoothed:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = running_mean(values, round(len(steps) * SMOOTHING))
    axes.plot(steps, values, color=color, linewidth=1.5)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Return the mean of each value with up to `reach` on either side of it, leaving out what is not finite."""
    known = np.isfinite(values)
    padded = (np.pad(x.astype(np.float64), reach) for x in (np.where(known, values, 0), known))
    total, number = (np.convolve(x, np.ones(2 * reach + 1), mode="valid") for x in padded)
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)


def _add_legend(figure: Any, runs: Sequence[Curves]) -> None:
    line = optional_module("matplotlib.lines", "examples").Line2D
    handles = [line([], [], color=f"C{number}", label=run.name) for number, run in enumerate(runs)]
    if any(run.held_out for run in runs):
        handles.append(line([], [], color="gray", label="held-out data", **HELD_OUT))
    figure.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False)
