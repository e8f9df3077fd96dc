"""Short runs that differ in single settings, and their table: OUT/ablations.csv, ablations.md and ablations.png.

OUT/runs/NAME/      the run folder, with evaluation.json
OUT/runs/NAME.json  seconds, revisions of the code, and how the last attempt ended
OUT/runs/NAME.log   what the commands printed
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_fast.errors import optional_module
from transfusion_fast.files import read_json, write_atomically
from transfusion_fast.training.metrics import METRICS, VALIDATION, read_rows

QUARTERS = {f"diffusion_loss_q{n}": (f"of it, t in ({250 * n - 250}, {250 * n}]", -1, 3) for n in (1, 2, 3, 4)}
FIGURES = {
    # name in a row: (heading, 1 if more is better else -1, digits)
    "loss": ("loss", -1, 3),
    "text_loss": ("text loss", -1, 3),
    "diffusion_loss": ("diffusion loss", -1, 3),
    **QUARTERS,
    "generated_accuracy": ("drawn accuracy", 1, 3),
    "caption_accuracy": ("caption accuracy", 1, 3),
    "frechet_distance": ("Frechet distance", -1, 2),
    "step_seconds": ("seconds per step", -1, 2),
}
PANELS = ("text_loss", "diffusion_loss", "generated_accuracy", "caption_accuracy", "frechet_distance")


@dataclass(frozen=True)
class Comparison:
    """A baseline and variants of it, the paper that they are from, and the figure that judges its claims."""

    name: str
    paper: str
    figure: str
    baseline: str
    variants: Mapping[str, tuple[str, str]]
    """(expected by the paper: "better", "equal" or "worse" than the baseline; overrides, separated by spaces)
    of each label."""
    data: str = "digits"

    @property
    def settings(self) -> dict[str, str]:
        """The overrides of each label, the baseline's first."""
        return {self.baseline: "", **{label: settings for label, (_, settings) in self.variants.items()}}


