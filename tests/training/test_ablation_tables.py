"""The tables of short runs: every cell, with runs that are finished, failed, in progress, or not begun."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from transfusion_fast.training.ablation import FIGURES, Comparison, write_tables

PAIR = Comparison("pair", "arXiv 1", "caption_accuracy", "one", {"two": ("better", "a.b=2 a.c=3")})
SHARED = Comparison("shared", "arXiv 2", "loss", "first", {"second": ("worse", "d=4"), "third": ("equal", "e=5")})


def row(run: str, seed: int, outcome: str = "finished", revision: str = "r1", **figures: Any) -> dict[str, Any]:
    known = {"data": "digits", "settings": "", "seed": seed, "steps": 1200 if figures else None, "seconds": 60}
    return {"run": run, **known, "outcome": outcome, **dict.fromkeys(FIGURES), **figures, "revision": revision}


BASE = [row("base-0", 0, loss=2.0, caption_accuracy=0.25), row("base-1", 1, 'a, "b"', "r3 r1")]
ROWS = {
    ("pair", "one"): BASE,
    ("pair", "two"): [
        row("two-0", 0, loss=1.0, caption_accuracy=0.5, frechet_distance=1234.567, step_seconds=0.126),
        row("two-1", 1, loss=2.0, caption_accuracy=0.75, frechet_distance=1234.567),
    ],
    ("shared", "first"): BASE,
    ("shared", "second"): [row("second-0", 0, "unfinished", "r2"), row("second-1", 1, "unfinished", "")],
    ("shared", "third"): [row("third-0", 0, loss=2.5, text_loss=0.1234), row("third-1", 1, "unfinished", "")],
}
BEGUN = ["base-0", "base-1", "two-0", "two-1", "second-0", "third-0"]


def test_the_csv_file_has_each_run_that_has_begun_once(tmp_path: Path) -> None:
    write_tables(tmp_path, [PAIR, SHARED], ROWS)
    with (tmp_path / "ablations.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    rows = {one["run"]: one for own in ROWS.values() for one in own}
    expected = [{k: "" if v is None else str(v) for k, v in rows[name].items()} for name in BEGUN]
    assert found == expected
    head = (tmp_path / "ablations.csv").read_bytes().splitlines(keepends=True)[0]
    assert head == f"run,data,settings,seed,steps,seconds,outcome,{','.join(FIGURES)},revision\n".encode()


def test_the_page_judges_each_variant_on_the_seeds_of_both_and_names_failures(tmp_path: Path) -> None:
    write_tables(tmp_path, [PAIR, SHARED], ROWS)
    title, about, table, picture, failed = (tmp_path / "ablations.md").read_text().split("\n\n", 4)
    assert title == "# Comparisons of settings"
    assert about.startswith("Runs of 1,200 steps, revision r1, r2, r3, by train/ablate.py; ")
    assert picture == "![Differences from the baselines](ablations.png)"
    assert failed == 'Failed runs:\n\n- base-1: a, "b"\n'
    quarters = "| of it, t in (0, 250] | of it, t in (250, 500] | of it, t in (500, 750] | of it, t in (750, 1000] "
    none = " |  |  |  |  |  "
    assert table.splitlines() == [
        f"| comparison | variant | settings | seeds | loss | text loss | diffusion loss {quarters}| drawn accuracy "
        "| caption accuracy | Frechet distance | seconds per step | expected | judged by | agrees |",
        f"| {' | '.join(['---'] * 18)} |",
        f"| pair | one |  | 1 | 2.000 |  | {none}| 0.250 |  |  | baseline |  |  |",
        f"| pair | two | `a.b=2 a.c=3` | 2 | 1.500 ± 0.500 |  | {none}| 0.625 ± 0.125 | 1,234.57 ± 0.00 | 0.13 "
        "| better (arXiv 1) | caption accuracy | yes, of one seed |",
        f"| shared | first |  | 1 | 2.000 |  | {none}| 0.250 |  |  | baseline |  |  |",
        f"| shared | second | `d=4` | 0 |  |  | {none}|  |  |  | worse (arXiv 2) | loss | not measured |",
        f"| shared | third | `e=5` | 1 | 2.500 | 0.123 | {none}|  |  |  | equal (arXiv 2) | loss | no, of one seed |",
    ]


def test_nothing_begun_is_a_page_without_figures(tmp_path: Path) -> None:
    rows = {key: [row("x", 0, "unfinished", "")] for key in ROWS}
    write_tables(tmp_path, [PAIR, SHARED], rows)
    page = (tmp_path / "ablations.md").read_text()
    assert "Runs of 0 steps, revision unknown, by" in page and page.endswith("Failed runs:\n\n- none\n")
    assert page.count("not measured") == 3 and (tmp_path / "ablations.csv").read_text().count("\n") == 1
