"""Metrics without ranks: the files of rows, the live line, the loggers, and the counters behind them."""

import json
import math
import mmap
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import OneRank, small_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transfusion_fast.errors import InputError
from transfusion_fast.training.counters import Interval, QuarterLosses, mean_losses, peak_memory
from transfusion_fast.training.loggers import check_packages, make_loggers
from transfusion_fast.training.metrics import MetricsLog, Row
from transfusion_fast.training.profiling import StepProfiler
from transfusion_fast.training.terminal import Terminal, say

ROW = Row(
    step=90,
    packs=720,
    time=1e9,
    loss=1.5,
    text_loss=1.0,
    diffusion_loss=0.1,
    diffusion_loss_q1=0.4,
    diffusion_loss_q2=0.3,
    diffusion_loss_q3=None,
    diffusion_loss_q4=0.1,
    lr=1e-3,
    grad_norm=2.0,
    tokens_per_second=12345.6,
    tokens_per_second_per_device=6172.8,
    images_per_second=56.0,
    mfu=0.412,
    padding=0.25,
    data_wait=0.031,
    checkpoint_stall=0.0,
    peak_memory_gb=61.25,
    skipped_steps=0,
    quarantined=0,
)


def test_rows_after_the_step_resumed_from_are_dropped_and_so_is_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.log(replace(ROW, step=step))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(tmp_path, 2).log(replace(ROW, step=3, loss=math.nan, grad_norm=math.inf))
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1] == {**asdict(ROW), "step": 3, "loss": None, "grad_norm": None}  # JSON has no NaN


def test_damaged_rows_are_kept_aside_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = json.dumps(asdict(ROW)).encode()
    path.write_bytes(row + b"\n\xff\x00 half a row\n[]\n" + row + b"\n")
    before = path.read_bytes()
    MetricsLog(tmp_path, ROW.step)
    assert path.read_bytes() == row + b"\n" + row + b"\n"
    [damaged] = tmp_path.glob("metrics.damaged-*.jsonl")
    assert damaged.read_bytes() == before


def test_the_seconds_within_a_wait_are_counted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    interval, times = Interval(), iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    for wait in (interval.waiting, interval.waiting, interval.stall):
        with wait():
            pass
    assert (interval.waited, interval.stalled) == (2.5, 4.0)


