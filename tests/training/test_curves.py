"""The picture of the curves of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from transfusion_fast.training.curves import PANELS, draw_curves, read_curves, running_mean

HELD_OUT = {"text_loss": {((25.0, 7.0), (30.0, 6.0))}, "diffusion_loss": {((25.0, 8.0), (30.0, 5.0))}}


def write_run(folder: Path, scale: float, *, held_out: bool = False) -> Path:
    """Write three rows in which each curve has values of its own, one of them null."""
    folder.mkdir(parents=True)
    rows = [{"step": 10 * n, **{name: scale * n * (k + 1) for k, name in enumerate(PANELS)}} for n in (1, 2, 3)]
    rows[1]["diffusion_loss_q1"] = None
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if held_out:
        old = '{"step": 25, "text_loss": 7.0, "diffusion_loss": 8.0}\n'  # without losses by quarter
        new = '{"step": 30, "text_loss": 6.0, "diffusion_loss": 5.0, "diffusion_loss_q2": 4.0}\n'
        (folder / "validation.jsonl").write_text(old + new)
    return folder


def test_a_running_mean_leaves_out_what_is_unknown_and_ends_with_what_there_is() -> None:
    values = np.array([1.0, 3.0, np.nan, 7.0, 9.0])
    assert running_mean(values, 1).tolist() == [2, 2, 5, 8, 8]
    assert np.array_equal(running_mean(values, 0), values, equal_nan=True)


def test_each_panel_has_the_curve_of_each_run_and_held_out_losses_where_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / "one", 1.0, held_out=True), write_run(tmp_path / "other", 100.0)]
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **o: (figures.append(figure), save(figure, *a, **o)))
    draw_curves(tmp_path / "curves.png", read_curves(runs))
    [figure] = figures
    for k, (axes, name) in enumerate(zip(figure.axes, PANELS, strict=True)):
        drawn = {tuple(zip(*line.get_data(), strict=True)) for line in axes.lines}
        if name == "diffusion_loss_q2":
            [points] = [line.get_data() for line in axes.lines if line.get_marker() == "o"]
            np.testing.assert_array_equal(points, [[25, 30], [np.nan, 4]])
            continue
        if name == "diffusion_loss_q1":  # null at step 20
            assert [line.get_ydata()[1] for line in axes.lines] == pytest.approx([np.nan] * 4, nan_ok=True)
            continue
        expected = {tuple((10.0 * n, scale * n * (k + 1)) for n in (1, 2, 3)) for scale in (1.0, 100.0)}
        expected |= HELD_OUT.get(name, set())
        assert drawn == expected, name
        assert (axes.get_yscale() == "log") == (name not in ("lr", "tokens_per_second"))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "other", "held-out data"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1560, 1080)


def test_runs_in_folders_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "run", 1.0) for parent in ("a", "b")]
    assert [run.name for run in read_curves([*runs, write_run(tmp_path / "c", 1.0)])] == [*map(str, runs), "c"]


def test_rows_with_numbers_that_no_float_can_hold_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1.0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 40, "loss": {10**400}}}\n{{"step": {10**400}, "loss": 1.0}}\n')
    [curves] = read_curves([run])
    assert curves.training["step"].tolist() == [10, 20, 30]
