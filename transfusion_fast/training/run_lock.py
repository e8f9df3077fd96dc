"""The lock of a run folder: two jobs must not train into one, and all ranks must see the same one."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from transfusion_fast.errors import EXIT_LOST_RANK, InputError
from transfusion_fast.training.checkpoint_files import CHECKPOINTS
from transfusion_fast.training.ranks import Ranks
from transfusion_fast.training.run_folder import CONFIG

LOCK = ".lock"
STALE = 60.0
"""Seconds without a sign of life after which a lock of another host is taken over; of this host, at once."""
_INITIAL_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of Linux
_VISIBLE = 30.0  # seconds that a network file system may take to show a new file


@contextlib.contextmanager
def lock_run(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if it does not exist. Collective.

    Raises:
        InputError: another job holds the lock, or a rank sees another folder under this path.
    """
    # The lock is a file that names process and host, and that its holder touches. It works on file systems that lock
    # nothing, such as NFS.
    lease = SoftFileLease(run / LOCK, lease_duration=STALE, thread_local=False, on_compromise=_end_run)
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


def _end_run(lost: LeaseCompromise) -> None:
    """Exit at once: another job may train in the folder by now, which a last checkpoint would disturb."""
    print(
        f"pretrain: {lost.lock_file} must stay this job's while it trains, got {lost.reason.replace('_', ' ')}, as "
        "after a long pause or a failure of the storage; see that no other job trains there, and start again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST_RANK)


def _acquire(lease: SoftFileLease, run: Path) -> None:
    (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # first, since it marks the folder as a run's
    try:
        lease.acquire(timeout=0.5)
        return
    except Timeout:
        holder, is_local = _holder(run)
    if not is_local:  # of a local process filelock would have known that it has ended
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


def _holder(run: Path) -> tuple[str, bool]:
    """Return the process that holds the lock, and whether it is one of this host and, in a container, of this one."""
    try:
        fields = dict(line.partition("=")[::2] for line in (run / LOCK).read_text().splitlines())
        own_namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        fields, own_namespace = {}, _INITIAL_NAMESPACE
    # filelock appends the namespace of process numbers to the host, but for the initial one.
    host, _, namespace = fields.get("host", "an unknown host").partition("?pidns-")
    own = "" if own_namespace == _INITIAL_NAMESPACE else f"{own_namespace:x}"
    return f"process {fields.get('pid', 'unknown')} on {host}", (host, namespace) == (socket.gethostname(), own)


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
