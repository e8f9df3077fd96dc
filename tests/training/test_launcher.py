"""DeepSpeed's own launcher: how a run under it stops and fails. The fixture `uninterrupted` succeeds under it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import await_until, deepspeed_command, last_step, refusal, run_in_child, start


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
    started.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=60)
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


def test_a_damaged_pack_ends_the_launcher_with_one_line(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "data")
    for shard in (tmp_path / "data").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(content)
    command = deepspeed_command(tmp_path / "data", tmp_path / "run", "data.workers=1")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("pretrain: ")]
    assert len(ours) == 1 and "pack 0 of shard" in ours[0]
    assert "Traceback" not in ended.stderr


def test_input_that_all_ranks_refuse_is_reported_once(tmp_path: Path) -> None:
    assert "nowhere" in refusal(start(2, "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
