"""The command that the README gives, through DeepSpeed's own launcher."""

import socket
import subprocess
import sys
from pathlib import Path

from launching import PRETRAIN, SMALL, metrics


def deepspeed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus 2 train/pretrain.py ...` with the small settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [sys.executable, launcher, "--num_gpus", "2", "--master_port", port, str(PRETRAIN), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_deepspeed_trains_on_two_ranks(digits: Path, uninterrupted: Path, tmp_path: Path) -> None:
    ended = deepspeed(f"data.path={digits}", f"train.output={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 x cpu" in ended.stdout
    assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_bad_input_takes_the_launcher_down_with_one_line_of_ours(tmp_path: Path) -> None:
    ended = deepspeed("data.path=nowhere", f"train.output={tmp_path / 'run'}")
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("pretrain: ")]
    assert len(ours) == 1 and "nowhere" in ours[0]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
