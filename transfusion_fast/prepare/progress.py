"""The progress of a stage of work: a bar in a terminal, and in a log, which cannot show a bar, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

EVERY = 30.0
"""Seconds between the lines at least. A shorter stage has none."""
Item = TypeVar("Item")


def progress(items: Iterable[Item], stage: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items, and show on standard error how many are done, the rate, and the time that is left.

    Args:
        total: number of items, if it is known.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, stage, total, unit=unit)
        return
    begun = last = time.monotonic()
    done = before = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= EVERY:
            _print(f"{stage}: {_line(done, total, unit, (done - before) / (now - last))}")
            last, before = now, done
    if last > begun:
        _print(f"{stage}: {done} {unit}s in {_duration(time.monotonic() - begun)}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _line(done: int, total: int | None, unit: str, rate: float) -> str:
    """Return the state of a stage; what is left is estimated by the rate since the last line."""
    speed = f"{rate:.3g} {unit}s/s" if rate >= 0.1 else f"{60 * rate:.3g} {unit}s/min"
    if total is None:
        return f"{done} {unit}s, {speed}"
    return f"{done} of {total} {unit}s, {speed}, about {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
