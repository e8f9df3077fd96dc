"""A rank that no longer answers: the run ends, names it, and says what the others were doing."""

import os
import signal
import time
from pathlib import Path

import pytest
from launching import await_until, last_step, start

from transfusion_fast.errors import EXIT_LOST_RANK

LIMIT = 6


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run_and_is_named_with_its_host(digits: Path, tmp_path: Path, stopped: int) -> None:
    run = start(2, digits, tmp_path, "train.steps=100000", f"train.heartbeat={LIMIT}", "train.checkpoint_every=1000")
    await_until(lambda: last_step(tmp_path) >= 1)
    process = run.processes[stopped].pid
    os.kill(process, signal.SIGSTOP)
    since = time.monotonic()
    codes, printed = run.wait()
    assert time.monotonic() - since < 60  # a collective operation alone would wait for minutes
    assert codes[stopped] == -signal.SIGKILL and codes[1 - stopped] == EXIT_LOST_RANK
    host = os.uname().nodename
    assert f"pretrain: rank {stopped} on {host} (process {process}) has not answered for {LIMIT} s" in printed
    stacks = printed.partition(f"rank {1 - stopped} on {host}:\n")[2]
    assert "trainer.py" in stacks and "in _step" in stacks
