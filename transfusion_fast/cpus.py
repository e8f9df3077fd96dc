"""The number of CPUs that a process may use, which on a shared node or in a container is not that of the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Return the number of CPUs in the affinity of this process, or the limit of its control groups if that is less.

    A limit that is no whole number is rounded up.

    Args:
        root: folder of /proc and /sys.
    """
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        allowed = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count()
    return max(1, min([allowed or 1, *(math.ceil(limit) for limit in _limits(root))]))


def _limits(root: Path) -> Iterator[float]:
    """Yield the CPU time per time of each control group of this process that has a limit, in versions 1 and 2.

    A group is limited by those above it. A container may see its own group as the topmost.
    """
    groups = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / "cpu" if controllers else groups
        own = top / name.strip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            quota, period = _read(group / "cpu.max").split() or (
                _read(group / f"cpu.cfs_{kind}_us").strip() for kind in ("quota", "period")
            )
            if quota.isdecimal() and period.isdecimal() and int(period):  # no limit is "max" or -1
                yield int(quota) / int(period)


def _read(file: Path) -> str:
    """Return the contents of a file; empty if it is missing or unreadable."""
    try:
        return file.read_text()
    except OSError:
        return ""