def test_the_seconds_apart_are_no_part_of_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    interval, times = Interval(start=5.0), iter([10.0, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    with interval.apart():
        pass
    assert (interval.start, interval.waited, interval.stalled) == (8.0, 0.0, 0.0)


def images_of(*timesteps: list[float], fraction: float = 1.0) -> SimpleNamespace:
    """Return a batch with images, or a fraction of each, at these timesteps, one list for each modality."""
    modalities = [
        SimpleNamespace(
            timesteps=torch.tensor([*own, 1.0]), weights=torch.full((len(own),), fraction), num_trained=len(own)
        )  # and with a clean image, which has no loss
        for own in timesteps
    ]
    return SimpleNamespace(modalities=modalities)


def test_image_losses_are_averaged_by_quarter_of_the_timesteps_over_batches_and_modalities() -> None:
    losses = QuarterLosses(torch.device("cpu"))
    losses.add(images_of([1.0, 250.0, 250.5], [1000.0]), torch.tensor([1.0, 2.0, 8.0, 5.0]))
    losses.add(images_of([], [249.0, 750.5]), torch.tensor([6.0, 7.0]))
    losses.add(images_of([], []), torch.zeros(0))
    losses.add(images_of(), torch.zeros(0))
    assert mean_losses(losses.pop()) == [3.0, 8.0, None, 6.0]
    assert mean_losses(losses.pop()) == [None] * 4
    losses.add(images_of([300.0, 900.0], fraction=0.25), torch.tensor([0.5, 1.0]))
    losses.add(images_of([300.0, 900.0], fraction=0.75), torch.tensor([2.5, 2.0]))
    assert mean_losses(losses.pop()) == [None, 3.0, None, 3.0]


def test_memory_on_a_cpu_is_what_the_process_has() -> None:
    before, held = peak_memory(torch.device("cpu")), mmap.mmap(-1, 128 << 20)  # a tensor may reuse freed memory
    held[:] = bytes(len(held))
    assert 0.5 < (peak_memory(torch.device("cpu")) - before) / len(held) < 1.5


class Screen:
    """A stand-in for an output that is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.written = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass


def shown(monkeypatch: pytest.MonkeyPatch, row: Row, *, terminal: bool, columns: int = 200) -> list[str]:
    """Return the lines, rewritten ones too, for a row of a run of 100 steps, a message, and the step after the row."""
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    logger = Terminal(100, first_step=80)
    logger.last = (80, row.time - 3725)
    logger.log(row)
    say("quarantined: a pack")
    logger.step(91)
    logger.bar.refresh()
    logger.close()
    return [line.rstrip() for line in screen.written.replace("\r", "\n").split("\n") if line.strip()]


LINE = (
    "step  90/100  left 1:02:05  text 1.0000  diffusion 0.1000  norm 2.00  lr 1.00e-03  12.3k tokens/s (6.17k each)  "
    "56.0 images/s  MFU 41.2%  data wait 3.1%  61.2 GB"
)


def test_each_row_is_a_line_for_people_where_the_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, ROW, terminal=False, columns=40) == [LINE, "quarantined: a pack"]
    row = replace(ROW, tokens_per_second=6172.8, mfu=None, skipped_steps=2, quarantined=3)
    line = LINE.replace("12.3k tokens/s (6.17k each)", "6.17k tokens/s").replace("  MFU 41.2%", "")
    line = line.replace("  norm", "  skipped 2  quarantined 3  norm")
    assert shown(monkeypatch, row, terminal=False)[0] == line


def test_a_terminal_shows_one_line_with_messages_above_it_and_the_steps_between_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later = LINE.replace("step  90", "step  91").replace("left 1:02:05", "left 55:52")
    assert len(LINE) <= 165
    lines = shown(monkeypatch, ROW, terminal=True)
    assert lines[0] == LINE and lines[-1] == later
    assert lines[lines.index("quarantined: a pack") + 1] == LINE  # drawn again below the message


def test_a_narrow_terminal_shows_whole_parts_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, ROW, terminal=True, columns=60)
    assert lines[0] == "step  90/100  left 1:02:05  text 1.0000  diffusion 0.1000"


def logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *settings: str, first_step: int, steps: list[int]) -> str:
    """Log rows of these steps with the loggers of the settings, and return what is printed."""
    screen = Screen(terminal=False)
    monkeypatch.setattr("sys.stdout", screen)
    config = small_config("data", *settings)
    check_packages(config)
    loggers = make_loggers(config, tmp_path, first_step)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / "red.png")
    for logger in loggers:
        for step in steps:
            logger.log(replace(ROW, step=step, loss=step * 0.5 + first_step))
            logger.image("samples", tmp_path / "red.png", step)
        logger.close()
    return screen.written


def test_tensorboard_gets_the_numbers_and_pictures_and_a_resumed_run_continues_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging(tmp_path, monkeypatch, "train.tensorboard=true", first_step=0, steps=[1, 2, 3])
    logging(tmp_path, monkeypatch, "train.tensorboard=true", first_step=2, steps=[3, 4])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [(event.step, event.value) for event in losses] == [(1, 0.5), (2, 1.0), (3, 3.5), (4, 4.0)]
    assert losses[0].wall_time == ROW.time
    unlogged = {"train/step", "train/time", "train/diffusion_loss_q3"}  # the last one is null
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in asdict(ROW)} - unlogged
    assert [(event.step, event.width, event.height) for event in events.Images("samples")][-1] == (4, 4, 3)


class StandIn:
    """A stand-in for the module `wandb` and for its run."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0
        self.login_timeout = math.inf

    def Settings(self, login_timeout: float) -> float:
        return login_timeout

    def setup(self, login_timeout: float) -> None:
        self.login_timeout = login_timeout

    def init(self, **settings: Any) -> "StandIn":
        self.started.append(settings)
        return self

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.logged.append((numbers, step))

    def Image(self, path: str) -> str:
        return f"image {path}"

    def finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_gets_the_numbers_and_pictures_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 2):
        logging(tmp_path, monkeypatch, "train.wandb=digits", first_step=first_step, steps=[first_step + 1])
    first, second = wandb.started
    assert first == second and first["project"] == "digits" and first["resume"] == "allow" and len(first["id"]) == 8
    assert first["config"]["optimizer"]["lr"] == 0.003 and wandb.finished == 2
    limits = [first["settings"]["init_timeout"], first["settings"]["finish_timeout"], wandb.login_timeout]
    assert all(0 < limit <= 60 for limit in limits)  # seconds; without them, wandb waits for ever
    assert first["settings"]["finish_timeout_raises"]
    numbers = {f"train/{k}": v for k, v in asdict(ROW).items() if k not in ("step", "time") and v is not None}
    picture = ({"samples": f"image {tmp_path / 'red.png'}"}, 3)
    assert wandb.logged[2:] == [({**numbers, "train/loss": 3.5}, 3), picture]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_logger_that_fails_is_turned_off_with_one_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    wandb, calls = StandIn(), []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(failing)
        raise ConnectionError("no network\nfor now")

    monkeypatch.setattr(wandb, failing, fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    printed = logging(tmp_path, monkeypatch, "train.wandb=digits", first_step=0, steps=[1, 2])
    warning = "warning: train.wandb failed (ConnectionError: no network for now); it is off until the run is started"
    assert printed.count(warning) == 1 and calls == [failing]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("setting", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setitem(sys.modules, setting, None)
    with pytest.raises(InputError, match=rf"package {setting} must be installed .*; pip install '.\[{setting}\]'"):
        check_packages(small_config("data", f"train.{setting}=true" if setting == "tensorboard" else "train.wandb=x"))


def test_a_run_that_stops_among_the_chosen_steps_writes_the_profile_of_those_it_took(tmp_path: Path) -> None:
    profiler = StepProfiler((3, 9), tmp_path / "profile", OneRank())
    with profiler.step(5):
        torch.ones(8)
    profiler.close()
    assert '"step 5"' in (tmp_path / "profile" / "rank-00000.trace.json").read_text()
    with profiler.step(9):  # closes the profiler, which would otherwise record all steps after it
        torch.ones(8)
    trace = (tmp_path / "profile" / "rank-00000.trace.json").read_text()
    assert '"step 9"' in trace and '"step 5"' not in trace
    StepProfiler(None, tmp_path / "none", OneRank()).close()
    assert not (tmp_path / "none").exists()
