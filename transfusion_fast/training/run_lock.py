"""The lock of a run folder: two jobs must not train into one, and all ranks must see the same one."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from transfusion_fast.errors import InputError
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.run_folder import CHECKPOINTS, CONFIG

LOCK = ".lock"
STALE = 60.0
"""Seconds without a sign of life after which a lock of another host is taken over; of this host, at once."""
_VISIBLE = 30.0  # seconds that a network file system may take to show a new file


@contextlib.contextmanager
def lock_run(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if it does not exist. Collective.

    Raises:
        InputError: another job holds the lock, or a rank sees another folder under this path.
    """
    # The lock is a file that names process and host, and that its holder touches. It works on file systems that lock
    # nothing, such as NFS.
    lease = SoftFileLease(run / LOCK, lease_duration=STALE, thread_local=False)
    created = not run.exists()
    try:
        ranks.together(lambda: _acquire(lease, run) if ranks.is_main else None)
        token = ranks.gather([lease.token] if ranks.is_main else [])[0]
        ranks.together(lambda: _check_shared(run, token, ranks))
        yield
    finally:
        lease.release()
        if created and ranks.is_main:  # nothing is left of a run that was refused
            with contextlib.suppress(OSError):
                (run / CHECKPOINTS).rmdir()
                run.rmdir()


def _acquire(lease: SoftFileLease, run: Path) -> None:
    (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # first, since it marks the folder as a run's
    try:
        lease.acquire(timeout=0.5)
        return
    except Timeout:
        holder = _holder(run)
    if not holder.endswith(f" on {socket.gethostname()}"):
        print(f"{run}: waiting up to {STALE:.0f} s for a sign of life from {holder}", flush=True)
        with contextlib.suppress(Timeout):
            lease.acquire(timeout=STALE + 5)
            return
    since = ""
    with contextlib.suppress(OSError):
        since = time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime((run / CONFIG).stat().st_mtime))
    raise InputError(
        f"train.output must be used by one job at a time, got {run}, where {holder} trains{since}; end it, or give "
        "another train.output"
    )


def _holder(run: Path) -> str:
    try:
        fields = dict(line.partition("=")[::2] for line in (run / LOCK).read_text().splitlines())
    except OSError:
        fields = {}
    return f"process {fields.get('pid', 'unknown')} on {fields.get('host', 'an unknown host')}"


def _check_shared(run: Path, token: str, ranks: Ranks) -> None:
    deadline = time.monotonic() + _VISIBLE
    while True:
        with contextlib.suppress(OSError):
            os.listdir(run)  # makes NFS look again
            if f"token={token}" in (run / LOCK).read_text():
                return
        if time.monotonic() > deadline:
            raise InputError(
                f"train.output must be on storage that all nodes share, got {run}, where rank {ranks.rank} on "
                f"{socket.gethostname()} does not see the files of rank 0; give another train.output"
            )
        time.sleep(0.5)
