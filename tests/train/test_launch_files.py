"""The files of train/launch: the SLURM script, with stand-ins for SLURM's commands, and the hostfile."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

LAUNCH = Path(__file__).resolve().parents[2] / "train" / "launch"
SRUN = """
echo "$@" > srun.arguments
[ -n "$SIGNAL" ] && kill -TERM "$PPID" && sleep 0.3
exit "$CODE"
"""


def run_job(folder: Path, code: int, state: str, **variables: str) -> tuple[int, bool]:
    """Run the script of a job whose ranks end with `code`; return its exit code, and whether it queued itself again."""
    commands = {"srun": SRUN, "squeue": f"echo {state}", "scontrol": 'echo "$@" > scontrol.arguments'}
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    given = {"CODE": str(code), "SIGNAL": "", "SLURM_JOB_ID": "77", "USER": "me", **variables}
    environment = {**os.environ, **given, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [shutil.which("bash"), str(LAUNCH / "slurm.sh"), "a.yaml", "train.steps=9"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30)
    assert not ended.stderr, ended.stderr
    assert "train/pretrain.py a.yaml train.steps=9 data.cache=" in (folder / "srun.arguments").read_text()
    queued = folder / "scontrol.arguments"
    assert not queued.exists() or queued.read_text() == "requeue 77\n"
    return ended.returncode, queued.exists()


@pytest.mark.parametrize(
    ("code", "state", "variables", "queued"),
    [
        (5, "RUNNING", {}, True),
        (5, "RUNNING", {"SIGNAL": "yes"}, True),
        (5, "COMPLETING", {}, False),
        (6, "RUNNING", {"SLURM_RESTART_COUNT": "2"}, True),
        (6, "RUNNING", {"SLURM_RESTART_COUNT": "3"}, False),
        (0, "RUNNING", {}, False),
        (2, "RUNNING", {}, False),
    ],
)
def test_a_job_queues_itself_again_only_where_that_helps(
    tmp_path: Path, code: int, state: str, variables: dict[str, str], queued: bool
) -> None:
    assert run_job(tmp_path, code, state, **variables) == (code, queued)


def test_deepspeed_reads_the_hostfile() -> None:
    assert fetch_hostfile(str(LAUNCH / "hostfile")) == {"gpu01": 8, "gpu02": 8}