@dataclass(frozen=True)
class Run:
    """A run in OUT/runs, and what is known of it."""

    folder: Path
    data: str
    settings: str
    seed: int

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def state(self) -> dict[str, Any]:
        """The record of its attempts; empty if there was none."""
        return read_json(self._record) or {}

    @property
    def _record(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def finished(self) -> bool:
        return self.state.get("finished", False) and (self.folder / "evaluation.json").is_file()

    @contextmanager
    def attempt(self, revision: str) -> Iterator[dict[str, Any]]:
        """Record an attempt: what is set in the state that this yields is kept, and its seconds are added."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        before, started = self.state, time.time()
        seconds, revisions = before.get("seconds", 0.0), before.get("revisions", [])
        if "started" in before and self.log.exists():  # the last attempt was killed, and its seconds not added
            seconds += max(0.0, self.log.stat().st_mtime - before["started"])
        state = {"seconds": seconds, "revisions": list(dict.fromkeys([*revisions, revision]))}
        write_atomically(self._record, json.dumps({**state, "started": started}))
        try:
            yield state
        finally:
            state["seconds"] += time.time() - started
            write_atomically(self._record, json.dumps(state))

    def row(self) -> dict[str, Any]:
        """Return its row of the table, with figures if it is finished."""
        state, found = self.state, {}
        if self.finished:
            found = read_rows(self.folder / VALIDATION)[-1] | read_json(self.folder / "evaluation.json")
            found["step_seconds"] = _step_seconds(read_rows(self.folder / METRICS))
        return {
            "run": self.folder.name,
            **{name: getattr(self, name) for name in ("data", "settings", "seed")},
            "steps": found.get("step"),
            "seconds": round(state.get("seconds", 0)),
            "outcome": "finished" if self.finished else state.get("error", "unfinished"),
            **{name: found.get(name) for name in FIGURES},
            "revision": " ".join(state.get("revisions", ())),
        }


def _step_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Return the shortest time of a step between two rows, as other programs can only make steps slower."""
    return min((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(rows))


def mean_seconds(runs: Sequence[Run]) -> float | None:
    """Return the mean duration of the finished runs, None if there is none."""
    seconds = [run.state["seconds"] for run in runs if run.finished]
    return sum(seconds) / len(seconds) if seconds else None


def verdict(claim: str, sign: int, baseline: Sequence[float], variant: Sequence[float]) -> str:
    """Return whether figures on the same seeds agree with a claim; `sign` is 1 if more is better, else -1."""
    if not baseline:
        return "not measured"
    difference, spread = _difference(baseline, variant)
    found = "equal" if abs(difference) <= spread else "better" if sign * difference > 0 else "worse"
    told = "yes" if found == claim else "within the spread" if found == "equal" else "no"
    return told + ", of one seed" * (len(baseline) == 1)


def _difference(baseline: Sequence[float], variant: Sequence[float]) -> tuple[float, float]:
    """Return the difference of the means, and both half ranges together."""
    return float(np.mean(variant) - np.mean(baseline)), float(np.ptp(variant) + np.ptp(baseline)) / 2


Rows = Mapping[tuple[str, str], Sequence[dict[str, Any]]]
"""The rows of each (comparison, label), one for each seed."""


def write_tables(out: Path, comparisons: Sequence[Comparison], rows: Rows) -> None:
    """Write the three files."""
    begun = list({row["run"]: row for own in rows.values() for row in own if row["revision"]}.values())
    text = io.StringIO()
    writer = csv.DictWriter(text, next(iter(rows.values()))[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(begun)
    write_atomically(out / "ablations.csv", text.getvalue())
    write_atomically(out / "ablations.md", "\n\n".join(_page(comparisons, rows, begun)) + "\n")
    _draw(out / "ablations.png", comparisons, rows)


def _pairs(comparison: Comparison, label: str, rows: Rows, figure: str) -> tuple[list[float], list[float]]:
    """Return a figure of the baseline and of a variant on the seeds that have both."""
    seeds = zip(rows[comparison.name, comparison.baseline], rows[comparison.name, label], strict=True)
    both = [(b[figure], v[figure]) for b, v in seeds if b[figure] is not None and v[figure] is not None]
    return [b for b, _ in both], [v for _, v in both]


def _page(comparisons: Sequence[Comparison], rows: Rows, begun: Sequence[dict[str, Any]]) -> Iterator[str]:
    revisions = ", ".join(sorted({name for row in begun for name in row["revision"].split()}))
    steps = max((row["steps"] or 0 for row in begun), default=0)
    yield "# Comparisons of settings"
    yield (
        f"Runs of {steps:,} steps, revision {revisions or 'unknown'}, by train/ablate.py; a variant with fewer steps "
        "took as long as its baseline. Figures are means over seeds, ± half of the range. A paper's expectation is "
        "judged by the difference from the baseline on the seeds of both, which counts if it exceeds both half ranges "
        "together. Losses are of held-out packs under the run's own settings: they cannot be compared across diffusion "
        "settings, noise caps and contexts."
    )
    columns = ["comparison", "variant", "settings", "seeds", *(title for title, _, _ in FIGURES.values())]
    table = [[*columns, "expected", "judged by", "agrees"]]
    table.append(["---"] * len(table[0]))
    for comparison, (label, settings) in ((c, item) for c in comparisons for item in c.settings.items()):
        own, (title, sign, _) = rows[comparison.name, label], FIGURES[comparison.figure]
        judged = ["baseline", "", ""]
        if label != comparison.baseline:
            claim = comparison.variants[label][0]
            agrees = verdict(claim, sign, *_pairs(comparison, label, rows, comparison.figure))
            judged = [f"{claim} ({comparison.paper})", title, agrees]
        figures = [_mean([row[name] for row in own], digits) for name, (_, _, digits) in FIGURES.items()]
        seeds = str(sum(row["outcome"] == "finished" for row in own))
        table.append([comparison.name, label, f"`{settings}`" if settings else "", seeds, *figures, *judged])
    yield "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    yield "![Differences from the baselines](ablations.png)"
    failed = [f"- {row['run']}: {row['outcome']}" for row in begun if row["outcome"] not in ("finished", "unfinished")]
    yield "\n".join(["Failed runs:", "", *(failed or ["- none"])])


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    spread = f" ± {np.ptp(known) / 2:.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):,.{digits}f}{spread}" if known else ""


def _draw(path: Path, comparisons: Sequence[Comparison], rows: Rows) -> None:
    """Draw the difference of each variant from its baseline; full dots are the figures that judge the claims."""
    variants = [(comparison, label) for comparison in comparisons for label in comparison.variants]
    size = (15, 1.5 + 0.36 * len(variants))
    figure = optional_module("matplotlib.figure", "examples").Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, name in zip(panels, PANELS, strict=True):
        for place, (comparison, label) in enumerate(variants):
            pair = _pairs(comparison, label, rows, name)
            if not pair[0] or (name == "diffusion_loss" and "model.diffusion." in comparison.settings[label]):
                continue  # not measured, or not comparable
            difference, spread = _difference(*pair)
            face = "C0" if name == comparison.figure else "white"
            axes.errorbar(difference, place, xerr=spread, fmt="o", color="C0", markerfacecolor=face, capsize=3)
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_title(f"{FIGURES[name][0]}\n({'more' if FIGURES[name][1] > 0 else 'less'} is better)", fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        if name == "frechet_distance":  # of failed variants it is a hundred times that of others
            axes.set_xscale("symlog", linthresh=1)
        else:
            axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(variants)), [f"{c.name}: {label}" for c, label in variants])
    panels[0].set_ylim(len(variants) - 0.5, -0.5)
    figure.supxlabel(
        "difference from the baseline, and both half ranges over seeds; full dots judge claims", fontsize=9
    )
    figure.savefig(path, format="png")
