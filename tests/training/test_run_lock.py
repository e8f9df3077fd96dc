"""The lock of a run folder: who holds it, when it is taken over, and that all ranks see one folder."""

import multiprocessing
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from launching import OneRank

from transfusion_fast.errors import EXIT_LOST_RANK, InputError
from transfusion_fast.training import run_lock
from transfusion_fast.training.run_lock import lock_run


def hold(run: Path) -> None:
    with lock_run(run, OneRank()):
        signal.pause()


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock of a run folder."""
    process = multiprocessing.get_context("fork").Process(target=hold, args=[tmp_path / "run"])
    process.start()
    while not (tmp_path / "run" / ".lock").exists() or "token" not in (tmp_path / "run" / ".lock").read_text():
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_second_job_is_refused_with_the_process_and_host_of_the_first(holder, tmp_path: Path) -> None:
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(InputError) as refused, lock_run(tmp_path / "run", OneRank()):
        pass
    named = f"process {holder.pid} on {socket.gethostname()} trains, since {time.strftime('%Y-')}"
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once(holder, tmp_path: Path) -> None:
    holder.kill()
    holder.join()
    start = time.monotonic()
    with lock_run(tmp_path / "run", OneRank()):
        assert f"pid={os.getpid()}" in (tmp_path / "run" / ".lock").read_text()
    assert time.monotonic() - start < 5 and not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("host", ["elsewhere", f"{socket.gethostname()}?pidns-f0000001"])
def test_the_lock_of_another_host_or_container_is_taken_over_when_it_shows_no_sign_of_life(
    holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, host: str
) -> None:
    lock = tmp_path / "run" / ".lock"
    holder.kill()
    holder.join()
    monkeypatch.setattr(run_lock, "STALE", 2.0)
    content = re.sub("(?m)^host=.*$", f"host={host}", lock.read_text())
    lock.write_text(content.replace("duration=60.0", "duration=2.0"))
    with lock_run(tmp_path / "run", OneRank()):
        assert f"pid={os.getpid()}" in lock.read_text()
    named = f"process {holder.pid} on {host.partition('?')[0]}\n"
    assert f"waiting up to 2 s for a sign of life from {named}" in capsys.readouterr().out


def test_a_refused_run_leaves_no_folder_behind_and_a_started_one_keeps_its_own(tmp_path: Path) -> None:
    for name, file in (("refused", None), ("started", "data.json")):
        with lock_run(tmp_path / name, OneRank()):
            if file:
                (tmp_path / name / file).write_text("{}")
    assert not (tmp_path / "refused").exists()
    assert sorted(os.listdir(tmp_path / "started")) == ["data.json"]


def test_a_rank_that_sees_another_folder_under_the_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_VISIBLE", 0.1)
    with pytest.raises(InputError, match=f"storage that all nodes share, got .* rank 0 on {socket.gethostname()}"):
        run_lock._check_shared(tmp_path, "token of the lock on another disk", OneRank())


def test_a_job_that_has_lost_its_lock_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "STALE", 0.6)  # it is looked at every third of that
    process = multiprocessing.get_context("fork").Process(target=hold, args=[tmp_path / "run"])
    process.start()
    lock = tmp_path / "run" / ".lock"
    while not lock.exists() or "token" not in lock.read_text():
        time.sleep(0.01)
    lock.unlink()
    process.join(20)
    assert process.exitcode == EXIT_LOST_RANK
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"pretrain: {lock} must stay this job's while it trains, got ")
