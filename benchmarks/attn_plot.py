"""The picture of the attention benchmark: rates over the mixes at one length, and over the lengths of each mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from attn_report import Row
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

_COLORS = [plt.get_cmap("tab10")(number) for number in range(10)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """A row of panels for each head dimension; an empty frame that says so where nothing was measured."""
    measured = [row for row in rows if row.total_ms is not None]
    head_dims = sorted({row.D for row in measured}, reverse=True) or [0]
    mixes = [mix for mix in dict.fromkeys(row.mix for row in measured) if len(_lengths(measured, mix)) > 1]
    size = (7 + 4.2 * len(mixes), 4.2 * len(head_dims))
    figure, axes = plt.subplots(
        len(head_dims), 1 + len(mixes), figsize=size, squeeze=False, width_ratios=[1.6, *[1] * len(mixes)]
    )
    colors = dict(zip(dict.fromkeys(row.backend for row in measured), _COLORS, strict=False))
    for head_dim, panels in zip(head_dims, axes, strict=True):
        chosen = [row for row in measured if head_dim == row.D]
        _bars(panels[0], chosen, colors)
        for panel, mix in zip(panels[1:], mixes, strict=True):
            _lines(panel, [row for row in chosen if row.mix == mix], colors)
    if measured:
        hardware, dtype = measured[0].hardware, measured[0].dtype
        # Only a backend that was gated is plain "ok"; the other computes less.
        others = {row.backend: f"{row.backend} (another mask)" for row in measured if row.status != "ok"}
        handles = [Patch(color=color, label=others.get(backend, backend)) for backend, color in colors.items()]
        figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 6), frameon=False)
        figure.suptitle(f"Hybrid attention, forward + backward, {measured[0].H} heads, {dtype}, {hardware}")
    # Room below for the legend.
    figure.tight_layout(rect=(0, 0.25 / size[1] + 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(panel: Axes, rows: list[Row], colors: Mapping[str, tuple[float, ...]]) -> None:
    """The mixes at the length that most of them were measured at."""
    if not rows:
        panel.set_title("nothing was measured")
        return
    counts = Counter({row.T: 0 for row in rows})
    for length, _ in {(row.T, row.mix) for row in rows}:
        counts[length] += 1
    length = max(counts, key=lambda T: (counts[T], T))
    rows = [row for row in rows if length == row.T]
    mixes = list(dict.fromkeys(row.mix for row in rows))
    width = 0.85 / len(colors)
    for number, (backend, color) in enumerate(colors.items()):
        rates = {row.mix: _rate(row) for row in rows if row.backend == backend}
        x = [i + (number - (len(colors) - 1) / 2) * width for i, mix in enumerate(mixes) if mix in rates]
        panel.bar(x, [rates[mix] for mix in mixes if mix in rates], width, color=color)
    panel.set_xticks(range(len(mixes)), mixes)
    panel.set_title(f"T = {length:,}, D = {rows[0].D}")
    panel.set_ylabel("TFLOP/s by exact area")
    panel.grid(axis="y", alpha=0.3)


def _lines(panel: Axes, rows: list[Row], colors: Mapping[str, tuple[float, ...]]) -> None:
    for backend, color in colors.items():
        points = sorted((row.T, _rate(row)) for row in rows if row.backend == backend)
        if points:
            panel.plot(*zip(*points, strict=True), "o-", color=color, markersize=4)
    lengths = sorted({row.T for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("T")
    panel.set_title(f"{rows[0].mix}, D = {rows[0].D}" if rows else "nothing was measured")
    panel.grid(alpha=0.3)


def _lengths(rows: Sequence[Row], mix: str) -> set[int]:
    return {row.T for row in rows if row.mix == mix}


def _rate(row: Row) -> float:
    """TFLOP/s of both passes together."""
    return 14 * row.H * row.D * row.visible_area / (row.total_ms or float("inf")) / 1e9
