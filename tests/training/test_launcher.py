"""The command that the README gives, through DeepSpeed's own launcher."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import PRETRAIN, SMALL, await_until, free_port, last_step, metrics


def command_of(*arguments: str) -> list[str]:
    """`deepspeed --num_gpus 2 train/pretrain.py ...` with the small settings."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    rendezvous = ["--num_gpus", "2", "--master_port", free_port()]
    return [sys.executable, launcher, *rendezvous, str(PRETRAIN), *SMALL, *arguments]


def deepspeed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs that command to its end."""
    return subprocess.run(command_of(*arguments), capture_output=True, text=True, timeout=240)


def test_deepspeed_trains_on_two_ranks(digits: Path, uninterrupted: Path, tmp_path: Path) -> None:
    ended = deepspeed(f"data.path={digits}", f"train.output={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 x cpu" in ended.stdout
    assert metrics(tmp_path / "run") == metrics(uninterrupted)


@pytest.mark.parametrize(("how", "workers"), [("SIGTERM to the command alone", 0), ("Ctrl-C", 1)])
def test_ranks_that_are_asked_to_stop_save_and_end(digits: Path, tmp_path: Path, how: str, workers: int) -> None:
    run = tmp_path / "run"
    settings = ("train.steps=100000", "train.checkpoint_every=50000", f"data.workers={workers}")
    command = command_of(f"data.path={digits}", f"train.output={run}", *settings)
    with (tmp_path / "printed").open("w") as printed:
        started = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
    await_until(lambda: last_step(run) >= 1)
    family = psutil.Process(started.pid).children(recursive=True)
    assert len(family) >= 3 + 2 * workers  # the launcher, two ranks and their workers
    if how == "SIGTERM to the command alone":
        started.terminate()
    else:
        os.killpg(started.pid, signal.SIGINT)
        os.killpg(started.pid, signal.SIGTERM)  # as the launcher sends its own, sooner or later
    started.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
    said = (tmp_path / "printed").read_text()
    assert "stopped at step" in said and "Traceback" not in said
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{last_step(run):08d}"


def test_a_damaged_pack_takes_the_launcher_down_with_one_line_of_ours(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "data")
    for shard in (tmp_path / "data").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(content)
    ended = deepspeed(f"data.path={tmp_path / 'data'}", f"train.output={tmp_path / 'run'}", "data.workers=1")
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("pretrain: ")]
    assert len(ours) == 1 and "pack 0 of shard" in ours[0]
    assert "Traceback" not in ended.stderr


def test_bad_input_takes_the_launcher_down_with_one_line_of_ours(tmp_path: Path) -> None:
    ended = deepspeed("data.path=nowhere", f"train.output={tmp_path / 'run'}")
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("pretrain: ")]
    assert len(ours) == 1 and "nowhere" in ours[0]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
