"""DeepSpeed's own launcher: how a run under it succeeds, stops and fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import await_until, deepspeed_command, last_step, metrics, run_in_child, start, state_of, train


def test_the_command_of_the_readme_takes_the_steps_of_ranks_without_a_launcher(
    digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = subprocess.run(deepspeed_command(digits, run), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 x cpu" in ended.stdout
    assert metrics(run) == metrics(uninterrupted) and state_of(run, 6) == state_of(uninterrupted, 6)


@pytest.mark.parametrize(("how", "workers"), [("SIGTERM to the command alone", 0), ("Ctrl-C", 1)])
def test_ranks_that_are_asked_to_stop_save_and_end(digits: Path, tmp_path: Path, how: str, workers: int) -> None:
    run = tmp_path / "run"
    settings = ("train.steps=100000", "train.checkpoint_every=50000", f"data.workers={workers}")
    command = deepspeed_command(digits, run, *settings)
    with (tmp_path / "printed").open("w") as printed:
        started = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
    await_until(lambda: last_step(run) >= 1)
    family = psutil.Process(started.pid).children(recursive=True)
    assert len(family) >= 3 + 2 * workers  # the launcher, two ranks and their workers
    if how == "SIGTERM to the command alone":
        started.terminate()
    else:
        os.killpg(started.pid, signal.SIGINT)
        os.killpg(started.pid, signal.SIGTERM)  # the launcher sends one too, at a time that varies
    _, alive = psutil.wait_procs([started, *family], timeout=30)
    for process in alive:
        process.kill()
    assert not alive
    said = (tmp_path / "printed").read_text()
    assert "stopped at step" in said and "Traceback" not in said
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{last_step(run):08d}"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone signals the death of a parent")
def test_a_rank_whose_launcher_is_killed_saves_and_ends(digits: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 1000
    launched = start(1, digits, run, f"train.steps={steps}", "train.checkpoint_every=1000", setup=run_in_child)
    launched.signal_when(lambda: last_step(run) >= 1, signal.SIGKILL)
    await_until(lambda: "stopped at step" in launched.output.read_text() or last_step(run) == steps)
    assert last_step(run) < steps


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the first step", "while training"])
@pytest.mark.parametrize("victim", ["the command", "the launcher"])
def test_a_run_whose_launcher_is_killed_ends_and_resumes_with_the_same_bits(
    digits: Path, tmp_path: Path, victim: str, moment: str
) -> None:
    settings = ("train.steps=80", "train.checkpoint_every=7")
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(2, digits, whole, *settings)
    with (tmp_path / "printed").open("w") as printed:
        started = subprocess.Popen(deepspeed_command(digits, run, *settings), stdout=printed, stderr=printed)
    await_until(lambda: last_step(run) >= 3 if moment == "while training" else (run / "config.yaml").exists())
    family = psutil.Process(started.pid).children(recursive=True)
    (started if victim == "the command" else family[0]).kill()
    _, alive = psutil.wait_procs([started, *family], timeout=30)
    assert not alive and last_step(run) < 80, (tmp_path / "printed").read_text()
    train(2, digits, run, *settings)
    assert metrics(run) == metrics(whole) and state_of(run, 80) == state_of(whole, 80)


def test_input_that_all_ranks_refuse_ends_the_launcher_with_one_line(tmp_path: Path) -> None:
    """Rank 0 prints it; another rank that ended first would make the launcher end rank 0 before that."""
    command = deepspeed_command(Path("nowhere"), tmp_path / "run")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    ours = [line for line in ended.stderr.splitlines() if line.startswith("pretrain: ")]
    assert ended.returncode != 0 and len(ours) == 1 and "nowhere" in ours[0]
    assert "Traceback" not in ended.stderr and not (tmp_path / "run").exists()
